"""What a live talk shows: words as they come and a status line, or words alone into a pipe."""

import sys

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..live import FRAME_MS, Status

PAUSE_SECONDS = 2.0
"""A pause this long begins a new paragraph."""

PARAGRAPH_CHARS = 200
"""A paragraph ends at the next word after so many: the live part of the screen stays small."""

_BAR_CELLS = 8
_BAR_FLOOR_DB = -56.0


def clock(seconds: float) -> str:
    """``M:SS``, or ``H:MM:SS``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class PlainScreen:
    """For pipes: words to stdout, warnings to stderr, nothing else."""

    def __init__(self):
        self._errors = Console(stderr=True, soft_wrap=True)
        self._has_words = False

    def __enter__(self) -> "PlainScreen":
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_words:
            print(flush=True)

    def note(self, message: str) -> None:
        """Nothing: a note is for people."""

    def warn(self, message: str) -> None:
        self._errors.print(f"warning: {message}", markup=False, highlight=False)

    def said(self, text: str, _time: float) -> None:
        print(text, end="", flush=True)
        self._has_words = True

    def show(self, status: Status) -> None:
        """Nothing: a status line is for people."""


class LiveScreen:
    """For terminals: paragraphs with their time, and below them one status line.

    Args:
        console: on stdout.
    """

    def __init__(self, console: Console):
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._words, self._began, self._latest = "", 0.0, 0.0

    def __enter__(self) -> "LiveScreen":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_paragraph()
        self._live.stop()

    def note(self, message: str) -> None:
        self._console.print(message, style="dim", markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self._console.print(message, style="yellow", markup=False, highlight=False)

    def said(self, text: str, time: float) -> None:
        """Words with their time in the talk; a paragraph that is over scrolls up."""
        full = len(self._words) > PARAGRAPH_CHARS
        if text.startswith(" ") and (full or time - self._latest > PAUSE_SECONDS):
            self._end_paragraph()
        self._began = self._began if self._words else time
        self._words += text
        self._latest = time

    def show(self, status: Status) -> None:
        """Draw the current paragraph and the status line."""
        self._live.start()  # here, not before: loading has its own live line
        parts = [self._paragraph()] if self._words else []
        line = status_line(status)
        # The terminal writes ^C behind it: on a full line that would begin a new one.
        line.truncate(self._console.width - len("^C") - 1, overflow="ellipsis")
        self._live.update(Group(*parts, line), refresh=True)

    def _paragraph(self) -> Text:
        return Text.assemble((f"{clock(self._began)} ", "dim"), self._words.strip())

    def _end_paragraph(self) -> None:
        if self._words:
            self._live.update("")
            self._console.print(self._paragraph())
        self._words = ""


def status_line(status: Status) -> Text:
    """Age, lag (before the model + before the loudspeaker), frame time, levels, what went wrong."""
    frame_ms = status.frame_ms
    slow = frame_ms is not None and frame_ms > FRAME_MS
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(clock(status.age), "bold")
    line.append(f"  lag {status.lag_ms:.0f}", "red" if status.lag_ms > 2 * FRAME_MS else "")
    line.append(f" + {status.ahead_ms:.0f} ms", "red" if status.ahead_ms > 6 * FRAME_MS else "")
    shown = "-" if frame_ms is None else f"{frame_ms:.0f}"
    line.append(f"  frame {shown}/{FRAME_MS:.0f} ms", "red" if slow else "")
    line.append(f"  you {bar(status.user_level)}  moshi {bar(status.reply_level)}")
    for name in ("dropped", "underruns", "skipped", "glitches"):
        if count := getattr(status, name):
            line.append(f"  {name} {count}", "yellow")
    return line


def bar(level: float) -> str:
    """A level meter of 8 cells: empty at -56 dBFS, 7 dB a cell."""
    lit = round(_BAR_CELLS * (1 - level / _BAR_FLOOR_DB))
    lit = min(max(lit, 0), _BAR_CELLS)
    return "▮" * lit + "▯" * (_BAR_CELLS - lit)


def make_screen() -> tuple[PlainScreen | LiveScreen, Console]:
    """The screen that stdout asks for, and a console for what loading tells."""
    if not sys.stdout.isatty():
        return PlainScreen(), Console(stderr=True, quiet=not sys.stderr.isatty())
    console = Console()
    return LiveScreen(console), console
