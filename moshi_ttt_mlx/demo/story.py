"""The talk passage by passage: what was said to what, was it right, what has left the window.

What lives here: :class:`Story`, which goes along with the talk. What does not: how words come about
(`transcript.py`), and how a passage looks (`cli/demo_screen.py`, `picture.py`).

A fact is in the window while attention still sees the last frame in which either side said it: the
user who told it, or Moshi, in any of the runs, who repeated it. So `beyond` means that no attention,
in no run, can look it up.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..audio import FRAME_SECONDS
from ..transcript import Transcript, Word
from .turns import Turn

CHANCE = 1 / 8
"""Right answers of who knows the question alone: a key has eight values (`scripts/voice/world.py`)."""

EARLY_SECONDS = 0.24
"""An answer may begin so long before the end of the question's sound."""

SETTLED_SECONDS = 1.0
"""A passage is told when it has been over for so long: a word may have several pieces."""


@dataclass(frozen=True)
class Window:
    """What attention sees.

    Args:
        frames: of its window.
        lag: frames after which a frame's last code is read: the largest delay and one.
    """

    frames: int
    lag: int

    @property
    def seconds(self) -> float:
        return self.frames * FRAME_SECONDS

    def left(self, said: float) -> float:
        """Seconds at which sound that ends at `said` is in no frame that attention sees."""
        last = math.ceil(round(said / FRAME_SECONDS, 6)) - 1
        return (last + self.lag + self.frames) * FRAME_SECONDS


@dataclass(frozen=True)
class Left:
    """A fact left the window.

    Attributes:
        key, value: of it.
        told: seconds at which the user began to tell it.
        since: seconds from which on it was in the window without a gap.
        said: seconds at which it was last said by anybody.
        at: seconds at which it left.
    """

    key: str
    value: str
    told: float
    since: float
    said: float
    at: float


@dataclass(frozen=True)
class Question:
    """What was asked, and how it was answered.

    Attributes:
        turn: the user's.
        told, said: as in `Left`, before the question.
        windows_ago: from `said` to the question, in windows.
        beyond: the fact had left the window when the question began.
        right: by run: the value was named, and no other value of the talk.
    """

    turn: Turn
    told: float
    said: float
    windows_ago: float
    beyond: bool
    right: dict[str, bool]


@dataclass(frozen=True)
class Passage:
    """The user's turn and what was said to it.

    Attributes:
        turn: None for what was said before the user's first.
        replies: words by run, in order.
        question: of a turn that asks.
        left: facts that left the window meanwhile.
    """

    turn: Turn | None
    replies: dict[str, list[Word]]
    question: Question | None
    left: list[Left]


@dataclass
class _Fact:
    value: str
    told: float
    since: float
    said: float
    left: bool = False


def plain(words: Iterable[str]) -> list[str]:
    """Words without punctuation and case, as they are compared."""
    return list(filter(None, (re.sub(r"[^\w']", "", word).casefold() for word in words)))


def place_of(phrase: str, words: Sequence[Word]) -> int | None:
    """Index of the word with which a phrase (a value may be two words) first ends, or None."""
    said = [(index, word) for index, w in enumerate(words) for word in plain([w.text])]
    wanted = plain(phrase.split())
    for first in range(len(said) - len(wanted) + 1):
        if [word for _, word in said[first : first + len(wanted)]] == wanted:
            return said[first + len(wanted) - 1][0]
    return None


@dataclass
class Story:
    """Goes along with a talk.

    Args:
        turns: all of the user's.
        runs: names of the talks, which are the speakers of their words.
        window: of both.
    """

    turns: list[Turn]
    runs: Sequence[str]
    window: Window
    _told: int = 0
    _ended: float = math.inf
    _facts: dict[str, _Fact] = field(default_factory=dict)

    def advance(self, now: float, transcript: Transcript) -> list[Passage]:
        """The passages that are over by now and were not told before.

        Args:
            now: seconds that all runs have reached; infinity at the end of the talk.
            transcript: the words of all runs.
        """
        passages = []
        while self._told <= len(self.turns) and now >= self._end(self._told) + SETTLED_SECONDS:
            passages.append(self._passage(transcript.words))
            self._told += 1
        return [p for p in passages if p.turn or any(p.replies.values())]

    def stop(self, now: float, transcript: Transcript) -> list[Passage]:
        """What is left of a talk that ends at `now`: turns that it has heard to their end."""
        self.turns, self._ended = [turn for turn in self.turns if turn.end <= now], now
        return self.advance(math.inf, transcript)

    def _end(self, passage: int) -> float:
        """Where a passage's replies end: the next turn's may begin. Passage 0 is before all turns."""
        if passage < len(self.turns):
            return self.turns[passage].end - EARLY_SECONDS
        return math.inf

    def _passage(self, words: list[Word]) -> Passage:
        start = self._end(self._told - 1) if self._told else 0.0
        end = self._end(self._told)
        replies = {
            run: [w for w in words if w.speaker == run and start <= w.start < end]
            for run in self.runs
        }
        turn = self.turns[self._told - 1] if self._told else None
        question = None
        if turn is not None and turn.kind == "ask":
            question = self._question(turn, replies)
        return Passage(turn, replies, question, self._follow(turn, replies, end))

    def _question(self, turn: Turn, replies: dict[str, list[Word]]) -> Question:
        fact = self._facts[turn.key]
        right = {run: self._is_right(turn.value, words) for run, words in replies.items()}
        windows_ago = (turn.start - fact.said) / self.window.seconds
        beyond = self.window.left(fact.said) <= turn.start
        return Question(turn, fact.told, fact.said, windows_ago, beyond, right)

    def _is_right(self, value: str, words: list[Word]) -> bool:
        others = {turn.value for turn in self.turns} - {value, ""}
        named = place_of(value, words) is not None
        return named and all(place_of(other, words) is None for other in others)

    def _follow(self, turn: Turn | None, replies: dict[str, list[Word]], end: float) -> list[Left]:
        """Note who said which fact when, and which facts left the window before they were said."""
        left = []
        if turn is not None and turn.kind == "tell":
            left += self._leaving(turn.start)
            self._facts[turn.key] = _Fact(turn.value, turn.start, turn.start, turn.end)
        for time, key in sorted(self._mentions(replies)):
            left += self._leaving(time)
            fact = self._facts[key]
            if fact.left:
                fact.since, fact.left = time, False
            fact.said = max(fact.said, time)
        return left + self._leaving(min(end, self._ended))

    def _mentions(self, replies: dict[str, list[Word]]) -> list[tuple[float, str]]:
        """When a fact was said by Moshi, key and value: `(seconds, key)`."""
        found = []
        for words in replies.values():
            for key, fact in self._facts.items():
                place = place_of(fact.value, words)
                if place is not None and place_of(key, words) is not None:
                    found.append((words[place].end, key))
        return found

    def _leaving(self, until: float) -> list[Left]:
        left = []
        for key, fact in self._facts.items():
            at = self.window.left(fact.said)
            if at <= until and not fact.left:
                fact.left = True
                left.append(Left(key, fact.value, fact.told, fact.since, fact.said, at))
        return sorted(left, key=lambda one: one.at)
