"""What recognizers hear in the answers that `voice.recall --clips` kept.

    python -m voice.hear_answers OUT/clips [OUT/recorded OUT/coded] [--whisper FOLDER]   (in scripts/)

An answer is right if the value is among the words of its first sentence. Environment as `voice.ears`.
"""

import argparse
import json
from pathlib import Path

from rich.progress import track

from .ears import Ear, ears, normalised, read
from .world import VALUES


def right_value(heard: str, value: str) -> bool:
    """Whether the value, and no other one before it, was heard."""
    every = {v.lower() for values in VALUES.values() for v in values}
    named = [word for word in normalised(heard).split() if word in every]
    return named[:1] == [value.lower()]


def hear(ear: Ear, folder: Path) -> list[dict]:
    """What one recognizer hears in each clip of a folder."""
    found = []
    for path in track(sorted(folder.glob("*.flac")), f"{ear.name}, {folder.name}"):
        heard, value = ear.hear(*read(path)), path.stem.partition("_")[2]
        about = {"ear": ear.name, "side": folder.name, "clip": path.stem, "heard": heard}
        distance, right = path.stem.partition("-")[0], right_value(heard, value)
        found.append({**about, "distance": distance, "right": right})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--whisper", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for folder in args.clips:
        if not any(folder.glob("*.flac")):
            parser.error(
                f"{folder}: expected DISTANCE-.._VALUE.flac of `voice.recall --clips`, found none"
            )
    found = []
    for ear in ears(args.whisper):
        for folder in args.clips:
            here = hear(ear, folder)
            for distance in [*sorted({f["distance"] for f in here}), "all"]:
                some = [f["right"] for f in here if distance in ("all", f["distance"])]
                share = f"{sum(some)} of {len(some)}, {100 * sum(some) / len(some):.1f} %"
                print(f"{ear.name}, {folder.name}, {distance}: {share}")
            found += here
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
