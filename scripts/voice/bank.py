"""The bank: every sentence of the closed world, or piece of one, said by every voice.

    python -m voice.bank KOKORO OUT [--workers 2] [--real WAV ...]        (in scripts/)

One FLAC a piece, 24 kHz, silence cut off, of equal loudness: `OUT/<voice>/<words>.flac`. What is there
is not made again, so a run that was stopped goes on. Kokoro's American voices, some of espeak-ng's for
variety, and real recordings, which have no words (`real-<name>/`): the codec alone learns from them.
"""

import argparse
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

from .kokoro import SAMPLE_RATE, Kokoro
from .world import (
    FACTS,
    HELD_OUT_VOICES,
    KEYS,
    KNOWN_FACTS,
    MOSHI_VOICE,
    SMALL_TALK,
    answered,
    asked,
    told,
)

LOUDNESS = 0.06  # root mean square, of full scale
WHOLE = 12  # facts that a training voice says in one breath
ESPEAK = ("en-us+m3", "en-us+f2", "en-us+m7", "en-us+f4")
REAL_SECONDS = 1.6


def slug(text: str) -> str:
    """A sentence as a file's name."""
    return re.sub(r"[^a-z]+", "-", text.lower()).strip("-")


def find(bank: Path, voice: str, text: str) -> Path:
    """Where a piece lies."""
    return bank / voice / f"{slug(text)}.flac"


def moshi_pieces() -> list[str]:
    """All that the model says."""
    pieces = {piece: None for fact in FACTS for piece in answered(fact)}
    return [*pieces, *(exchange.moshi for exchange in SMALL_TALK)]


def user_pieces(voice: str) -> list[str]:
    """All that a voice says as a user."""
    small = [*map(asked, KEYS), *(exchange.user for exchange in SMALL_TALK)]
    if voice in HELD_OUT_VOICES:
        return [*small, *(" ".join(told(fact)) for fact in FACTS)]
    pieces = {piece: None for fact in FACTS for piece in told(fact)}
    whole = random.Random(voice).sample(KNOWN_FACTS, WHOLE)
    return [*small, *pieces, *(" ".join(told(fact)) for fact in whole)]


def jobs(voices: list[str]) -> Iterator[tuple[str, str, float]]:
    """Voice, text and speed of every piece, the most needed first."""
    for text in moshi_pieces():
        yield MOSHI_VOICE, text, 1.0
    american = [voice for voice in voices if voice[0] == "a" and voice != MOSHI_VOICE]
    for voice in [*(f"espeak-{name}" for name in ESPEAK), *american]:
        rng = random.Random(voice)
        for text in user_pieces(voice):
            yield voice, text, round(rng.uniform(0.9, 1.2), 3)


def trimmed(pcm: np.ndarray, margin: float = 0.02) -> np.ndarray:
    """Sound without the silence around it, of `LOUDNESS`."""
    block = SAMPLE_RATE // 100
    energy = np.square(pcm[: len(pcm) // block * block]).reshape(-1, block).mean(axis=1)
    loud = np.flatnonzero(energy > 1e-4 * np.quantile(energy, 0.95))
    start = max(loud[0] * block - int(margin * SAMPLE_RATE), 0)
    pcm = pcm[start : (loud[-1] + 1) * block + int(margin * SAMPLE_RATE)]
    pcm = pcm * (LOUDNESS / np.sqrt(np.square(pcm).mean()))
    return np.clip(pcm, -0.99, 0.99)


def espeak(text: str, voice: str, speed: float) -> np.ndarray:
    """A sentence by espeak-ng, float32 `[N]` at 24 kHz."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        pace = str(round(165 * speed))
        name = voice.removeprefix("espeak-")
        subprocess.run(["espeak-ng", "-v", name, "-s", pace, "-w", file.name, text], check=True)
        pcm, rate = soundfile.read(file.name, dtype="float32")
    return soxr.resample(pcm, rate, SAMPLE_RATE)


def cut_real(path: Path, out: Path) -> None:
    """A recording in pieces of `REAL_SECONDS`."""
    pcm, rate = soundfile.read(path, dtype="float32", always_2d=True)
    pcm = soxr.resample(pcm.mean(axis=1), rate, SAMPLE_RATE)
    size = int(REAL_SECONDS * SAMPLE_RATE)
    folder = out / f"real-{slug(path.stem)}"
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(pcm) - size, size)):
        piece = trimmed(pcm[start : start + size])
        soundfile.write(folder / f"{number:04d}.flac", piece, SAMPLE_RATE)


def make(kokoro: Path, out: Path, part: list[tuple[str, str, float]]) -> int:
    """Say a part of the jobs; how many were said."""
    model, said = Kokoro(kokoro), 0
    for voice, text, speed in part:
        path = find(out, voice, text)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".part")
        by_rule = voice.startswith("espeak-")
        pcm = espeak(text, voice, speed) if by_rule else model.say(text, voice, speed)
        soundfile.write(new, trimmed(pcm), SAMPLE_RATE, format="FLAC")
        new.rename(path)
        said += 1
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kokoro", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="recordings of people")
    args = parser.parse_args()
    for path in args.real:
        cut_real(path, args.out)
    todo = list(jobs(Kokoro(args.kokoro).voices))
    with ProcessPoolExecutor(args.workers) as pool:
        parts = [todo[i :: args.workers] for i in range(args.workers)]
        said = pool.map(make, *zip(*((args.kokoro, args.out, part) for part in parts), strict=True))
        print(f"{sum(said)} pieces said, {len(todo)} in all")


if __name__ == "__main__":
    main()
