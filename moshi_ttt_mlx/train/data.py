"""Shards: one tokenized talk each, the data that `train` and `eval` read.

A shard is a safetensors file with one tensor, `codes`, int32 `[S, T]`: `S = 1 + n_q` streams in
Moshi's order (text, Moshi's codebooks, the user's codebooks), `T` frames of 80 ms. Streams are
**undelayed**: column `t` of each is what is said in frame `t`; `loss.delayed` moves them. A token may be
written as one that is read but not learned, see `unlearned`: what nobody could foretell, say. Its
metadata are strings: `format`, `source` (the sound file), and whatever the writer adds.

    shards = find_shards("my_shards")
    codes = shards[0].codes()               # int32 [17, T]
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
from moshi_mlx.models import LmConfig
from safetensors.numpy import save_file

from ..errors import UserError

FORMAT = "moshi-ttt-mlx shard 1"
NOTHING = -1
"""A token that says nothing: embedded as zeros, never a target. Fills up the short talks of a batch."""


def unlearned(tokens: np.ndarray) -> np.ndarray:
    """Tokens (0 and up) as ones that the model reads but that are no targets: below `NOTHING`.

    Training and `eval` feed them as any others, and leave them out of every loss. `unlearned` of what
    it gives are the tokens again.
    """
    return 2 * NOTHING - tokens


@dataclass(frozen=True)
class Shard:
    """A tokenized talk on disk; opening it reads the header only.

    Attributes:
        path: the file.
        streams: `S`.
        frames: `T`.
        meta: its metadata.
    """

    path: Path
    streams: int
    frames: int
    meta: dict[str, str] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """How messages and reports call this talk."""
        return self.meta.get("source", self.path.stem)

    def codes(self) -> np.ndarray:
        """int32 `[S, T]`, undelayed.

        Raises:
            UserError: the file has changed or gone since it was opened.
        """
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                return file.get_tensor("codes").astype(np.int32, copy=False)
        except (safetensors.SafetensorError, OSError) as error:
            raise _broken(self.path, error) from error


def _broken(path: Path, error: object) -> UserError:
    return UserError(f"{path}: not a whole shard ({error}): delete it and tokenize again")


def open_shard(path: str | Path) -> Shard:
    """Read a shard's header.

    Raises:
        UserError: not a shard of this package, or not a whole one.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            shape = file.get_slice("codes").get_shape() if "codes" in file.keys() else ()  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise _broken(path, error) from error
    if meta.get("format") != FORMAT or len(shape) != 2:
        raise UserError(f"{path}: not a shard (`moshi-ttt-mlx tokenize` makes them)")
    return Shard(path, *shape, meta)


def write_shard(path: str | Path, codes: np.ndarray, meta: dict[str, str]) -> None:
    """Write a shard; an older file stays whole until the new one is.

    Args:
        path: a `.safetensors` file.
        codes: int `[S, T]`, undelayed, in Moshi's stream order.
        meta: added to the metadata.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
        os.close(handle)
        arrays = {"codes": np.ascontiguousarray(codes, np.int32)}
        save_file(arrays, temporary, {"format": FORMAT, **meta})
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"could not write {path}: {error}") from error


def shard_paths(source: str | Path) -> list[Path]:
    """The shard files of a folder and its subfolders, sorted; or the one file. None is opened.

    Raises:
        UserError: nothing there.
    """
    source = Path(source)
    paths = [source] if source.is_file() else sorted(source.rglob("*.safetensors"))
    if not paths:
        what = "holds no shards" if source.is_dir() else "does not exist"
        raise UserError(f"{source} {what}: `moshi-ttt-mlx tokenize MANIFEST --out {source}` first")
    return paths


def find_shards(source: str | Path) -> list[Shard]:
    """The shards of `shard_paths`, opened.

    Raises:
        UserError: nothing there, or a file that is no shard.
    """
    return [open_shard(path) for path in shard_paths(source)]


def check_shards(shards: Sequence[Shard], config: LmConfig) -> None:
    """Every shard has the streams of a model, and a token of each at least.

    Raises:
        UserError: the first that does not.
    """
    streams = 1 + config.audio_codebooks
    for shard in shards:
        if shard.streams != streams:
            raise UserError(
                f"{shard.path}: {shard.streams} streams, the model has {streams}: tokenize for "
                "this model"
            )
        if shard.frames < 1:
            raise UserError(f"{shard.path}: an empty talk: delete it")


def check_codes(codes: np.ndarray, config: LmConfig, name: str) -> None:
    """Every token is one that the model has.

    Raises:
        UserError: tokens out of range, which would read some other row of a table.
    """
    most = np.full((len(codes), 1), config.audio_vocab_size - 2)
    most[0] = config.text_out_vocab_size - 1
    if ((codes < unlearned(most)) | (codes > most)).any():
        raise UserError(f"{name}: tokens that this model does not have: tokenize for this model")


def pad_talks(talks: Sequence[np.ndarray], frames: int) -> np.ndarray:
    """Talks `[S, T_i]` -> `[B, S, frames]`, filled up with `NOTHING`."""
    padded = np.full((len(talks), len(talks[0]), frames), NOTHING, np.int32)
    for row, talk in zip(padded, talks, strict=True):
        row[:, : talk.shape[1]] = talk
    return padded
