"""What survives `kill -9`: a run's state on disk, whole or not there at all.

A checkpoint is one file a process, `step-<n>-rank<r>.safetensors`, and `last.json`, which says which
step counts. Files are written under another name, flushed and renamed; `last.json` is renamed last,
and only then are older files removed. So whenever the process or the disk fails, the checkpoint
before is still there. What a kill leaves under the other name, `remove_partial` removes.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import safetensors

from ..errors import UserError
from .together import Together

POINTER = "last.json"
PARTIAL = ".moshi-ttt-partial."
"""So begins the name of what is not whole yet."""


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Put a new file in an old one's place, at once.

    Args:
        path: the file.
        write: makes it, under the name that it is given (of the same ending).

    Raises:
        UserError: the disk is full, or the folder cannot be written; the old file is whole.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(path.suffix, f"{PARTIAL}{path.stem}.", path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write {path}: {_reason(error, path.parent)}") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that nobody else writes to."""
    for left in folder.glob(f"{PARTIAL}*"):
        # What cannot be removed is in nobody's way.
        with suppress(OSError):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _reason(error: Exception, folder: Path) -> str:
    # MLX reports a short write without its reason.
    if isinstance(error, RuntimeError) and folder.is_dir():
        stat = os.statvfs(folder)
        if stat.f_bavail * stat.f_frsize < 1 << 20:
            return "the disk is full"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full"
    return str(error)


def write_tensors(path: Path, arrays: dict[str, mx.array], meta: dict[str, str]) -> None:
    """A safetensors file, at once. Raises UserError as `replace_file`."""
    replace_file(path, lambda new: mx.save_safetensors(str(new), arrays, meta))


def write_text(path: Path, text: str) -> None:
    """A text file, at once. Raises UserError as `replace_file`."""
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def read_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A safetensors file and its metadata.

    Raises:
        UserError: it is missing or not whole.
    """
    try:
        # MLX does not notice that the end of a file is missing.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        return mx.load(str(path), return_metadata=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a whole checkpoint ({error})") from error


def _file(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step-{step}-rank{rank}.safetensors"


def save(
    folder: Path, step: int, arrays: dict[str, mx.array], meta: dict, together: Together
) -> None:
    """Write this process's part of a checkpoint, and make it the one that counts.

    Args:
        folder: of the checkpoints.
        step: updates so far.
        arrays, meta: of this process; `meta` goes through JSON.

    Raises:
        UserError: the disk is full; the checkpoint before still counts.
    """
    mine = _file(folder, step, together.rank)
    write_tensors(mine, arrays, {"meta": json.dumps(meta)})
    together.any(False)  # all parts are there
    if together.leads:
        write_text(folder / POINTER, json.dumps({"step": step, "processes": together.size}))
    together.any(False)  # the new one counts
    for file in folder.glob(f"step-*-rank{together.rank}.safetensors"):
        if file != mine:
            file.unlink(missing_ok=True)


def read_pointer(folder: Path) -> dict | None:
    """Which step counts, `{"step", "processes"}`, or None in a new folder.

    Raises:
        UserError: a damaged file.
    """
    path = folder / POINTER
    if not path.exists():
        return None
    try:
        match json.loads(path.read_text(encoding="utf-8")):
            case {"step": int(), "processes": int()} as pointer:
                return pointer
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): remove the folder to begin anew") from error
    raise UserError(f"{path}: damaged: remove the folder to begin anew")


def load(folder: Path, together: Together) -> tuple[dict[str, mx.array], dict] | None:
    """This process's arrays and meta of the checkpoint that counts, or None if there is none.

    What only the first process wrote is there for all.

    Raises:
        UserError: a damaged checkpoint, or one of another number of processes.
    """
    pointer = read_pointer(folder)
    if pointer is None:
        return None
    if pointer["processes"] != together.size:
        raise UserError(
            f"{folder} was made by {pointer['processes']} process(es), this is one of "
            f"{together.size}: go on with as many"
        )
    arrays = {}
    for rank in sorted({0, together.rank}):
        own, meta = read_tensors(_file(folder, pointer["step"], rank))
        shared = {n: a for n, a in own.items() if not n.startswith("carried.")}
        arrays |= own if rank == together.rank else shared
    return arrays, json.loads(meta["meta"])
