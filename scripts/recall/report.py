"""Tables, plots and evidence.json of the recall experiment, from the files of its finished parts."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from moshi_ttt_mlx.train.plots import NO_MATPLOTLIB, can_plot
from recall.training import DISTANCES, WINDOW

BY_DISTANCE = ("recall", "memory_off", "shuffled", "gate_closed", "overwritten", "noise", "voice")
SINGLE = ("in_window", "in_window_base", "silent", "stream_difference")
BEGIN, END = "<!-- recall table -->", "<!-- /recall table -->"


def line(path: Path) -> str:
    """One finished part, for the terminal."""
    part = json.loads(path.read_text())
    where = f"{path.parent.name} {path.stem}: {part['cpu_seconds']:.0f} s"
    if "recall" not in part:
        return where
    recall = " ".join(f"{name} {100 * x:.1f}" for name, x in part["recall"].items())
    return f"{where}, recall % {recall}, in window {100 * part['in_window']:.1f}"


def write(work: Path, names: Sequence[str], chance: float, folder: Path) -> None:
    """`evidence.json` and two plots into a folder, and the table into its `evidence.md` if there is one.

    Raises:
        SystemExit: no variant is finished.
    """
    found = {name: _parts(work, name) for name in names}
    found = {name: parts for name, parts in found.items() if parts}
    if not found:
        raise SystemExit(f"no finished variant in {work}")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    document = {
        "about": _about(work),
        "variants": {
            name: {"command": _command(name, parts)} | _summary(parts, chance)
            for name, parts in found.items()
        },
    }
    (folder / "evidence.json").write_text(json.dumps(document, indent=1) + "\n")
    if can_plot():
        _plot_recall(document["variants"], chance, images / "recall.png")
        _plot_losses(found, images / "recall_training.png")
    else:
        print(NO_MATPLOTLIB, file=sys.stderr)
    table = markdown(document["variants"])
    print(table)
    page = folder / "evidence.md"
    if page.exists() and BEGIN in (text := page.read_text()):
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        page.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


def _parts(work: Path, name: str) -> dict[int, dict]:
    """Finished parts of a variant by seed."""
    return {
        int(path.parent.name.removeprefix("seed_")): json.loads(path.read_text())
        for path in sorted(work.glob(f"seed_*/{name}.json"))
    }


def _about(work: Path) -> dict:
    bases = [json.loads(path.read_text()) for path in sorted(work.glob("seed_*/base.json"))]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, one core a part",
        "mlx": mx.__version__,
        "window": WINDOW,
        "base_cpu_seconds": [round(base["cpu_seconds"]) for base in bases],
    }


def _command(name: str, seeds: Iterable[int]) -> str:
    """What trains and measures this variant."""
    seeds = map(str, seeds)
    return shlex.join(
        ["python", "scripts/recall_experiment.py", "--variants", name, "--seeds", *seeds]
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else "unknown processor"


def _summary(parts: dict[int, dict], chance: float) -> dict:
    """Means over the seeds, and under `std` their spread."""
    rows = list(parts.values())
    mean, std = {}, {}
    for group in (name for name in BY_DISTANCE if rows[0].get(name)):
        values = {name: [row[group][name] for row in rows] for name in rows[0][group]}
        mean[group] = {name: _mean(x) for name, x in values.items()}
        std[group] = {name: _std(x) for name, x in values.items()}
    for name in SINGLE:
        if name in rows[0]:
            mean[name], std[name] = (f([row[name] for row in rows]) for f in (_mean, _std))
    seconds = [round(row["cpu_seconds"]) for row in rows]
    return mean | {"chance": chance, "std": std, "seeds": list(parts), "cpu_seconds": seconds}


def _mean(values: Iterable[float]) -> float:
    return float(f"{np.mean(list(values)):.4g}")


def _std(values: Iterable[float]) -> float:
    return float(f"{np.std(list(values)):.4g}")


def markdown(variants: dict[str, dict]) -> str:
    """The tables of `evidence.md`: percent, mean and spread over seeds."""
    text = {name: row for name, row in variants.items() if name != "spoken"}
    columns = [(d, "recall", d) for d in DISTANCES]
    columns += [("16W, noise", "noise", "16W"), ("1 h, noise", "noise", "1 h")]
    columns += [("4W, overwritten", "overwritten", "4W"), ("in window", "in_window", None)]
    columns += [("base", "in_window_base", None)]
    blocks = [_table("memory", text, columns)] if text else []
    if first := text.get("default"):
        groups = [(g.replace("_", " "), g) for g in ("memory_off", "gate_closed", "shuffled")]
        ablations = {name: {"x": first[g], "std": {"x": first["std"][g]}} for name, g in groups}
        blocks.append(_table("default, with", ablations, [(d, "x", d) for d in DISTANCES]))
    if row := variants.get("spoken"):
        names = {"text": "recall", "all 8 codebooks": "voice", "text, memory off": "memory_off"}
        spoken = {name: {"x": row[g], "std": {"x": row["std"][g]}} for name, g in names.items()}
        blocks.append(_table("spoken", spoken, [(d, "x", d) for d in DISTANCES]))
        blocks.append(
            f"Seeds: {len(row['seeds'])}. In the window: {_cell(row, row['std'], 'in_window')} % with "
            f"the memory, {_cell(row, row['std'], 'in_window_base')} % without. Frames without a "
            f"question in which it keeps silent: {_cell(row, row['std'], 'silent')} %. Losses frame by "
            f"frame and all at once differ by {row['stream_difference']:.1e} nats at most."
        )
    return "\n\n".join(blocks)


def _table(title: str, rows: dict[str, dict], columns: list[tuple[str, str, str | None]]) -> str:
    """Columns: head, group, and name in the group if it is one."""
    lines = [f"| {title} | " + " | ".join(head for head, *_ in columns) + " |"]
    lines.append("|" + "---|" * (1 + len(columns)))
    for name, row in rows.items():
        cells = [
            _cell(row, row["std"], group)
            if key is None
            else _cell(row.get(group, {}), row["std"].get(group, {}), key)
            for _, group, key in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(mean: dict, std: dict, name: str) -> str:
    if name not in mean:
        return "-"
    return f"{100 * mean[name]:.1f} ± {100 * std[name]:.1f}"


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _plot_recall(variants: dict, chance: float, path: Path) -> None:
    figure, axes = _figure(8, 4.5)
    places = list(DISTANCES.values())
    for name, row in variants.items():
        mean = [100 * row["recall"][d] for d in DISTANCES]
        std = [100 * row["std"]["recall"][d] for d in DISTANCES]
        style = {"linewidth": 2.5, "color": "black"} if name == "default" else {"linewidth": 1.2}
        axes.errorbar(places, mean, std, marker="o", capsize=3, label=name, **style)
    axes.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    axes.axvline(WINDOW, color="grey", linestyle="--", label="attention's window")
    axes.set_xscale("log", base=2)
    ticks = [WINDOW, *places]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="tokens between fact and question", ylabel="right answers, %", ylim=(0, 102))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=110)


def _plot_losses(found: dict[str, dict[int, dict]], path: Path) -> None:
    figure, axes = _figure(8, 4)
    for name, parts in found.items():
        losses = [part["loss"] for part in parts.values() if "loss" in part]
        if not losses:
            continue
        mean = np.mean(losses, axis=0)
        width = min(20, len(mean))
        smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(smooth)) + width, smooth, label=name)
    axes.set(xlabel="updates", ylabel="loss of questions, nats", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
