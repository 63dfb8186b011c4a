"""How much a codec takes away: the same clips before and after it, through two recognizers and DNSMOS.

    python -m voice.code_clips MODEL BANK CODED                         (in scripts/)
    python -m voice.judge_codec BANK CODED --whisper FOLDER --json codec.json --picture codec.png

Folders hold `<voice>/<words-of-the-sentence>.flac` or `.wav`. The model's own voice and the voices
that no training had are judged apart; others are left out. What must be installed: see `ears.py`.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .ears import SOUND, Ear, clips_in, ears, mos, read, some_of, text_of, word_count, word_errors
from .world import HELD_OUT_VOICES, MOSHI_VOICE

GROUPS = {"own voice": (MOSHI_VOICE,), "held-out voices": HELD_OUT_VOICES}
SIDES = ("original", "coded")

# A clip: its path in either folder.
Pair = tuple[Path, Path]


def pairs(original: Path, coded: Path, voices: Sequence[str]) -> list[Pair]:
    """The voices' clips that both folders hold, sorted; the endings may differ."""
    found = {}
    for clip in clips_in(coded, voices):
        there = (original / clip.with_suffix(suffix) for suffix in SOUND)
        if first := next((path for path in there if path.exists()), None):
            found[first] = coded / clip
    return sorted(found.items())


# -- measuring --------------------------------------------------------------------------------------


def judge(clips: Sequence[Pair], listening: Sequence[Ear], tick: Callable[[], None]) -> dict:
    """All that is measured about one group of clips: plain values."""
    rows = [_judge_clip(pair, listening, tick) for pair in clips]
    words = [row["words"] for row in rows]
    return {
        "clips": len(rows),
        "words": sum(words),
        "wer": {
            ear.name: word_error_rates([row["errors"][ear.name] for row in rows], words)
            for ear in listening
        },
        "dnsmos": {
            name: {
                side: float(np.mean([row["dnsmos"][side][name] for row in rows])) for side in SIDES
            }
            for name in rows[0]["dnsmos"]["coded"]
        },
        "each": rows,
    }


def _judge_clip(pair: Pair, listening: Sequence[Ear], tick: Callable[[], None]) -> dict:
    said, sounds = text_of(pair[0]), [read(path) for path in pair]
    heard = {}
    for ear in listening:
        heard[ear.name] = [ear.hear(*sound) for sound in sounds]
        tick()
    return {
        "voice": pair[0].parent.name,
        "said": said,
        "words": word_count(said),
        "heard": heard,
        "errors": {name: [word_errors(said, x) for x in texts] for name, texts in heard.items()},
        "dnsmos": {side: mos(*sound) for side, sound in zip(SIDES, sounds, strict=True)},
    }


def word_error_rates(errors: Sequence[tuple[int, int]], words: Sequence[int]) -> dict[str, float]:
    """In percent, over all words of all clips.

    Args:
        errors: of each clip, before the codec and after it.
        words: that each clip has.

    Returns:
        `original`, `coded`, the `difference` in points, and its standard error over clips, that of a
        ratio of sums (Cochran 1977, Sampling Techniques, section 6.4).
    """
    errors, words = np.array(errors, float), np.array(words, float)
    original, coded = 100 * errors.sum(axis=0) / words.sum()
    more, clips = errors[:, 1] - errors[:, 0], len(words)
    squares = np.square(more - words * more.sum() / words.sum()).sum()
    error = 100 * math.sqrt(squares * clips / max(clips - 1, 1)) / words.sum()
    return {
        "original": float(original),
        "coded": float(coded),
        "difference": float(coded - original),
        "standard_error": float(error),
    }


# -- showing ----------------------------------------------------------------------------------------


def table(groups: dict[str, dict]) -> Table:
    """Of what `judge` found, by group."""
    out = Table("", "", "original", "coded", "difference")
    for name, found in groups.items():
        out.add_section()
        label = f"{name}\n{found['clips']} clips, {found['words']} words"
        for ear, wer in found["wer"].items():
            points = f"{wer['difference']:+.1f} ± {wer['standard_error']:.1f} points"
            values = (f"{wer[side]:.1f}" for side in SIDES)
            out.add_row(label, f"words wrong, {ear}, %", *values, points)
            label = ""
        for score, sides in found["dnsmos"].items():
            values = (f"{sides[side]:.2f}" for side in SIDES)
            difference = f"{sides['coded'] - sides['original']:+.2f}"
            out.add_row("", f"DNSMOS {score}", *values, difference)
    return out


def draw(examples: Sequence[Pair], path: Path) -> None:
    """Spectrograms, the original above the coded one; a column for each pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(examples), 6), layout="constrained")
    axes = figure.subplots(2, len(examples), sharex="col", sharey=True, squeeze=False)
    for column, pair in zip(axes.T, examples, strict=True):
        for axis, side, clip in zip(column, SIDES, pair, strict=True):
            pcm, rate = read(clip)
            # Absolute limits: what the codec made louder or left out is seen to be so.
            image = axis.specgram(
                pcm + 1e-8, NFFT=1024, Fs=rate, noverlap=768, vmin=-140, vmax=-40, cmap="magma"
            )[3]
            axis.set_title(f"{side}: “{text_of(clip)}”, {clip.parent.name}")
        column[-1].set_xlabel("seconds")
    for axis in axes[:, 0]:
        axis.set_ylabel("Hz")
    figure.colorbar(image, ax=axes, label="dB of full scale per Hz")
    figure.savefig(path, dpi=120)


def example(clips: Sequence[Pair]) -> Pair:
    """The clip with the most words, the first of them."""
    return max(clips, key=lambda pair: len(text_of(pair[0]).split()))


# -- the whole --------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("coded", type=Path)
    parser.add_argument("--whisper", type=Path, metavar="FOLDER", help="Whisper small, listens too")
    parser.add_argument("--clips", type=int, default=50, help="of either group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    args = parser.parse_args()
    chosen = {}
    for name, voices in GROUPS.items():
        if clips := pairs(args.original, args.coded, voices):
            chosen[name] = some_of(clips, args.clips, args.seed)
    if not chosen:
        parser.error(
            f"{args.coded}: expected clips named as in {args.original} of {MOSHI_VOICE} or "
            f"{', '.join(HELD_OUT_VOICES)}, found none"
        )
    if args.picture:
        draw([example(clips) for clips in chosen.values()], args.picture)
    try:
        listening = ears(args.whisper)
    except FileNotFoundError as error:
        parser.error(str(error))
    with Progress(transient=True) as bar:
        total = len(listening) * sum(map(len, chosen.values()))
        task = bar.add_task("listening", total=total)
        groups = {
            name: judge(clips, listening, lambda: bar.advance(task))
            for name, clips in chosen.items()
        }
    Console().print(table(groups))
    if args.json:
        about = {"original": str(args.original), "coded": str(args.coded), "seed": args.seed}
        args.json.write_text(json.dumps({**about, "groups": groups}, indent=1) + "\n")


if __name__ == "__main__":
    main()
