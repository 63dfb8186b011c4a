"""Loss by position as a PNG: above, each variant; below, its difference from the exact window.

Needs matplotlib (`pip install 'moshi-ttt-mlx[plots]'`); evaluation does not.
"""

from pathlib import Path

NO_MATPLOTLIB = "no plot: pip install matplotlib (or moshi-ttt-mlx[plots])"
SHOWN = ("text", "words", "codebook 1", "codebooks")


def plot(document: dict, path: str | Path) -> None:
    """Draw what `report.describe` says.

    Args:
        document: of it.
        path: a `.png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    streams = [name for name in SHOWN if name in document["streams"]]
    figure = Figure(figsize=(4.5 * len(streams), 8), layout="constrained")
    FigureCanvasAgg(figure)
    for column, stream in zip(figure.subplots(2, len(streams)).T, streams, strict=True):
        _lines(column[0], document, stream, "nll", "se")
        _lines(column[1], document, stream, "minus_exact", "minus_exact_se")
        column[0].set_title(f"{stream}: nats a token")
        column[1].set_title("minus the exact window")
        column[1].axhline(0, color="black", lw=0.8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"window W = {document['window']} frames; bars: standard error over talks")
    figure.savefig(path, dpi=120)


def _lines(axes, document: dict, stream: str, value: str, error: str) -> None:
    places = list(document["positions"])
    for number, (name, variant) in enumerate(document["variants"].items()):
        entries = [variant["by_position"][place][stream] for place in places]
        if value not in entries[0]:
            continue
        # Side by side, or the bars of equal variants would hide each other.
        at = [place + 0.06 * (number - 2.5) for place in range(len(places))]
        values = [_number(entry[value]) for entry in entries]
        bars = [entry[error] or 0.0 for entry in entries]
        axes.errorbar(at, values, bars, fmt="o-", ms=3, lw=1, label=name, color=f"C{number}")
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel("position")
    axes.grid(alpha=0.3)


def _number(value: float | None) -> float:
    """A bucket without a token of this stream is a gap."""
    return float("nan") if value is None else value
