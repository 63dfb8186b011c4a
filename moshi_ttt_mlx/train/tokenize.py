"""A folder of stereo talks with transcripts -> shards; moshi-finetune's format as it is.

    data/talks.jsonl         {"path": "stereo/a.wav", "duration": 24.5}
    data/stereo/a.wav        left Moshi, right the user; any rate
    data/stereo/a.json       {"alignments": [["hello", [0.32, 0.61], "SPEAKER_MAIN"], ...]}

A row that cannot be used is named, counted and left out; a row whose shard is there already is not
tokenized again. What a codec hears is what it hears in a talk, from the start; the codec on MLX takes 25
frames at a time, which gives the codes of single frames (but for ties that rounding decides: 2 in 12,048
codes of a codec with random weights, none of the demo's, nor of the trained one's).
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from ..audio import FRAME_SECONDS, iter_frames
from ..codec import Codec
from ..errors import UserError
from ..model import Model
from .data import open_shard, write_shard
from .interleave import main_words, text_stream

BLOCK = 25  # frames that a codec takes at a time

Tick = Callable[[float], None]
"""Called with the seconds of sound that were just dealt with."""


class Row(NamedTuple):
    """One talk of a manifest: where it says so, the sound, and the seconds it claims."""

    where: str
    sound: Path
    seconds: float


@dataclass
class Summary:
    """What became of the rows of a manifest."""

    written: int = 0
    present: int = 0
    seconds: float = 0.0
    lost_pieces: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: the rows left out, then the counts."""
        named = [f"skipped {where}: {why}" for where, why in self.skipped]
        counts = (
            f"{self.written} talks tokenized ({self.seconds / 3600:.2f} h), {self.present} were "
            f"there already, {len(self.skipped)} skipped"
        )
        lost = f"; {self.lost_pieces} word pieces had no room" if self.lost_pieces else ""
        return [*named, counts + lost]


def read_manifest(source: str | Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows of a `.jsonl`, or of all that a folder holds, and the lines that are none.

    Raises:
        UserError: no such file, or a folder without one.
    """
    source = Path(source)
    manifests = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
    if not manifests:
        raise UserError(f"{source}: a folder without a .jsonl manifest")
    rows, bad = [], []
    for manifest in manifests:
        for number, value in _lines(manifest):
            where = f"{manifest.name}:{number}"
            match value:
                case {"path": str(path), "duration": int() | float() as seconds}:
                    rows.append(Row(where, manifest.parent / path, seconds))
                case _:
                    bad.append((where, 'expected {"path": ..., "duration": seconds}'))
    return rows, bad


def _lines(manifest: Path) -> list[tuple[int, object]]:
    """The lines that are not empty, by number; None for one that is no JSON."""
    try:
        lines = enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest}: expected a .jsonl manifest ({error})") from error
    return [(number, _json(line)) for number, line in lines if line.strip()]


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def tokenize_manifest(
    source: str | Path, out: str | Path, model: Model, tick: Tick = lambda seconds: None
) -> Summary:
    """Write a shard for every usable row that has none yet.

    Args:
        source: see `read_manifest`.
        out: folder for the shards, made where missing.
        model: gives text tokenizer, codec and the number of streams.
        tick: called as the work goes on; the sum is about the manifest's seconds.

    Raises:
        UserError: no manifest, a model that does not speak, or a full disk (what was written stays).
    """
    if not model.speaks:
        raise UserError(f"{model.name} does not speak: shards hold what Moshi says and hears")
    rows, bad = read_manifest(source)
    summary, codecs = Summary(skipped=bad), (model.new_codec(), model.new_codec())
    for row in rows:
        path = Path(out) / _shard_name(row.sound)
        try:
            talk = None if _is_current(path, row, model) else _tokenize(row, model, codecs, tick)
        except UserError as error:
            summary.skipped.append((f"{row.where} ({row.sound.name})", str(error)))
            continue
        if talk is None:
            summary.present += 1
            tick(row.seconds)
            continue
        codes, lost = talk
        write_shard(path, codes, {"source": str(row.sound), "origin": _origin(row, model)})
        summary.written += 1
        summary.seconds += codes.shape[1] * FRAME_SECONDS
        summary.lost_pieces += lost
    return summary


def _shard_name(sound: Path) -> str:
    # Talks of one name in two folders are two talks.
    return f"{sound.stem}-{hashlib.sha256(str(sound).encode()).hexdigest()[:8]}.safetensors"


def _transcript(row: Row) -> Path:
    return row.sound.with_suffix(".json")


def _origin(row: Row, model: Model) -> str:
    """Tells whether a shard was made from these files for this model."""
    stats = [path.stat() for path in (row.sound, _transcript(row))]
    files = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    cfg = model.lm.cfg
    shape = [cfg.generated_codebooks, cfg.other_codebooks, cfg.text_out_vocab_size]
    return json.dumps([files, shape, model.codec.name])


def _is_current(path: Path, row: Row, model: Model) -> bool:
    for needed in (row.sound, _transcript(row)):
        if not needed.is_file():
            raise UserError(f"no file {needed}")
    if not path.is_file():
        return False
    try:
        return open_shard(path).meta.get("origin") == _origin(row, model)
    except UserError:
        return False  # cut off: write it anew


def _tokenize(row: Row, model: Model, codecs: tuple, tick: Tick) -> tuple[np.ndarray, int]:
    """Codes int32 `[S, T]` of a row, and how many word pieces had no room."""
    seconds = _check_sound(row.sound)
    words = main_words(_alignments(_transcript(row)), seconds)
    cfg = model.lm.cfg
    counts = (cfg.generated_codebooks, cfg.other_codebooks)
    sides = [[], []]
    with ExitStack() as stack:
        sound = [
            stack.enter_context(iter_frames(row.sound, c.frame_size, c.sample_rate, channel))
            for channel, c in enumerate(codecs)
        ]
        for codec in codecs:
            codec.reset()
        for block in iter(lambda: list(itertools.islice(zip(*sound, strict=True), BLOCK)), []):
            for codec, pcm, count, side in zip(
                codecs, zip(*block, strict=True), counts, sides, strict=True
            ):
                side.append(_encode(codec, pcm)[:count])
            tick(len(block) * FRAME_SECONDS)
    sides = [np.concatenate(side, axis=1) for side in sides]
    text = text_stream(words, model.tokenizer, sides[0].shape[1])
    streams = [text.tokens[None], *sides]
    return np.concatenate(streams), text.lost


def _encode(codec: Codec, frames: Sequence[np.ndarray]) -> np.ndarray:
    """The next frames of a talk: codes int32 `[K, n]`."""
    # Twice as fast on MLX; the other codec takes frames only.
    if hasattr(codec, "encode_block"):
        return codec.encode_block(np.concatenate(frames))
    return np.stack([codec.encode(frame) for frame in frames], axis=1)


def _alignments(transcript: Path) -> object:
    try:
        match json.loads(transcript.read_text(encoding="utf-8")):
            case {"alignments": alignments}:
                return alignments
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{transcript.name}: not JSON ({error})") from error
    raise UserError(f'{transcript.name}: expected {{"alignments": [...]}}')


def _check_sound(sound: Path) -> float:
    """Seconds of sound in a file that can be used.

    Raises:
        UserError: not stereo, empty, or with samples that are no numbers.
    """
    try:
        with soundfile.SoundFile(sound) as file:
            if file.channels != 2:
                raise UserError(f"{file.channels} channel(s); expected 2: left Moshi, right user")
            if file.frames == 0:
                raise UserError("no sound in it")
            if file.subtype in ("FLOAT", "DOUBLE") and not all(
                math.isfinite(block.sum()) for block in file.blocks(1 << 16)
            ):
                raise UserError("samples that are NaN or infinite")
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        raise UserError(f"not a sound file ({error})") from error
