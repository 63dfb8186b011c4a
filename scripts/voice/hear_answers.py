"""What recognizers hear in the answers that `voice.recall --clips` kept.

    python -m voice.hear_answers OUT/clips [--whisper FOLDER] [--json FILE]      (in scripts/)

An answer is right if the value is among the words of its first sentence. Environment as `voice.ears`.
"""

import argparse
import json
from pathlib import Path

from rich.progress import track

from .ears import ears, normalised, read
from .world import VALUES


def right_value(heard: str, value: str) -> bool:
    """Whether the value, and no other one before it, was heard."""
    every = {v.lower() for values in VALUES.values() for v in values}
    named = [word for word in normalised(heard).split() if word in every]
    return named[:1] == [value.lower()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clips", type=Path)
    parser.add_argument("--whisper", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    paths, found = sorted(args.clips.glob("*.flac")), []
    for ear in ears(args.whisper):
        for path in track(paths, ear.name):
            heard = ear.hear(*read(path))
            value = path.stem.partition("_")[2]
            distance = path.stem.partition("-")[0]
            right = right_value(heard, value)
            found.append({"ear": ear.name, "clip": path.stem, "heard": heard, "right": right})
            found[-1] |= {"distance": distance}
        for distance in sorted({f["distance"] for f in found}):
            here = [f for f in found if f["ear"] == ear.name and f["distance"] == distance]
            share = 100 * sum(f["right"] for f in here) / len(here)
            print(f"{ear.name}, {distance}: {share:.1f} % of {len(here)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
