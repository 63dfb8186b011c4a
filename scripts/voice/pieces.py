"""What the codec learns from: clips of the bank, one after another, and what is said when in them."""

import json
import random
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from .clips import worn
from .kokoro import SAMPLE_RATE
from .talks import FRAME
from .world import HELD_OUT_VOICES, MOSHI_VOICE

FRAMES = 32  # of a piece of sound to learn from: 2.56 s
SUB_FRAMES = 3  # phonemes a frame, the last of them 53 ms before the frame's end
UNKNOWN = -100  # what the losses leave out
STRESS = "ˈˌ"  # marks in front of a vowel: its own time


class Vocabulary:
    """Symbols as numbers, in the order in which they come; 0 is silence."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, symbol: str) -> int:
        return self.ids.setdefault(symbol, 1 + len(self.ids))


@dataclass
class Clip:
    """A piece of speech.

    Attributes:
        pcm: float32 `[N]`.
        phonemes: numbers and the samples at which they end; None where nobody knows.
        words: the same of words.
    """

    pcm: np.ndarray
    phonemes: tuple[np.ndarray, np.ndarray] | None = None
    words: tuple[np.ndarray, np.ndarray] | None = None

    def at_rate(self, rate: float) -> "Clip":
        """Faster and higher, or slower and lower."""
        pcm = soxr.resample(self.pcm, SAMPLE_RATE * rate, SAMPLE_RATE, quality="HQ")
        spans = [
            None if part is None else (part[0], part[1] / rate)
            for part in (self.phonemes, self.words)
        ]
        return Clip(pcm, *spans)


class Labels:
    """Reads what the bank knows of its clips."""

    def __init__(self) -> None:
        self.phonemes, self.words = Vocabulary(), Vocabulary()

    def clip(self, path: Path) -> Clip:
        pcm = soundfile.read(path, dtype="float32")[0]
        notes = path.with_suffix(".json")
        if not notes.exists():
            return Clip(pcm)
        about = json.loads(notes.read_text())
        said = [(s, end) for s, _, end in about["symbols"] if s not in STRESS]
        names = re.findall(r"\w+", about["text"].lower())
        ends = self._word_ends(said)
        numbers = np.array([self.phonemes(s if s.isalpha() else " ") for s, _ in said])
        phonemes = numbers, np.array([end for _, end in said])
        # espeak-ng writes some words as one.
        if len(ends) != len(names):
            return Clip(pcm, phonemes)
        return Clip(pcm, phonemes, (np.array([self.words(n) for n in names]), np.array(ends)))

    @staticmethod
    def _word_ends(said: list[tuple[str, int]]) -> list[int]:
        """Samples at which words end: the last letter before anything else."""
        letters = pairwise([*(s.isalpha() for s, _ in said), False])
        return [
            end for (_, end), (now, then) in zip(said, letters, strict=True) if now and not then
        ]


def read_clips(bank: Path, labels: Labels, seed: int) -> tuple[list[Clip], list[Clip]]:
    """The model's own voice, and the users': each of them at two more speeds, and so pitches."""
    own, users, rng = [], [], random.Random(seed)
    for path in sorted(bank.glob("*/*.flac")):
        if path.parent.name in HELD_OUT_VOICES:
            continue
        clip = labels.clip(path)
        if path.parent.name == MOSHI_VOICE:
            own.append(clip)
            continue
        users += [clip, *(clip.at_rate(rng.uniform(0.82, 1.2)) for _ in range(2))]
    return own, users


class Piece:
    """Sound `[FRAMES * FRAME]` with a clip or more in it, and what is said in each frame.

    Attributes:
        pcm: float32.
        phonemes: int64 `[FRAMES, SUB_FRAMES]`.
        words: int64 `[FRAMES]`; a word stands in the frame after the one that it ends in.
    """

    def __init__(self) -> None:
        self.pcm = np.zeros(FRAMES * FRAME, np.float32)
        self._grid = np.zeros(1 + FRAMES * SUB_FRAMES, np.int64)
        self.words = np.full(FRAMES, UNKNOWN)

    @property
    def phonemes(self) -> np.ndarray:
        return self._grid[:-1].reshape(FRAMES, SUB_FRAMES)

    def put(self, clip: Clip, place: int, gain: float) -> None:
        """Add a clip; what lies beyond the end is cut off."""
        end = min(place + len(clip.pcm), len(self.pcm))
        self.pcm[place:end] += gain * clip.pcm[: end - place]
        step = FRAME // SUB_FRAMES
        times = (np.arange(len(self._grid)) - 1) * step
        inside = (times >= place) & (times < place + len(clip.pcm))
        if clip.phonemes is None:
            self._grid[inside] = UNKNOWN
        else:
            numbers, ends = clip.phonemes
            where = np.searchsorted(ends, times[inside] - place, side="right")
            self._grid[inside] = np.append(numbers, 0)[where]
        if clip.words is not None:
            frames = ((clip.words[1] + place) // FRAME + 1).astype(int)
            fits = frames < FRAMES
            self.words[frames[fits]] = clip.words[0][fits]


def piece(own: list[Clip], users: list[Clip], rng: random.Random, own_share: float) -> Piece:
    """Clips of the model or of users at random, one after another."""
    made, mine = Piece(), rng.random() < own_share
    clips, place = own if mine else users, rng.randrange(FRAME * 6)
    # The model's own words begin on a frame, so that the same words have the same codes.
    place = place // FRAME * FRAME if mine else place
    gain = 1.0 if mine else 10 ** rng.uniform(-0.5, 0.25)
    while place < (FRAMES - 8) * FRAME:
        clip = rng.choice(clips)
        made.put(clip, place, gain)
        place += len(clip.pcm) + rng.randrange(FRAME * 4)
        place = -(-place // FRAME) * FRAME if mine else place
    if not mine:
        made.pcm = worn(made.pcm, rng)
    made.pcm = np.clip(made.pcm, -1, 1)
    return made


def batch_of(pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Sound `[B, 1, FRAMES * FRAME]`, phonemes and words, as a piece has them."""
    pcm = torch.from_numpy(np.stack([p.pcm for p in pieces]))[:, None]
    phonemes = torch.from_numpy(np.stack([p.phonemes for p in pieces]))
    return pcm, phonemes, torch.from_numpy(np.stack([p.words for p in pieces]))
