"""The demo's talk on one page: both voices and their words, the facts, and the memory at work.

Needs matplotlib (`pip install 'moshi-ttt-mlx[plots]'`); the demo does not.
"""

import math
import textwrap
from pathlib import Path

import numpy as np

from ..audio import FRAME_SECONDS
from ..transcript import NAMES, USER, clock
from .record import Record
from .story import CHANCE, Passage, Question

WIDTH, ROW_SECONDS, MOST_ROWS = 8.27, 60.0, 4
"""Inches of a page (A4); a row of the talk is a minute, or longer where four are not enough."""

_SMALL = 5.3  # points of the words under a voice
_LINES = 3  # of them
_LETTERS = 148.0  # of such, side by side, over the width of a row
_RIGHT, _WRONG, _QUIET = "#1a7f37", "#c62828", "#8a8a8a"
_VOICES = ("#4a6fa5", "#b8652a", "#7d7d7d")  # the user, then the runs


def draw(record: Record, path: str | Path) -> None:
    """Draw what was kept of a talk.

    Args:
        record: at least one frame.
        path: a `.png`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The font that matplotlib brings: it has the marks, and looks the same everywhere.
    with rc_context({"font.family": "DejaVu Sans", "font.size": 7, "axes.linewidth": 0.6}):
        rows = min(max(math.ceil(record.seconds / ROW_SECONDS), 1), MOST_ROWS)
        keys = _keys(record)
        heights = [*[0.58 * (1 + len(record.runs))] * rows, 0.3 + 0.17 * max(len(keys), 3), 1.1]
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.34 * len(heights) + 0.6))
        FigureCanvasAgg(figure)
        axes = _place(figure, heights)
        figure.suptitle(_title(record), fontsize=9, y=1 - 0.16 / figure.get_figheight(), va="top")
        _talk(axes[:rows], record)
        _facts(axes[-2], record, keys)
        _memory(axes[-1], record)
        figure.savefig(path, dpi=200)


def _place(figure, heights: list[float]) -> list:
    """Axes of these heights (inches) below each other."""
    high, left, right = figure.get_figheight(), 0.68, 0.45
    top, axes = high - 0.55, []
    for height in heights:
        box = (left / WIDTH, (top - height) / high, 1 - (left + right) / WIDTH, height / high)
        axes.append(figure.add_axes(box))
        top -= height + 0.34
    return axes


def _title(record: Record) -> str:
    asked = [question for question in record.questions if question.beyond]
    lines = [f"{clock(round(record.seconds))} of talk, a window of {record.window.seconds:.1f} s"]
    if asked:
        right = [f"{sum(q.right[run] for q in asked)} {run}" for run in record.runs]
        chance = f"{CHANCE * len(asked):.1f} by chance"
        lines.append(
            f"right answers to {len(asked)} questions from beyond the window: "
            + ", ".join([*right, chance])
        )
    return "\n".join(lines)


# -- the talk --------------------------------------------------------------------------------------


def _talk(rows: list, record: Record) -> None:
    """Voices and words, a row after another."""
    step = max(record.seconds, 1.0) / len(rows)
    lanes = [NAMES[USER], *record.runs]
    peaks = [record.user_peaks(), *(np.array(record.talks[run].peaks) for run in record.runs)]
    words = [_user_words(record.passages)]
    words += [_reply_words(record.passages, run) for run in record.runs]
    for number, axes in enumerate(rows):
        start = number * step
        for lane, (loudness, said) in enumerate(zip(peaks, words, strict=True)):
            _voice(axes, lane, loudness)
            _words(axes, lane, said, start, step)
        axes.set_xlim(start, start + step)
        axes.set_ylim(-len(lanes), 0)
        axes.set_yticks([-lane - 0.22 for lane in range(len(lanes))])
        axes.set_yticklabels([lane.replace(" ", "\n") for lane in lanes], fontsize=6)
        axes.tick_params(axis="y", length=0)
        axes.spines[["left", "right", "top"]].set_visible(False)
        _times(axes, 10 if step >= 30 else 5)
        for lane in range(1, len(lanes)):
            axes.axhline(-lane, color="#d0d0d0", lw=0.5)


def _times(axes, every: float) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    axes.xaxis.set_major_locator(MultipleLocator(every))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(round(seconds))))
    axes.tick_params(axis="x", labelsize=6, length=2, pad=1)
    axes.tick_params(axis="y", pad=3)


def _voice(axes, lane: int, peaks: np.ndarray) -> None:
    """A voice's loudness, frame by frame, about the middle of the upper part of its lane."""
    if not len(peaks):
        return
    size = 0.19 * np.repeat(peaks / max(peaks.max(), 1e-3), 2)
    edges = np.arange(len(peaks) + 1) * FRAME_SECONDS
    times = np.stack([edges[:-1], edges[1:]], axis=1).ravel()
    middle = -lane - 0.22
    axes.fill_between(times, middle - size, middle + size, color=_VOICES[min(lane, 2)], lw=0.2)


def _user_words(passages: list[Passage]) -> list[tuple[float, str, str]]:
    """When, what and in which colour: facts and questions stand out from small talk."""
    turns = [passage.turn for passage in passages if passage.turn is not None]
    return [(t.start, t.text, _QUIET if t.kind == "talk" else "black") for t in turns]


def _reply_words(passages: list[Passage], run: str) -> list[tuple[float, str, str]]:
    said = []
    for passage in passages:
        words = passage.replies[run]
        text = " ".join(word.text for word in words)
        if passage.question is not None:
            right = passage.question.right[run]
            start = words[0].start if words else passage.question.turn.end
            mark, colour = _mark(right)
            said.append((start, f"{mark} {text or '(nothing)'}", colour))
        elif words:
            is_talk = passage.turn is None or passage.turn.kind == "talk"
            said.append((words[0].start, text, _QUIET if is_talk else "black"))
    return said


def _mark(right: bool) -> tuple[str, str]:
    return ("✓", _RIGHT) if right else ("✗", _WRONG)


def _words(axes, lane: int, said: list[tuple[float, str, str]], start: float, step: float) -> None:
    """Words below their voice, in lines as long as there is room before the next ones."""
    ends = [time for time, _, _ in said[1:]]
    for (time, text, colour), end in zip(said, [*ends, math.inf], strict=False):
        if start <= time < start + step:
            room = min(end, start + 1.04 * step) - time
            letters = max(int(room * _LETTERS / step) - 1, 6)
            lines = textwrap.wrap(
                text, letters, max_lines=_LINES, placeholder="…", break_long_words=False
            )
            place = (time, -lane - 0.44)
            axes.text(*place, "\n".join(lines), color=colour, fontsize=_SMALL, va="top")


# -- facts -----------------------------------------------------------------------------------------


def _keys(record: Record) -> list[str]:
    """In the order in which they were first told."""
    turns = [p.turn for p in record.passages if p.turn is not None and p.turn.kind == "tell"]
    return list(dict.fromkeys(turn.key for turn in turns))


def _facts(axes, record: Record, keys: list[str]) -> None:
    """When each fact was told, in the window, and asked, with the marks of all runs."""
    place = {key: -number for number, key in enumerate(keys)}
    for passage in record.passages:
        for left in passage.left:
            span = {"left": left.since, "width": left.at - left.since, "height": 0.62}
            axes.barh(place[left.key], **span, color="#dbe5f1", zorder=1)
        if passage.question is not None:
            _question(axes, place[passage.question.turn.key], passage.question, record.runs)
        elif passage.turn is not None and passage.turn.kind == "tell":
            turn, y = passage.turn, place[passage.turn.key]
            axes.plot(turn.start, y, "o", ms=3, color=_VOICES[0], zorder=4)
            offset = {"textcoords": "offset points", "va": "bottom", "fontsize": 5.5, "zorder": 4}
            axes.annotate(turn.value, (turn.start, y), (1, 1.2), **offset)
    title = "facts: ● told, shaded: in the window, asked: windows since last said"
    if len(record.runs) > 1:
        title += f", the upper mark {record.runs[0]}, the lower {record.runs[1]}"
    _heading(axes, title)
    axes.set_yticks(list(place.values()), list(place), fontsize=6)
    axes.set_ylim(-max(len(keys), 3) + 0.4, 0.6)
    axes.set_xlim(0, record.seconds)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#eeeeee", lw=0.5, zorder=0)
    _times(axes, _round_step(record.seconds))


def _question(axes, y: float, question: Question, runs: list[str]) -> None:
    """A line from where the fact was last said, the distance, and a mark for each run."""
    at = question.turn.start
    line = {"arrowstyle": "-|>", "mutation_scale": 5, "shrinkA": 0, "shrinkB": 4, "lw": 0.6}
    line["color"] = "#555555"
    axes.annotate("", (at, y), (question.said, y), arrowprops=line, zorder=2)
    for number, run in enumerate(runs):
        mark, colour = _mark(question.right[run])
        height = 0.23 * (1 - 2 * number) if len(runs) > 1 else 0
        style = {"fontsize": 6.5, "ha": "center", "va": "center", "color": colour, "zorder": 5}
        axes.text(at, y + height, mark, **style, weight="bold")
    distance = f"{question.windows_ago:.1f}"
    where = (at, y), (-4, 1.5)
    style = {
        "textcoords": "offset points",
        "ha": "right",
        "va": "bottom",
        "fontsize": 5,
        "zorder": 5,
    }
    axes.annotate(distance, *where, **style, color="#555555")


def _heading(axes, text: str) -> None:
    axes.set_title(text, fontsize=6.5, loc="left", pad=2.5)


def _round_step(seconds: float) -> float:
    return next((step for step in (5, 10, 20, 30, 60) if seconds / step <= 12), 300)


# -- the memory ------------------------------------------------------------------------------------


def _memory(axes, record: Record) -> None:
    """Of each fold how far it moves the inner weights, and how far all of them have moved them."""
    reports = next((t.reports for t in record.talks.values() if t.reports), [])
    axes.set_xlim(0, max(record.seconds, FRAME_SECONDS))
    axes.set_xlabel("time in the talk", fontsize=6, labelpad=1)
    _times(axes, _round_step(record.seconds))
    if not reports:
        _heading(axes, "memory: none, or shut")
        axes.set_yticks([])
        return
    times = [time for time, _ in reports]
    right = axes.twinx()
    for number, layer in enumerate(reports[0][1]):
        step, drift = (
            np.array([report[layer][name] for _, report in reports]) for name in ("step", "drift")
        )
        colour, name = f"C{number % 10}", f"layer {layer}"
        axes.plot(times, step, "-", lw=0.8, color=colour, label=f"{name}: last fold")
        right.plot(times, drift, "--", lw=0.8, color=colour, label=f"{name}: since the start")
    _heading(axes, "memory: how far learning moves the inner weights, ‖ΔW‖ / ‖W‖")
    for side, name in ((axes, "last fold"), (right, "since the start")):
        side.set_ylabel(name, fontsize=6, labelpad=2)
        side.set_ylim(bottom=0)
        side.tick_params(axis="y", labelsize=5.5, length=2, pad=1)
    if len(reports[0][1]) <= 4:
        both = axes.get_legend_handles_labels(), right.get_legend_handles_labels()
        handles, labels = (left + others for left, others in zip(*both, strict=True))
        axes.legend(handles, labels, fontsize=5, ncols=2, loc="lower right", framealpha=0.8)
