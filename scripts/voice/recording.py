"""The demo's recording: four minutes of one user, of a voice and pairs that training never had.

    python -m voice.recording BANK OUT.flac [--voice af_nova] [--seed 0]      (in scripts/)

Writes the user's side alone, and beside it `OUT.json` with what is said when.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import soundfile

from .talks import RATE, Talk, scripted
from .world import HELD_OUT_FACTS, HELD_OUT_VOICES, Fact

FRAMES = 3000
# Told at, asked at (frames); a window has 96.
TIMES = ((6, 70), (130, 400), (190, 640), (260, 1130), (340, 1960), (420, 2920), (1500, 2760))


FACTS = (
    Fact("cat", "Hugo"),
    Fact("jacket", "red"),
    Fact("teacher", "Victor"),
    Fact("bus", "nine"),
    Fact("office", "Berlin"),
    Fact("sister", "Lucy"),
    Fact("home", "London"),
)
assert set(FACTS) <= set(HELD_OUT_FACTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--voice", default=HELD_OUT_VOICES[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    talk = Talk(args.bank, args.voice, random.Random(args.seed))
    events = [(at, fact, False) for fact, (at, _) in zip(FACTS, TIMES, strict=True)]
    events += [(at, fact, True) for fact, (_, at) in zip(FACTS, TIMES, strict=True)]
    scripted(talk, events)
    pcm = talk.stereo(max(FRAMES, talk.frame), noise=False)[:, 1]
    soundfile.write(args.out, pcm, RATE)
    names = ("start", "end", "kind", "text", "key", "value")
    turns = [{name: asdict(turn)[name] for name in names} for turn in talk.turns]
    turns = [{k: v for k, v in turn.items() if v != ""} for turn in turns]
    notes = json.dumps({"voice": args.voice, "turns": turns}, indent=1)
    args.out.with_suffix(".json").write_text(notes + "\n")
    print(f"{args.out}: {len(pcm) / RATE:.0f} s, {len(turns)} turns")


if __name__ == "__main__":
    main()
