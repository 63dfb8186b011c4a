"""Talks of the closed world in stereo: who says what when, as sound and as words with times.

What lives here: turns put one after another on two channels, and the plans of talks to learn from and
to be judged by. What does not: the words (`world.py`), their sound (`bank.py`), files (`dialogues.py`).

The model's turns begin on a frame, `REPLY_AFTER` frames after the one in which the user ends, and so
does each of its pieces: the same words always have the same codes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from .bank import find
from .clips import Voice, load
from .kokoro import SAMPLE_RATE as RATE
from .kokoro import phonemes
from .world import (
    KEYS,
    KNOWN_FACTS,
    MOSHI_VOICE,
    SMALL_TALK,
    VALUES,
    Exchange,
    Fact,
    answered,
    asked,
    told,
)

FRAME = 1920  # samples
REPLY_AFTER = 3  # frames
ASKING = 26  # frames from where a question begins to where the value is said, about
Kind = Literal["tell", "ask", "talk", "recite", "rest"]


@dataclass(frozen=True)
class Turn:
    """What the user says, and what should be answered.

    Attributes:
        start, end: seconds.
        kind: of the turn.
        text: in words.
        reply: in words.
        pieces: seconds at which the reply's pieces begin; the last one of a fact is the value.
        key, value: of a fact, told or asked.
        cut: the second at which the user, who tells a fact, comes to its value.
    """

    start: float
    end: float
    kind: Kind
    text: str
    reply: str
    pieces: tuple[float, ...]
    key: str = ""
    value: str = ""
    cut: float = 0.0


def words(text: str, start: float, end: float) -> list[tuple[str, float, float]]:
    """A sentence's words with times, in proportion to their phonemes."""
    parts = text.split()
    sizes = [max(sum(c.isalpha() for c in phonemes(part)), 1) for part in parts]
    edges = start + (end - start) * np.cumsum([0, *sizes]) / sum(sizes)
    return [(p, float(a), float(b)) for p, a, b in zip(parts, edges[:-1], edges[1:], strict=True)]


@dataclass
class Talk:
    """Two channels that grow turn by turn.

    Args:
        bank: of clips.
        voice: of the user.
        rng: of pauses and loudness.
        mute: the model answers nothing.
        rate: of the user's voice: faster and higher, or slower and lower.
    """

    bank: Path
    voice: str
    rng: random.Random
    mute: bool = False
    rate: float = 1.0
    place: int = 0  # samples
    sides: tuple[list, list] = field(default_factory=lambda: ([], []))
    alignments: list = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    probed: frozenset[str] = frozenset()  # keys that a probe is about

    def __post_init__(self) -> None:
        self.gain = 10 ** self.rng.uniform(-0.35, 0.15)
        self.user = Voice(self.bank, self.voice, self.rate)

    @property
    def frame(self) -> int:
        """The first frame that nothing has begun in."""
        return -(-self.place // FRAME)

    def pause(self, frames: float) -> None:
        self.place += int(frames * FRAME)

    def tell(self, fact: Fact) -> None:
        sentence = self.user.tells(fact, self.rng)
        cut = self.place + sentence.cut
        text = told(fact)
        self._turn("tell", text, sentence.pcm, answered(fact), fact, cut / RATE)

    def ask(self, fact: Fact) -> None:
        text = asked(fact.key)
        self._turn("ask", text, self.user.says(text), answered(fact), fact)

    def small(self, exchange: Exchange) -> None:
        pcm = self.user.says(exchange.user)
        self._turn("talk", exchange.user, pcm, (exchange.moshi,), None)

    def recite(self, said: Fact | Exchange) -> None:
        """The model says something of itself: a fact, or its part of small talk."""
        if isinstance(said, Fact):
            key, value, pieces = *said, answered(said)
        else:
            key, value, pieces = "", "", (said.moshi,)
        self.place = self.frame * FRAME
        start, before = self.place / RATE, (self.place - REPLY_AFTER * FRAME) / RATE
        begins = self._say(pieces)
        turn = Turn(start, before, "recite", "", " ".join(pieces), begins, key, value)
        self.turns.append(turn)
        self.pause(self.rng.randint(0, 2))

    def rest(self, frames: int) -> None:
        """Nobody speaks."""
        start = self.place / RATE
        self.pause(frames)
        self.turns.append(Turn(start, self.place / RATE, "rest", "", "", ()))

    def _turn(
        self,
        kind: Kind,
        text: str,
        pcm: np.ndarray,
        reply: Sequence[str],
        fact: Fact | None,
        cut: float = 0.0,
    ) -> None:
        start, end = self.place, self.place + len(pcm)
        self.sides[1].append((start, pcm * self.gain))
        self.place = (-(-end // FRAME) + REPLY_AFTER) * FRAME
        begins = () if self.mute else self._say(reply)
        key, value = fact or ("", "")
        times = start / RATE, end / RATE
        self.turns.append(Turn(*times, kind, text, " ".join(reply), begins, key, value, cut))
        self.pause(self.rng.uniform(1, 3) if self.mute else self.rng.uniform(3, 9))

    def _say(self, pieces: Sequence[str]) -> tuple[float, ...]:
        """The model's pieces, each from a frame on; seconds at which they begin."""
        begins = []
        for piece in pieces:
            start = self.place = self.frame * FRAME
            begins.append(start / RATE)
            pcm = load(find(self.bank, MOSHI_VOICE, piece))
            self.sides[0].append((start, pcm))
            self.place += len(pcm)
            for word, begin, end in words(piece, start / RATE, self.place / RATE):
                # A little inside its frame: rounded down it would be said a frame too early.
                times = [round(begin + 0.004, 3), round(end, 3)]
                self.alignments.append([word, times, "SPEAKER_MAIN"])
        self.place = self.frame * FRAME
        return tuple(begins)

    def stereo(self, frames: int, noise: bool = True) -> np.ndarray:
        """Float32 `[frames * FRAME, 2]`: left the model, right the user, with some noise."""
        pcm = np.zeros((frames * FRAME, 2), np.float32)
        for side, clips in enumerate(self.sides):
            for start, clip in clips:
                stop = min(start + len(clip), len(pcm))
                pcm[start:stop, side] += clip[: max(stop - start, 0)]
        if noise:
            hiss = np.random.default_rng(self.rng.randrange(1 << 30)).standard_normal(len(pcm))
            pcm[:, 1] += (10 ** self.rng.uniform(-4.5, -3)) * hiss
        return np.clip(pcm, -0.99, 0.99)

    def notes(self) -> dict:
        """moshi-finetune's transcript, with the turns beside it."""
        return {"alignments": self.alignments, "turns": [asdict(turn) for turn in self.turns]}


# -- plans -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """What a talk to learn from is made of.

    Args:
        near, far: frames after which a fact is asked, first and last.
        p_near: share of near questions.
        p_fact: chance of a new fact where nothing is to be asked.
        p_pause: chance of a longer silence there.
        again: chance that a fact, once asked, is asked again.
        most: facts that wait for their question at any time.
    """

    near: tuple[int, int] = (26, 85)
    far: tuple[int, int] = (0, 0)
    p_near: float = 1.0
    p_fact: float = 0.7
    p_pause: float = 0.1
    again: float = 0.6
    most: int = 3


def _known_facts(rng: random.Random, key: str) -> Fact:
    """A fact that training may tell."""
    return rng.choice([fact for fact in KNOWN_FACTS if fact.key == key])


def chat(talk: Talk, frames: int, mix: Mix, facts=_known_facts) -> None:
    """Facts, questions, small talk and silence by chance, until `frames` are full."""
    rng, due, values = talk.rng, {}, {}

    def wait(key: str) -> None:
        first, last = mix.near if rng.random() < mix.p_near else mix.far
        due[key] = talk.frame - 8 + rng.randint(first, last) - ASKING

    talk.pause(rng.uniform(2, 12))
    while talk.frame < frames:
        first = min(due, key=due.get, default=None)
        if first is not None and due[first] <= talk.frame:
            due.pop(first)
            talk.ask(values[first])
            if rng.random() < mix.again:
                wait(first)
        elif len(due) < mix.most and rng.random() < mix.p_fact:
            key = rng.choice([key for key in KEYS if key not in due])
            values[key] = facts(rng, key)
            talk.tell(values[key])
            wait(key)
        elif rng.random() < mix.p_pause:
            talk.pause(rng.uniform(5, 40))
        else:
            talk.small(rng.choice(SMALL_TALK))


@dataclass(frozen=True)
class Deck:
    """What a denser talk is made of: some facts, said again and again in new orders, then others.

    Most of what the model says here was said before, and no user's turn lies between.

    Args:
        facts: at a time, fewest and most.
        again: how often each is said after the first time.
        p_tell: share of facts that the user tells first; the others the model says of itself.
        p_ask: share of those said again that the user asks for.
    """

    facts: tuple[int, int]
    again: int = 3
    p_tell: float = 0.15
    p_ask: float = 0.05


def deck(talk: Talk, frames: int, plan: Deck) -> None:
    """One deck of facts after another, until `frames` are full."""
    rng = talk.rng
    while talk.frame < frames:
        keys = rng.sample(KEYS, rng.randint(*plan.facts))
        chosen = [_known_facts(rng, key) for key in keys]
        for number in range(1 + plan.again):
            rng.shuffle(chosen)
            for fact in chosen:
                if rng.random() < (plan.p_ask if number else plan.p_tell):
                    (talk.ask if number else talk.tell)(fact)
                else:
                    talk.recite(fact)


def recital(talk: Talk, frames: int) -> None:
    """The model says facts and its part of small talk, one after another."""
    rng = talk.rng
    while talk.frame < frames:
        kind = rng.random()
        if kind < 0.15:
            talk.recite(rng.choice(SMALL_TALK))
        elif kind < 0.3:
            talk.rest(rng.randint(10, 40))
        else:
            talk.recite(rng.choice(KNOWN_FACTS))


def _chatter(rng: random.Random, keys: Sequence[str]) -> Iterator[Callable[[Talk], None]]:
    """Small talk, and facts that are told and asked at once, in turns."""
    while True:
        for exchange, key in zip(
            rng.sample(SMALL_TALK, len(SMALL_TALK)),
            rng.choices(keys, k=len(SMALL_TALK)),
            strict=True,
        ):
            fact = Fact(key, rng.choice(VALUES[key]))
            yield lambda talk, fact=fact: talk.tell(fact)
            if rng.random() < 0.5:
                yield lambda talk, fact=fact: talk.ask(fact)
            yield lambda talk, exchange=exchange: talk.small(exchange)


def tape(talk: Talk, frames: int) -> None:
    """One turn of the user after another, as likely as any that his voice has, and no answers."""
    rng, talk.mute, user = talk.rng, True, talk.user
    facts = [fact for fact in KNOWN_FACTS if fact.key in user.keys and fact.value in user.values]
    while talk.frame < frames:
        kind = rng.random()
        if kind < 0.6:
            talk.tell(rng.choice(facts))
        elif kind < 0.83:
            talk.ask(Fact(rng.choice(user.asks), ""))
        elif kind < 0.92:
            talk.small(rng.choice(user.small))
        else:
            talk.rest(rng.randint(10, 50))


def scripted(talk: Talk, events: Sequence[tuple[int, Fact, bool]]) -> None:
    """Facts told and asked at given frames, and around them other facts and small talk.

    Args:
        talk: a new one.
        events: frame, fact and whether it is asked; an exchange takes up to 54 frames.
    """
    mine = {fact.key for _, fact, _ in events}
    between = _chatter(talk.rng, [key for key in KEYS if key not in mine])
    for at, fact, is_question in sorted(events):
        while talk.frame < at - 54:
            next(between)(talk)
        talk.place = max(talk.place, at * FRAME)
        (talk.ask if is_question else talk.tell)(fact)


def probe(talk: Talk, distance: int, facts: Sequence[Fact]) -> None:
    """Each fact told, then asked once, `distance` frames later or up to some frames more.

    Args:
        talk: a new one.
        distance: from where the value is said first to where it is to be said again.
        facts: of different keys; the other keys belong to the chatter.
    """
    later = distance + 8  # a question is shorter than telling by so much, up to the value
    gap = 60 if later > 60 * len(facts) else later + 60
    events = [(4 + i * gap, fact, False) for i, fact in enumerate(facts)]
    events += [(at + later, fact, True) for at, fact, _ in events]
    scripted(talk, events)
