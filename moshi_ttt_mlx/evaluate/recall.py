"""Facts past the window: talks made of key-value pairs, and how many are still known when asked.

What lives here: the closed world of facts, talks to train on, probes to measure with, and counting
right answers, for the text stream of any `Lm`. What does not: training and which variants are
compared (`scripts/recall_experiment.py`).

A fact is two tokens, `key value`; a question is `? key`, and the next token should be the value told
last. All else is filler. The distance of a question is counted in tokens from the value to the key
that asks for it: attention sees it up to `window - 1`.

    world = World()
    talks = probe(random.Random(0), world, rows=32, distance=512)
    right = answers(lm, talks, window=32)           # bool, one for each question
    right[talks.far].mean()
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np
from moshi_mlx.models import Lm

from ..layers import make_memory_cache
from ..memory import Mode
from ..train.loss import hidden_states, prepare

# Tokens 0..3 are SentencePiece's and the padding.
FIRST_TOKEN = 4
# Tokens of a talk that go through the model at a time.
PIECE = 512

Variant = Literal["plain", "overwritten", "noise"]


@dataclass(frozen=True)
class World:
    """Keys, values and fillers, in this order of tokens; the last token asks.

    Args:
        keys, values, fillers: how many of each.
    """

    keys: int = 24
    values: int = 24
    fillers: int = 8

    @property
    def vocabulary(self) -> int:
        """Tokens in all."""
        return self.ask + 1

    @property
    def ask(self) -> int:
        """The token of a question."""
        return FIRST_TOKEN + self.keys + self.values + self.fillers

    @property
    def chance(self) -> float:
        """Share of right answers of one that knows what a value is, and nothing else."""
        return 1 / self.values

    def key(self, index: int) -> int:
        return FIRST_TOKEN + index

    def value(self, index: int) -> int:
        return FIRST_TOKEN + self.keys + index

    def filler(self, index: int) -> int:
        return FIRST_TOKEN + self.keys + self.values + index


@dataclass(frozen=True)
class Mix:
    """What a talk is made of.

    Args:
        near, far: distances at which a fact is asked, first and last.
        p_near: share of near questions.
        p_fact: chance that a free place holds a new fact rather than a filler.
        again: chance that a fact, once asked, is asked again.
        most: facts told and still to be asked at any time.
    """

    near: tuple[int, int]
    far: tuple[int, int] = (0, 0)
    p_near: float = 1.0
    p_fact: float = 0.2
    again: float = 0.6
    most: int = 24


class Talks(NamedTuple):
    """Talks of equal length.

    Attributes:
        inputs: int32 `[B, T]`.
        targets: int32 `[B, T]`: the value where a question was just asked, else -1.
        distances: int32 `[B, T]`: of that question, else 0.
        far: bool `[B, T]`: questions that a probe was made for.
        told: tokens until the last of those facts was told, in every row, and before any is asked.
    """

    inputs: np.ndarray
    targets: np.ndarray
    distances: np.ndarray
    far: np.ndarray
    told: int = 0


class Event(NamedTuple):
    """Something that has its place: a fact (`value` is given) or a question."""

    place: int
    key: int
    value: int | None = None


@dataclass
class _Row:
    """One talk while it is written."""

    rng: random.Random
    world: World
    tokens: int
    known: dict[int, tuple[int, int]] = field(default_factory=dict)  # key -> value, its place

    def __post_init__(self):
        draw = self.rng.choices(range(self.world.fillers), k=self.tokens)
        self.inputs = np.array([self.world.filler(i) for i in draw], np.int32)
        self.targets = np.full(self.tokens, -1, np.int32)
        self.distances = np.zeros(self.tokens, np.int32)
        self.far = np.zeros(self.tokens, bool)

    def tell(self, place: int, key: int, value: int) -> int:
        self.inputs[place : place + 2] = self.world.key(key), self.world.value(value)
        self.known[key] = value, place + 1
        return place + 2

    def ask(self, place: int, key: int) -> int:
        self.inputs[place] = self.world.ask
        self.expect(place + 1, key)
        # The answer tells the fact again.
        return self.tell(place + 1, key, self.known[key][0])

    def expect(self, place: int, key: int) -> None:
        """The next token after the one at `place`, which is the key, is a question's answer."""
        value, told = self.known[key]
        self.targets[place], self.distances[place] = self.world.value(value), place - told

    def put(self, event: Event) -> int:
        if event.value is None:
            self.far[event.place + 1] = True
            return self.ask(event.place, event.key)
        return self.tell(event.place, event.key, event.value)

    def chat(self, mix: Mix, keys: Sequence[int], events: Iterable[Event] = ()) -> None:
        """Fill the talk: the events in their places, and around them facts and questions by chance."""
        rng, place, due = self.rng, 0, {}  # due: key -> where it is to be asked
        for event in [*events, Event(self.tokens, 0)]:
            while event.place - place >= 3:
                first = min(due, key=due.get, default=None)
                if first is not None and due[first] <= place:
                    due.pop(first)
                    place = self.ask(place, first)
                    if rng.random() < mix.again:
                        due[first] = self._due(place, mix)
                elif len(due) < min(mix.most, len(keys)) and rng.random() < mix.p_fact:
                    key = rng.choice([k for k in keys if k not in due])
                    place = self.tell(place, key, rng.randrange(self.world.values))
                    due[key] = self._due(place, mix)
                else:
                    place += 1
            if event.place < self.tokens:
                place = self.put(event)

    def _due(self, place: int, mix: Mix) -> int:
        """Where to ask a fact whose value stands just before `place`."""
        first, last = mix.near if self.rng.random() < mix.p_near else mix.far
        return place - 2 + self.rng.randint(first, last)  # the key follows the question mark

    def deck(self) -> None:
        """Decks of facts, each told twice in a new order; the second time is a question."""
        place, rng = 0, self.rng
        while True:
            facts = rng.sample(range(self.world.keys), rng.randint(3, 7))
            for again in (False, True):
                rng.shuffle(facts)
                for key in facts:
                    if place + 2 > self.tokens:
                        return
                    value = rng.randrange(self.world.values)
                    if again:
                        self.expect(place, key)
                        value = self.known[key][0]
                    place = self.tell(place, key, value)


def _stacked(rows: Sequence[_Row], told: int = 0) -> Talks:
    names = ("inputs", "targets", "distances", "far")
    return Talks(*(np.stack([getattr(row, name) for row in rows]) for name in names), told)


def talks(rng: random.Random, world: World, rows: int, tokens: int, mix: Mix) -> Talks:
    """Talks to train on: facts come and are asked by chance."""
    written = [_Row(rng, world, tokens) for _ in range(rows)]
    for row in written:
        row.chat(mix, range(world.keys))
    return _stacked(written)


def decks(rng: random.Random, world: World, rows: int, tokens: int) -> Talks:
    """Denser talks to begin with: decks of facts, told twice, the second time in a new order.

    On questions alone a small model sits for long on a plateau before it finds out how to copy.
    """
    written = [_Row(rng, world, tokens) for _ in range(rows)]
    for row in written:
        row.deck()
    return _stacked(written)


def probe(
    rng: random.Random,
    world: World,
    rows: int,
    distance: int,
    variant: Variant = "plain",
    facts: int = 12,
) -> Talks:
    """Talks that ask each of some facts once, at one distance; see `Talks.far`.

    Args:
        rng: the same seed, the same talks.
        world: of tokens.
        rows: talks.
        distance: of the questions; the facts are told within the first 0.8 of it.
        variant: `plain` tells other facts all the while and asks them inside the window,
            `overwritten` tells each fact twice, with another value first, `noise` has nothing but
            filler between the facts and their questions.
        facts: to be asked, of the world's keys; the others belong to the chatter.

    Raises:
        ValueError: a distance too short to hold the facts.
    """
    gap = int(0.8 * distance) // (facts * (2 if variant == "overwritten" else 1))
    if gap < 3:
        raise ValueError(f"[probe] {facts} facts do not fit into 0.8 of {distance} tokens")
    if variant == "noise":
        gap = min(gap, 16)
    told = gap * facts * (2 if variant == "overwritten" else 1)
    tokens = -(-(told + distance + 3) // 16) * 16
    near = Mix(near=(2, 28), p_fact=0.0 if variant == "noise" else 0.2)
    written = [_Row(rng, world, tokens) for _ in range(rows)]
    for row in written:
        keys = rng.sample(range(world.keys), world.keys)
        events = _probe_events(rng, world, keys[:facts], gap, distance, variant)
        row.chat(near, keys[facts:], events)
    return _stacked(written, told)


def _probe_events(rng, world, keys, gap, distance, variant) -> list[Event]:
    events, start = [], 0
    if variant == "overwritten":
        for i, key in enumerate(rng.sample(keys, len(keys))):
            events.append(Event(i * gap, key, rng.randrange(world.values)))
        start = len(keys) * gap
    for i, key in enumerate(keys):
        place = start + i * gap
        events.append(Event(place, key, rng.randrange(world.values)))
        events.append(Event(place + distance, key))  # its key stands `distance` behind the value
    return sorted(events)


def answers(
    lm: Lm,
    talks: Talks,
    window: int,
    mode: Mode = "on",
    shuffle: bool = False,
) -> np.ndarray:
    """Which questions are answered right: bool `[B, T]`, False where none is asked.

    Args:
        lm: a model, with or without a memory.
        talks: of its world.
        window: keys that attention sees.
        mode: of the memory.
        shuffle: each row goes on with its neighbour's memory once all facts have been told.
    """
    prepare(lm)
    batch, tokens = talks.inputs.shape
    caches = make_memory_cache(lm.transformer, window, batch=batch, mode=mode)
    said, place = [], 0
    while place < tokens:
        if shuffle and place == talks.told:
            _roll_memories(caches)
        stop = talks.told if place < talks.told else tokens
        stop = min(place + PIECE, stop)
        piece = mx.array(talks.inputs[:, None, place:stop])
        hidden = hidden_states(lm, piece, lambda xs: lm.transformer(xs, cache=caches))
        said.append(np.array(mx.argmax(lm.text_linear(hidden), axis=-1)))
        mx.eval([cache.self_attn.state for cache in caches])
        place = stop
    return np.concatenate(said, axis=1) == talks.targets  # no token is -1


def _roll_memories(caches) -> None:
    for cache in caches:
        memory = getattr(cache.self_attn, "memory", None)
        if memory is not None:
            state = {name: mx.roll(array, 1, axis=0) for name, array in memory.state.items()}
            memory.load_state(state, memory.meta_state)
