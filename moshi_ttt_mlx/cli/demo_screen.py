"""How the demo's talk is printed: the user's turns, and below each what every run said to it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..demo.record import Record
from ..demo.story import CHANCE, Left, Passage, Question
from ..transcript import NAMES, USER, Word, clock

WIDEST = 120
"""Columns beyond which two columns are too far apart to compare."""

_TIME = 7  # columns of the time and the spaces behind it
NOTHING = "(nothing)"


class Page:
    """Prints a talk.

    Args:
        console: on stdout; into a pipe 80 columns.
        runs: names of the talks, a column each.
    """

    def __init__(self, console: Console, runs: list[str]):
        self.console, self.runs = console, runs
        self._width = min(console.width, WIDEST)
        # A pipe may not know more than ASCII.
        self._marks = ("+", "x") if console.options.ascii_only else ("✓", "✗")

    def head(self) -> None:
        """The names of the columns."""
        self._row("", [Text(run, "bold") for run in self.runs])

    def note(self, text: str) -> None:
        """One line that is not of the talk."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def passage(self, passage: Passage) -> None:
        """The user's turn, the replies side by side, and what left the window meanwhile."""
        if passage.turn is not None:
            turn = passage.turn
            line = Text.assemble((f"{NAMES[USER]}: ", "cyan"), turn.text)
            if passage.question is not None:
                line.append(f"  ({_distance(passage.question)})", "dim")
            self._row(clock(turn.start), [line])
        if passage.question is not None or any(passage.replies.values()):
            self._row("", [self._reply(passage, run) for run in self.runs])
        for left in passage.left:
            self._row("", [Text(left_line(left), "dim")])

    def _reply(self, passage: Passage, run: str) -> Text:
        words = passage.replies[run]
        text = Text()
        if words:
            text.append(f"{clock(words[0].start)} ", "dim").append(spoken(words))
        elif passage.question is not None:
            text.append(NOTHING, "dim")
        if passage.question is not None:
            right = passage.question.right[run]
            mark, word = self._marks[not right], "right" if right else "wrong"
            text.append(f" {mark} {word}", "bold green" if right else "bold red")
        return text

    def _row(self, time: str, cells: list[Text]) -> None:
        """A time and as many columns of equal width as there are cells."""
        table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(width=_TIME - 1, justify="right")
        for _ in cells:
            table.add_column(width=(self._width - _TIME) // len(cells) - 1)
        table.add_row(Text(time, "dim"), *cells)
        self.console.print(table)

    def summary(self, record: Record, seconds: float) -> None:
        """How many questions were answered right, inside the window and beyond it, and how fast."""
        self.console.print()
        self.console.print(self._table(record.questions))
        lines = [f"{clock(record.seconds)} of talk"]
        lines.append(f"{'both runs' if len(self.runs) > 1 else 'one run'} in {seconds:.0f} s")
        lines.append(f"{record.seconds / max(seconds, 1e-9):.1f}x real time")
        lines.append(f"a window is {record.window.frames} frames, {record.window.seconds:.1f} s")
        self.console.print(", ".join(lines), style="dim", markup=False)

    def _table(self, questions: list[Question]) -> Table:
        table = Table("questions", box=None, padding=(0, 2, 0, 0), header_style="bold")
        for title in ("asked", "windows ago", *self.runs, "chance"):
            table.add_column(title, justify="right")
        kinds = {"inside the window": False, "beyond the window": True}
        for name, beyond in kinds.items():
            asked = [question for question in questions if question.beyond == beyond]
            rights = [_share(asked, run) for run in self.runs]
            table.add_row(name, str(len(asked)), self._span(asked), *rights, f"{CHANCE:.1%}")
        return table

    def _span(self, questions: list[Question]) -> str:
        """The nearest and the farthest."""
        if not questions:
            return ""
        near, far = (f(q.windows_ago for q in questions) for f in (min, max))
        return f"{near:.1f} to {far:.1f}"

    def files(self, folder: Path) -> None:
        """What there is to look at now."""
        names = "  ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
        self.console.print(f"{folder}/: {names}", style="dim", markup=False)


def spoken(words: list[Word]) -> str:
    """Words as a line."""
    return " ".join(word.text for word in words)


def left_line(left: Left) -> str:
    """When a fact was told and when it left the window."""
    again = f", last said at {clock(left.said)}" if left.said - left.told > 10 else ""
    where = f"told at {clock(left.told)}{again}, left the window at {clock(left.at)}"
    return f"{left.key}: {where}"


def _distance(question: Question) -> str:
    place = f"last said {question.windows_ago:.1f} windows ago"
    if not question.beyond:
        place = "still in the window"
    return f"told at {clock(question.told)}, {place}"


def _share(asked: list[Question], run: str) -> str:
    if not asked:
        return ""
    right = sum(question.right[run] for question in asked)
    return f"{right} ({right / len(asked):.0%})"
