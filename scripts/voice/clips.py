"""What the bank has of one voice: sentences, halves of them that can be put together anew, and wear."""

import json
import random
from collections import defaultdict
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from .bank import find
from .kokoro import SAMPLE_RATE
from .world import ALL_VALUES, KEYS, SMALL_TALK, Exchange, Fact, asked, told


class Sentence(NamedTuple):
    """Sound of a told fact.

    Attributes:
        pcm: float32 `[N]`.
        cut: the sample at which "is" and the value begin.
    """

    pcm: np.ndarray
    cut: int


@cache
def load(path: Path) -> np.ndarray:
    """A clip, float32 `[N]`."""
    return soundfile.read(path, dtype="float32")[0]


@cache
def cut_of(path: Path) -> int | None:
    """Where "is" begins in "Remember, my .. is ..": behind the third space."""
    symbols = json.loads(path.with_suffix(".json").read_text())["symbols"]
    spaces = [end for symbol, _, end in symbols if symbol == " "]
    return spaces[2] if len(spaces) == 4 else None  # espeak-ng wrote two words as one


def worn(pcm: np.ndarray, rng: random.Random) -> np.ndarray:
    """As other microphones and rooms would hear it: brighter or darker, and noise half of the time."""
    tilt = rng.uniform(-0.4, 0.4)
    pcm = (pcm + tilt * np.append(np.float32(0), pcm[:-1])) / (1 + abs(tilt))
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(len(pcm))
        pcm = pcm + 10 ** rng.uniform(-4, -2.5) * noise
    return pcm.astype(np.float32)


class Voice:
    """A user's clips.

    Args:
        bank: folder of clips.
        name: of the voice.
        rate: faster and higher, or slower and lower.
    """

    def __init__(self, bank: Path, name: str, rate: float = 1.0):
        self.bank, self.name, self.rate = bank, name, rate
        self.keys: dict[str, list[Path]] = defaultdict(list)
        self.values: dict[str, list[Path]] = defaultdict(list)
        for key in KEYS:
            for value in ALL_VALUES:
                path = find(bank, name, told(Fact(key, value)))
                if path.exists() and cut_of(path):
                    self.keys[key].append(path)
                    self.values[value].append(path)

    @cached_property
    def asks(self) -> list[str]:
        """Keys that the voice asks for."""
        return [key for key in KEYS if find(self.bank, self.name, asked(key)).exists()]

    @cached_property
    def small(self) -> list[Exchange]:
        """Small talk that it has."""
        return [e for e in SMALL_TALK if find(self.bank, self.name, e.user).exists()]

    def says(self, text: str) -> np.ndarray:
        """A whole sentence, float32 `[N]`."""
        return self._at_rate(load(find(self.bank, self.name, text)))

    def tells(self, fact: Fact, rng: random.Random) -> Sentence:
        """A fact: as it was said in one breath if it was, else of two halves."""
        whole = find(self.bank, self.name, told(fact))
        heads, tails = self.keys[fact.key], self.values[fact.value]
        if whole in heads and rng.random() < 0.5:
            heads = tails = [whole]
        head, tail = rng.choice(heads), rng.choice(tails)
        first, second = load(head)[: cut_of(head)], load(tail)[cut_of(tail) :]
        first, second = self._at_rate(first), self._at_rate(second)
        return Sentence(np.concatenate([first, second]), len(first))

    def _at_rate(self, pcm: np.ndarray) -> np.ndarray:
        if self.rate == 1.0:
            return pcm
        return soxr.resample(pcm, SAMPLE_RATE * self.rate, SAMPLE_RATE, quality="HQ")
