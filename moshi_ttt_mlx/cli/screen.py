"""What a live talk shows: words as they come over a status line, or words alone into a pipe."""

import sys
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..audio import FRAME_MS
from ..live import MemoryStatus, Status
from ..transcript import NAMES, clock
from .keys import Keys, foreground_terminal

PAUSE_SECONDS = 2.0
"""A pause this long begins a new paragraph."""

PARAGRAPH_CHARS = 200
"""A paragraph ends at the next word after so many: the live part of the screen stays small."""

KEYS = {"m": "mute", "p": "pause", "s": "save", "q": "quit"}

_BAR_CELLS = 8
_BAR_FLOOR_DB = -56.0


class PlainScreen:
    """For pipes: words to stdout, warnings to stderr, nothing else; a name where the speaker changes."""

    def __init__(self):
        self._errors = Console(stderr=True, soft_wrap=True)
        self._begun: dict[str, str] = {}
        self._speaker = ""

    def __enter__(self) -> "PlainScreen":
        return self

    def __exit__(self, *_: object) -> None:
        for speaker in self._begun:
            self._print_word(speaker)
        if self._speaker:
            print(flush=True)

    def note(self, message: str) -> None:
        """Nothing: a note is for people."""

    def warn(self, message: str) -> None:
        self._errors.print(f"warning: {message}", markup=False, highlight=False)

    def tell(self, message: str) -> None:
        """Good news, for whoever reads the warnings."""
        self._errors.print(message, markup=False, highlight=False)

    def said(self, text: str, _time: float, speaker: str) -> None:
        """Words as they come; once there are two speakers each word is whole before it is printed."""
        self._begun.setdefault(speaker, "")
        if text.startswith(" "):
            self._print_word(speaker)
        self._begun[speaker] += text
        if len(self._begun) == 1:
            self._print_word(speaker)

    def _print_word(self, speaker: str) -> None:
        word, self._begun[speaker] = self._begun[speaker], ""
        if not word:
            return
        if self._speaker not in ("", speaker):
            print(f"\n{NAMES[speaker]}:", end="")
        print(word, end="", flush=True)
        self._speaker = speaker

    def show(self, status: Status) -> None:
        """Nothing: a status line is for people."""


@dataclass
class _Paragraph:
    """One speaker's words without a pause: when they began, and when the latest came."""

    words: str
    began: float
    latest: float


class LiveScreen:
    """For terminals: paragraphs with their time, and below them what the talk is doing.

    Each speaker has a paragraph of its own that grows; names are shown once there are two.

    Args:
        console: on stdout.
        has_keys: whether keys are read, so that they are worth showing.
    """

    def __init__(self, console: Console, has_keys: bool = False):
        self._console, self._has_keys = console, has_keys
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._open: dict[str, _Paragraph] = {}
        self._speakers: set[str] = set()

    def __enter__(self) -> "LiveScreen":
        return self

    def __exit__(self, *_: object) -> None:
        for speaker in list(self._open):
            self._end_paragraph(speaker)
        self._live.stop()

    def note(self, message: str) -> None:
        self._console.print(message, style="dim", markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self._console.print(message, style="yellow", markup=False, highlight=False)

    def tell(self, message: str) -> None:
        self._console.print(message, style="green", markup=False, highlight=False)

    def said(self, text: str, time: float, speaker: str) -> None:
        """Words with their time in the talk; a paragraph that is over scrolls up."""
        self._speakers.add(speaker)
        begun = self._open.get(speaker)
        if begun and text.startswith(" "):
            full = len(begun.words) > PARAGRAPH_CHARS
            if full or time - begun.latest > PAUSE_SECONDS:
                self._end_paragraph(speaker)
        paragraph = self._open.setdefault(speaker, _Paragraph("", time, time))
        paragraph.words += text
        paragraph.latest = time

    def show(self, status: Status) -> None:
        """Draw the paragraphs that grow and the lines below them."""
        self._live.start()  # here, not before: loading has its own live line
        lines = [status_line(status), memory_line(status)]
        if self._has_keys:
            lines.append(key_line(status))
        for line in lines:
            # The terminal writes ^C behind it: on a full line that would begin a new one.
            line.truncate(self._console.width - len("^C") - 1, overflow="ellipsis")
        paragraphs = [self._paragraph(speaker) for speaker in self._open]
        self._live.update(Group(*paragraphs, *lines), refresh=True)

    def _paragraph(self, speaker: str) -> Text:
        paragraph = self._open[speaker]
        name = f"{NAMES[speaker]} " if len(self._speakers) > 1 else ""
        head = (f"{clock(paragraph.began)} ", "dim"), (name, "cyan")
        return Text.assemble(*head, paragraph.words.strip())

    def _end_paragraph(self, speaker: str) -> None:
        self._live.update("")
        self._console.print(self._paragraph(speaker))
        del self._open[speaker]


def status_line(status: Status) -> Text:
    """Age, lag (before the model + before the loudspeaker), frame time, levels, what went wrong."""
    frame_ms = status.frame_ms
    slow = frame_ms is not None and frame_ms > FRAME_MS
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{_state(status)}  " if _state(status) else "", "bold yellow")
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


def _state(status: Status) -> str:
    """Why it may be silent, when somebody wanted it so or a device is gone."""
    if status.waiting_for is not None:
        return f"WAITING FOR {status.waiting_for}"
    if status.paused:
        return "PAUSED"
    if status.muted:
        return "MUTED"
    return "SPEAK FIRST" if status.hushed else ""


def memory_line(status: Status) -> Text:
    """How much of the talk attention sees, and how the memory beside it fares."""
    line = Text(style="dim", no_wrap=True, overflow="ellipsis")
    line.append(f"window {status.filled}/{status.window}")
    memory = status.memory
    if memory is not None:
        line.append(f"  memory {_memory(memory)}")
    return line


def _memory(memory: MemoryStatus) -> str:
    if not memory.layers:
        return "off"
    norms = f"step {memory.step:.2g}  drift {memory.drift:.2g}  gate {memory.gate:.2g}"
    return f"{memory.layers} layers  {memory.updates} updates  {norms}"


def key_line(status: Status) -> Text:
    """The keys and what they do now."""
    now = {"m": "unmute"} if status.muted else {}
    now |= {"p": "go on"} if status.paused else {}
    line = Text(no_wrap=True, overflow="ellipsis")
    for key, does in (KEYS | now).items():
        line.append(key, "bold").append(f" {does}   ", "dim")
    return line


def bar(level: float) -> str:
    """A level meter of 8 cells: empty at -56 dBFS, 7 dB a cell."""
    lit = round(_BAR_CELLS * (1 - level / _BAR_FLOOR_DB))
    lit = min(max(lit, 0), _BAR_CELLS)
    return "▮" * lit + "▯" * (_BAR_CELLS - lit)


def make_screen() -> tuple[PlainScreen | LiveScreen, Console, Keys]:
    """The screen that stdout asks for, a console for what loading tells, and the keys, if any."""
    if not sys.stdout.isatty():
        return PlainScreen(), Console(stderr=True, quiet=not sys.stderr.isatty()), Keys(None)
    console = Console()
    keys = Keys(foreground_terminal(sys.stdin), console.show_cursor)
    return LiveScreen(console, has_keys=keys.fd is not None), console, keys
