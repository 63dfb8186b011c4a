"""Does it remember? Facts told by voices it never heard, asked some windows later.

    python -m voice.recall MODEL BANK OUT [--memory on] [--seeds 0 1] [--windows 2 4]     (in scripts/)

Talks of `talks.probe` go through the model's codec, then frame by frame and greedily through the
generator, which feeds on what it says itself. `OUT/results.json` has every question; with `--clips N`
the sound of the answers lies beside it, and what they would be at best, for `voice.hear_answers`.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import soundfile
from moshi_mlx.utils import Sampler
from rich.progress import Progress

from moshi_ttt_mlx import load
from moshi_ttt_mlx.generate import FrameGenerator
from moshi_ttt_mlx.model import Model

from .talks import FRAME, RATE, Talk, Turn, probe
from .world import HELD_OUT_FACTS, HELD_OUT_VOICES, KEYS

BLOCK = 25  # frames that the codec takes at a time
ANSWER = 40  # frames in which an answer has to come


@dataclass(frozen=True)
class Answer:
    """What came back to one turn of the user."""

    seed: int
    row: int
    windows: float
    voice: str
    kind: str
    key: str
    value: str
    probed: bool  # told and asked at the distance; else one of the facts between
    said: str
    right: bool


def make_talks(
    bank: Path, frames: int, rows: int, seed: int, voices: Sequence[str] = HELD_OUT_VOICES
) -> list[Talk]:
    """Talks that ask each of six facts once, `frames` after it was told; all of them held out."""
    talks = []
    for row in range(rows):
        rng = random.Random(f"{seed} {frames} {row}")
        keys = rng.sample(KEYS, 6)
        facts = [rng.choice([f for f in HELD_OUT_FACTS if f.key == key]) for key in keys]
        talk = Talk(bank, voices[row % len(voices)], rng)
        probe(talk, frames, facts)
        talk.probed = frozenset(keys)
        talks.append(talk)
    return talks


def decoded(model: Model, codes: np.ndarray) -> np.ndarray:
    """The sound of codes int32 `[K, T]`, to whole blocks."""
    codec = model.new_codec()
    codec.reset()
    codes = codes[:, : codes.shape[1] // BLOCK * BLOCK]
    blocks = np.split(codes, codes.shape[1] // BLOCK, axis=1)
    return np.concatenate([codec.decode_block(block) for block in blocks])


def encoded(model: Model, pcm: np.ndarray) -> np.ndarray:
    """The codes of sound of whole blocks, int32 `[K, T]`."""
    codec = model.new_codec()
    codec.reset()
    blocks = pcm.reshape(-1, BLOCK * FRAME)
    return np.concatenate([codec.encode_block(block) for block in blocks], axis=1)


def whole_blocks(*talks: Talk) -> int:
    """Frames in which all have ended and the last answers have come."""
    return -(-(max(talk.frame for talk in talks) + 50) // BLOCK) * BLOCK


def heard(model: Model, talks: Sequence[Talk]) -> np.ndarray:
    """The users' sides as codes, int32 `[B, K, T]`."""
    frames = whole_blocks(*talks)
    return np.stack([encoded(model, talk.stereo(frames)[:, 1]) for talk in talks])


def replies(model: Model, codes: np.ndarray, memory: str, tick) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens `[B, T]` and codes `[B, K, T]`, greedily."""
    greedy, batch = Sampler(temp=0.0), len(codes)
    generator = FrameGenerator(model.lm, greedy, greedy, batch_size=batch, memory=memory)
    text, sound = [], []
    for frame in range(codes.shape[2]):
        said, made = generator.step(mx.array(codes[:, :, frame])).read()
        text.append(said)
        if made is not None:
            sound.append(made)
        tick()
    return np.stack(text, axis=1), np.stack(sound, axis=2)


def words_after(model: Model, tokens: np.ndarray, turn: Turn) -> str:
    """What the model says in answer to a turn."""
    start = int(turn.end * RATE / FRAME)
    said = [model.piece(int(t)) for t in tokens[start : start + ANSWER]]
    return "".join(piece for piece in said if piece).replace("▁", " ").strip()


def is_right(said: str, turn: Turn) -> bool:
    """Whether the first sentence is the answer, after what may be left of the one before."""
    if turn.kind == "talk":
        return said.startswith(turn.reply)
    return said.split(".")[0].endswith(f"{turn.key} is {turn.value}")


def answers(
    model: Model, talks: Sequence[Talk], tokens: np.ndarray, seed: int, windows: float
) -> list[Answer]:
    """Every turn of the user, judged by the text stream."""
    found = []
    for row, talk in enumerate(talks):
        for turn in talk.turns:
            said = words_after(model, tokens[row], turn)
            probed = turn.key in talk.probed
            about = (turn.kind, turn.key, turn.value, probed, said, is_right(said, turn))
            found.append(Answer(seed, row, windows, talk.voice, *about))
    return found


def save_clips(model: Model, talks, sound: np.ndarray, out: Path, name: str, most: int) -> None:
    """The sound of the answers to questions, `OUT/<side>/<name>-<row>-<number>_<value>.flac`.

    Sides are `clips`, what the model says; `recorded`, what the voice that it learned says there; and
    `coded`, the same through the codec.
    """
    for row, talk in enumerate(talks):
        recorded = talk.stereo(whole_blocks(talk), noise=False)[:, 0]
        coded = decoded(model, encoded(model, recorded))
        sides = {"clips": decoded(model, sound[row]), "recorded": recorded, "coded": coded}
        asked = [t for t in talk.turns if t.kind == "ask" and t.key in talk.probed]
        for number, turn in enumerate(asked[:most]):
            start = int(turn.end * RATE)
            for side, pcm in sides.items():
                path = out / side / f"{name}-{row}-{number}_{turn.value}.flac"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, pcm[start : start + ANSWER * FRAME], RATE)
        most -= len(asked[:most])
        if not most:
            return


def was_heard(answer: Answer, found: list[Answer]) -> bool:
    """Whether the fact that is asked for was repeated rightly when it was told."""

    def fact(a: Answer) -> tuple:
        return a.seed, a.windows, a.row, a.key, a.value

    return all(a.right for a in found if a.kind == "tell" and fact(a) == fact(answer))


def line(name: str, found: list[Answer]) -> str:
    """How many of some answers are right."""
    asked = [a for a in found if a.kind == "ask" and a.probed]
    parts = []
    for what, some in (
        ("asked", asked),
        ("asked of what was heard", [a for a in asked if was_heard(a, found)]),
        ("told", [a for a in found if a.kind == "tell" and a.probed]),
        ("small talk", [a for a in found if a.kind == "talk"]),
    ):
        if some:
            right = sum(a.right for a in some)
            parts.append(f"{what} {right} of {len(some)}, {100 * right / len(some):.1f} %")
    return f"{name}: " + "; ".join(parts)


def table(found: list[Answer]) -> str:
    """Right answers by distance; and beyond the window by voice and in all."""
    beyond = [a for a in found if a.windows > 1]
    lines = [
        line(f"{windows:g} windows", [a for a in found if a.windows == windows])
        for windows in sorted({a.windows for a in found})
    ]
    lines += [
        line(f"beyond, {voice}", [a for a in beyond if a.voice == voice])
        for voice in sorted({a.voice for a in beyond})
    ]
    return "\n".join([*lines, line("beyond the window", beyond), line("all", found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("bank", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter-path", help="a memory (default: the model's own)")
    parser.add_argument("--memory", choices=["on", "frozen", "off"], default="on")
    parser.add_argument("--windows", type=float, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rows", type=int, default=8, help="talks, of six questions each")
    parser.add_argument(
        "--clips",
        type=int,
        default=0,
        help="answers to keep as sound, a distance, of the first seed",
    )
    parser.add_argument("--voices", nargs="+", default=HELD_OUT_VOICES, help="of the users")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="as many talks for each")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model = load(args.model, adapter_path=args.adapter_path)
    window = model.memory.config.window if model.memory else model.lm.cfg.transformer.context
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    with Progress() as bar:
        for seed, windows in product(args.seeds, args.windows):
            talks = make_talks(args.bank, round(windows * window), args.rows, seed, args.voices)
            codes = heard(model, talks)
            task = bar.add_task(f"seed {seed}, {windows:g} windows", total=codes.shape[2])
            tokens, sound = replies(model, codes, args.memory, lambda t=task: bar.advance(t))
            found += answers(model, talks, tokens, seed, windows)
            if args.clips and seed == args.seeds[0]:
                save_clips(model, talks, sound, args.out, f"{windows:g}w", args.clips)
    (args.out / "results.json").write_text(json.dumps([asdict(a) for a in found], indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
