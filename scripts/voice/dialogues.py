"""Write talks of the closed world to disk, in moshi-finetune's format.

    python -m voice.dialogues BANK OUT --plan PLAN [--talks 100] [--frames 768]     (in scripts/)

`OUT/talks.jsonl`, and for each talk a stereo FLAC (left the model, right the user) and a JSON of
words with times: what `moshi-ttt-mlx tokenize` reads.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import soundfile
from rich.progress import track

from .clips import worn
from .talks import FRAME, RATE, Talk, recital, tape
from .world import HELD_OUT_VOICES

PLANS: dict[str, Callable[[Talk, int], None]] = {"recital": recital, "tape": tape}
DUETS = {"tape"}  # plans of users alone: there is one on each side, for a codec hears both anyway
RATES = 0.85, 1.17  # of a user's voice


def training_voices(bank: Path) -> list[str]:
    """Voices of users to learn from: those whose sentences can be cut, not those kept for testing."""
    voices = [path.name for path in sorted(bank.iterdir()) if any(path.glob("remember-*.json"))]
    return [v for v in voices if v not in HELD_OUT_VOICES]


def write(talk: Talk, other: Talk | None, frames: int, folder: Path, name: str) -> dict:
    """A talk's two files, users worn, perhaps another on the other side; its row of the manifest."""
    pcm, notes = talk.stereo(frames), talk.notes()
    seconds = len(pcm) / RATE
    pcm[:, 1] = worn(pcm[:, 1], talk.rng)
    if other is not None:
        pcm[:, 0] = worn(other.stereo(frames)[:, 1], other.rng)
        notes["left_turns"] = other.notes()["turns"]
    # What the end cuts off is not said.
    notes["alignments"] = [a for a in notes["alignments"] if a[1][1] <= seconds]
    soundfile.write(folder / f"{name}.flac", pcm, RATE)
    (folder / f"{name}.json").write_text(json.dumps(notes))
    return {"path": f"{name}.flac", "duration": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--talks", type=int, default=100)
    parser.add_argument("--frames", type=int, default=768)
    parser.add_argument("--voices", nargs="+", help="of the users (default: all to learn from)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    voices = args.voices or training_voices(args.bank)
    rows = []
    for number in track(range(args.talks), f"{args.plan} talks"):
        rng = random.Random(f"{args.seed} {args.plan} {number}")
        talks = [None, None]
        for side in range(1 + (args.plan in DUETS)):
            talks[side] = Talk(args.bank, rng.choice(voices), rng, rate=rng.uniform(*RATES))
            PLANS[args.plan](talks[side], args.frames)
        rows.append(write(*talks, args.frames, args.out, f"{args.plan}-{number:04d}"))
    manifest = args.out / "talks.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hours = sum(row["duration"] for row in rows) / 3600
    print(f"{manifest}: {len(rows)} talks, {hours:.2f} h, {len(voices)} voices, frames of {FRAME}")


if __name__ == "__main__":
    main()
