"""A run's curves as a PNG: losses, gates, and how far each fold moves the inner weights.

Needs matplotlib (`pip install 'moshi-ttt-mlx[plots]'`); training does not.
"""

import importlib.util
from pathlib import Path

import numpy as np

PLOT_NAME = "training.png"
NO_MATPLOTLIB = "no plots: pip install matplotlib (or moshi-ttt-mlx[plots]) for training.png"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_run(lines: list[dict], path: str | Path) -> None:
    """Draw the log of a run (`run.read_log`).

    Args:
        lines: at least one update.
        path: a `.png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    updates = [line for line in lines if "loss" in line]
    steps = [line["step"] for line in updates]
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (losses, streams), (gates, folds) = figure.subplots(2, 2)
    _losses(losses, updates, [line for line in lines if "held_out" in line])
    _streams(streams, steps, updates)
    _layers(gates, steps, updates, "gates", "mean |gate| of a layer")
    _layers(folds, steps, updates, "updates", "||dW|| / ||W|| of the last fold, largest")
    for axes in (losses, streams, gates, folds):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _losses(axes, updates: list[dict], held_out: list[dict]) -> None:
    axes.plot([u["step"] for u in updates], [u["loss"] for u in updates], lw=0.8, label="training")
    if held_out:
        values = [line["held_out"]["loss"] for line in held_out]
        axes.plot([line["step"] for line in held_out], values, "o-", label="held out")
    axes.set_title("loss (weighted, nats)")
    axes.legend()


def _streams(axes, steps: list[int], updates: list[dict]) -> None:
    # Updates that hear no word have no loss for it: None, which becomes a gap.
    said = np.array([u["said"] for u in updates], float)
    codebooks = np.array([u["codebooks"] for u in updates], float)
    axes.plot(steps, said, "k.-", lw=1, label="words")
    for k, losses in enumerate(codebooks.T, 1):
        axes.plot(steps, losses, lw=0.7, label=f"codebook {k}")
    axes.set_title("loss of each stream (nats)")
    axes.legend(fontsize="small", ncols=2)


def _layers(axes, steps: list[int], updates: list[dict], key: str, title: str) -> None:
    for layer in updates[0][key]:
        axes.plot(steps, [u[key][layer] for u in updates], lw=0.8, label=f"layer {layer}")
    axes.set_title(title)
    if 0 < len(updates[0][key]) <= 8:
        axes.legend(fontsize="small")
