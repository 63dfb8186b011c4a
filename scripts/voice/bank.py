"""The bank: sentences of the closed world, said by many voices.

    python -m voice.bank KOKORO OUT [--workers 2] [--real WAV ...]        (in scripts/)

One FLAC a sentence, 24 kHz, silence cut off, of equal loudness: `OUT/<voice>/<words>.flac`, and beside
it what is said when, `<words>.json`. What is there is not made again, so a run that was stopped goes on.
Kokoro's voices and blends of two of them, some of espeak-ng's for variety, and real recordings
(`real-<name>/`), for the codec alone: of these two nobody knows what is said when.

A training voice says each key and each value now and then, in natural sentences; `talks.py` cuts them
between key and value, so that any pair can be told.
"""

import argparse
import json
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

from .kokoro import SAMPLE_RATE, Kokoro, Said
from .world import (
    ALL_VALUES,
    FACTS,
    HELD_OUT_FACTS,
    HELD_OUT_VOICES,
    KEYS,
    MOSHI_VOICE,
    SMALL_TALK,
    Fact,
    answered,
    asked,
    told,
)

LOUDNESS = 0.06  # root mean square, of full scale
TOLD, ASKED, SMALL = 20, 8, 4  # sentences of a training voice
FOREIGN, BLENDS = 8, 44  # Kokoro's voices for other languages, and means of two
# Pairs drawn, some twice, of which one is made less like the other: means of two are more alike than
# people are. More of men, who were heard worst.
APART = {"m": 42, "f": 30}
# What the model's voice says in another way, and how fast, so that it is understood: said alone, "six"
# was heard as "sexa" and "Lucy" as "losey". Of a sentence the last word is kept.
CLEARER = {"six.": ("My number, six.", 0.95), "Lucy.": ("Lucy!", 1.0), "Hugo.": ("Hugo!", 0.94)}
ONSET = SAMPLE_RATE // 4  # before a word, its consonants that Kokoro counts as the pause before
ESPEAK = ("en-us+m3", "en-us+f2")
REAL_SECONDS = 1.6


def slug(text: str) -> str:
    """A sentence as a file's name."""
    return re.sub(r"[^a-z]+", "-", text.lower()).strip("-")


def find(bank: Path, voice: str, text: str) -> Path:
    """Where a sentence lies."""
    return bank / voice / f"{slug(text)}.flac"


def moshi_pieces() -> list[str]:
    """All that the model says."""
    facts = [Fact(key, value) for key in KEYS for value in ALL_VALUES]
    pieces = {piece: None for fact in facts for piece in answered(fact)}
    return [*pieces, *(exchange.moshi for exchange in SMALL_TALK)]


def user_sentences(voice: str) -> list[str]:
    """What a voice says as a user: everything if it is kept for testing, else a part."""
    small = [exchange.user for exchange in SMALL_TALK]
    if voice in HELD_OUT_VOICES:
        return [*map(asked, KEYS), *small, *map(told, FACTS)]
    rng = random.Random(voice)
    keys = rng.sample(KEYS, len(KEYS))
    values = rng.sample(ALL_VALUES, len(ALL_VALUES))
    facts = [Fact(keys[i % len(keys)], value) for i, value in enumerate(values[:TOLD])]
    told_facts = [fact for fact in facts if fact not in HELD_OUT_FACTS]
    return [
        *map(told, told_facts),
        *map(asked, rng.sample(KEYS, ASKED)),
        *rng.sample(small, SMALL),
    ]


def training_voices(voices: list[str]) -> list[str]:
    """Kokoro's, blends, espeak-ng's, all other men, pairs apart; never those kept for testing."""
    rng = random.Random(0)
    kept = [v for v in voices if v not in HELD_OUT_VOICES and v != MOSHI_VOICE]
    english = [v for v in kept if v[0] in "ab"]
    foreign = rng.sample([v for v in kept if v[0] not in "ab"], FOREIGN)
    blends = ["+".join(rng.sample(english, 2)) for _ in range(BLENDS)]
    chosen = [*english, *foreign, *blends]
    rng.shuffle(chosen)
    more = [v for v in kept if v[1] == "m" and v not in chosen]
    for sex, count in APART.items():
        alike = [v for v in english if v[1] == sex]
        more += ["-".join(rng.sample(alike, 2)) for _ in range(count)]
    return [*chosen, *(f"espeak-{name}" for name in ESPEAK), *dict.fromkeys(more)]


def jobs(voices: list[str]) -> Iterator[tuple[str, str, float]]:
    """Voice, text and speed of every sentence, the most needed first."""
    for text in moshi_pieces():
        yield MOSHI_VOICE, text, 1.0
    for voice in [*training_voices(voices), *HELD_OUT_VOICES]:
        rng = random.Random(voice)
        for text in user_sentences(voice):
            yield voice, text, round(rng.uniform(0.9, 1.2), 3)


def trimmed(pcm: np.ndarray, margin: float = 0.02) -> tuple[np.ndarray, int]:
    """Sound without the silence around it, of `LOUDNESS`; how many samples were cut off its start."""
    block = SAMPLE_RATE // 100
    energy = np.square(pcm[: len(pcm) // block * block]).reshape(-1, block).mean(axis=1)
    loud = np.flatnonzero(energy > 1e-4 * np.quantile(energy, 0.95))
    start = max(loud[0] * block - int(margin * SAMPLE_RATE), 0)
    pcm = pcm[start : (loud[-1] + 1) * block + int(margin * SAMPLE_RATE)]
    pcm = pcm * (LOUDNESS / np.sqrt(np.square(pcm).mean()))
    return np.clip(pcm, -0.99, 0.99), start


def notes(text: str, said: Said, start: int) -> dict:
    """Words and phonemes with their times in samples, as they lie in the trimmed sound."""
    begins = [said.begin, *said.ends[:-1]]
    rows = [
        (symbol, int(max(begin - start, 0)), int(max(end - start, 0)))
        for symbol, begin, end in zip(said.symbols, begins, said.ends, strict=True)
    ]
    return {"text": text, "symbols": rows}


def last_word(said: Said) -> Said:
    """The last word of a sentence, with the pause before it."""
    space = said.symbols.rfind(" ")
    if space < 0:
        return said
    begin = said.ends[space]
    cut = max(begin - ONSET, 0)
    ends = [end - cut for end in said.ends[space + 1 :]]
    return Said(said.pcm[cut:], said.symbols[space + 1 :], ends, begin - cut)


def say(model: Kokoro, voice: str, text: str, speed: float) -> Said:
    """A sentence of the bank."""
    if voice == MOSHI_VOICE and text in CLEARER:
        sentence, speed = CLEARER[text]
        return last_word(model.say(sentence, voice, speed))
    return model.say(text, voice, speed)


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
        piece, _ = trimmed(pcm[start : start + size])
        soundfile.write(folder / f"{number:04d}.flac", piece, SAMPLE_RATE)


def make(kokoro: Path, out: Path, part: list[tuple[str, str, float]]) -> int:
    """Say a part of the jobs; how many were said."""
    model, said = Kokoro(kokoro), 0
    for voice, text, speed in part:
        path = find(out, voice, text)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if voice.startswith("espeak-"):
            pcm, _ = trimmed(espeak(text, voice, speed))
        else:
            speech = say(model, voice, text, speed)
            pcm, start = trimmed(speech.pcm)
            path.with_suffix(".json").write_text(json.dumps(notes(text, speech, start)))
        new = path.with_suffix(".part")
        soundfile.write(new, pcm, SAMPLE_RATE, format="FLAC")
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
        print(f"{sum(said)} sentences said, {len(todo)} in all")


if __name__ == "__main__":
    main()
