"""Talks by name: one folder of session files, listed, looked into and removed without a model.

What lives here: :class:`SessionStore`, what a name may be, and reading what a session file says about
itself. What does not: saving and resuming (`session.py`), tables on the screen (`cli/sessions.py`).

    store = SessionStore()
    for found in store.list():
        print(found.name, found.seconds, found.fault)
    session.save(store.path("monday"))
"""

import json
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors

from .audio import FRAME_SECONDS
from .errors import UserError
from .transcript import Transcript, Word
from .trees import under

ENDING = ".session"

FORMAT, VERSION = "moshi-ttt-mlx session", 1
"""What `session.py` writes and reads."""

_NAME = re.compile(r"\w([\w. -]*[\w-])?")
_NAME_BYTES = 200  # file systems take 255; an unfinished save needs some more
_HEADER_BYTES = 2**29
_MEMORY = re.compile(r"generator\.layers\.(\d+)\.memory\.(step|weights\.\w+)")


def sessions_folder() -> Path:
    """Where named talks are kept: `$MOSHI_TTT_SESSIONS`, or the system's place for such data."""
    if folder := os.environ.get("MOSHI_TTT_SESSIONS"):
        return Path(folder)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "moshi-ttt-mlx" / "sessions"


@dataclass(frozen=True)
class SessionInfo:
    """What a file in the sessions folder says about itself.

    Attributes:
        name: of the talk; of the file where it is none.
        bytes: the file's size.
        saved: seconds since 1970.
        fault: why it cannot be resumed, None if it can; what is below may then be empty.
        model, fingerprint: what it was held with, see `Model`.
        seconds: its age in talk.
        words: how many.
        memory: `on`, `frozen`, `off` as it was begun; None without one in the file.
        settings: of the session, see `session.Settings`.
    """

    name: str
    path: Path
    bytes: int
    saved: float
    fault: str | None = None
    model: str = ""
    fingerprint: str = ""
    seconds: float = 0.0
    words: int = 0
    memory: str | None = None
    settings: dict = field(default_factory=dict)


class SessionStore:
    """The sessions folder. Only files right in it are touched, and no link is followed.

    Args:
        folder: another one than `sessions_folder()`.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = sessions_folder() if folder is None else Path(folder)

    def path(self, name: str) -> Path:
        """The file of a talk, there or not.

        Raises:
            UserError: not a name.
        """
        name = name.removesuffix(ENDING)
        if not _NAME.fullmatch(name) or len(name.encode()) > _NAME_BYTES:
            raise UserError(
                f"expected a session's name (letters, digits, '-', '_', '.', spaces), found {name!r}"
            )
        return self.folder / f"{name}{ENDING}"

    def make_folder(self) -> None:
        """The folder is there from here on.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}") from error

    def has(self, name: str) -> bool:
        """Whether something has this name, be it damaged.

        Raises:
            UserError: not a name.
        """
        return os.path.lexists(self.path(name))

    def list(self) -> list[SessionInfo]:
        """Everything in the folder, the latest first, files that are no sessions included."""
        if not self.folder.is_dir():
            return []
        found = [inspect(path) for path in self.folder.iterdir() if not _is_hidden(path)]
        return sorted(found, key=lambda info: (-info.saved, info.name))

    def info(self, name: str) -> SessionInfo:
        """What one talk says about itself.

        Raises:
            UserError: not a name, or there is none of that name.
        """
        if not self.has(name):
            raise self._missing(name)
        return inspect(self.path(name))

    def whole(self, name: str) -> SessionInfo:
        """As `info`, of a talk that can be resumed.

        Raises:
            UserError: as `info`, or it cannot.
        """
        info = self.info(name)
        if info.fault:
            raise UserError(f"the talk {info.name!r} cannot be resumed: {info.fault}")
        return info

    def _missing(self, name: str) -> UserError:
        return UserError(f"no session {name!r} in {self.folder}: `sessions list` shows them all")

    def remove(self, name: str) -> None:
        """Remove a talk, and what saves of it that were cut short have left.

        Raises:
            UserError: not a name, none of that name, or a file that is no session of ours.
        """
        path, left = self.path(name), list(self._unfinished(name))
        if not self.has(name) and not left:
            raise self._missing(name)
        if self.has(name) and not _is_ours(path):
            raise UserError(f"{path} is not a session of moshi-ttt-mlx: it stays where it is")
        for file in [path, *left]:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {file}: {error.strerror}") from error

    def _unfinished(self, name: str) -> Iterator[Path]:
        if self.folder.is_dir():
            file = self.path(name).name
            yield from (p for p in self.folder.iterdir() if _unfinished_save_of(p) == file)


def session_path(text: str) -> Path:
    """The file that a user means: a path stays one, a name is a talk in the sessions folder.

    The folder is made if it is missing.

    Raises:
        UserError: not a name, one that may mean a file here, or a folder that cannot be made.
    """
    if os.sep in text:
        return Path(text)
    store = SessionStore()
    path = store.path(text)
    if Path(text).is_file() and not path.exists():
        raise UserError(
            f"{text} is a file here, but a name without a folder means a talk in {store.folder}: "
            f"for the file say .{os.sep}{text}"
        )
    store.make_folder()
    return path


def session_name(path: Path) -> str:
    """The name of the talk in a file of a sessions folder."""
    return path.name.removesuffix(ENDING)


def session_label(path: str | os.PathLike) -> str:
    """What to say after `--session` for a file: its name in the sessions folder, or its path."""
    path = Path(path)
    return session_name(path) if path.parent == sessions_folder() else str(path)


# -- looking into a file ----------------------------------------------------------------------------


def inspect(path: Path) -> SessionInfo:
    """What a file says about itself; never raises for what is in it."""
    status = path.lstat()
    name = session_name(path)
    facts = {"path": path, "bytes": status.st_size, "saved": status.st_mtime}
    if file := _unfinished_save_of(path):
        fault = "a save that was cut short; the one before it stays"
        return SessionInfo(session_name(Path(file)), **facts, fault=fault)
    if path.suffix != ENDING:
        return SessionInfo(name, **facts, fault="not a session file")
    try:
        return SessionInfo(name, **facts, **_facts(*_read_header(path)))
    except UserError as error:
        return SessionInfo(name, **facts, fault=str(error))
    except (KeyError, TypeError, ValueError, AttributeError):
        return SessionInfo(name, **facts, fault="damaged: what it says about itself makes no sense")


def last_words(path: Path, count: int) -> list[Word]:
    """The latest words of a talk that can be resumed, with times and speakers."""
    _, meta = _read_header(path)
    return Transcript.from_state(json.loads(meta["transcript"])).words[-count:]


def memory_norms(path: Path) -> dict[int, dict[str, float | int]]:
    """By layer: `tokens`, `updates`, `step` (as in `Session.memory_report`) and `weights`.

    `weights` is the largest norm of one head's learned weights. How far they have drifted only the
    model can tell, which holds those they began with.
    """
    header, meta = _read_header(path)
    counters = json.loads(meta["counters"])
    layers: dict[int, dict[str, float | int]] = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for name in filter(_MEMORY.fullmatch, header):
            layer, what = _MEMORY.fullmatch(name).groups()
            norms = layers.setdefault(int(layer), {"weights": 0.0})
            array = file.get_tensor(name).astype(np.float64)
            if what == "step":
                norms["step"] = float(array.max(initial=0.0))
            elif array.size:
                squares = np.square(array).sum(axis=(-2, -1))
                norms["weights"] = norms["weights"] + squares
    for layer, norms in layers.items():
        norms["weights"] = float(np.sqrt(norms["weights"]).max())
        norms |= under(f"layers.{layer}.", counters)
    return dict(sorted(layers.items()))


def _facts(header: dict, meta: dict) -> dict:
    counters, settings = json.loads(meta["counters"]), json.loads(meta["settings"])
    transcript = Transcript.from_state(json.loads(meta["transcript"]))
    has_memory = any(map(_MEMORY.fullmatch, header))
    return {
        "model": meta["model"],
        "fingerprint": meta["fingerprint"],
        "seconds": counters["frame"] * FRAME_SECONDS,
        "words": len(transcript.words),
        "memory": settings["memory"] if has_memory else None,
        "settings": settings,
    }


def _read_header(path: Path) -> tuple[dict, dict[str, str]]:
    """A session file's tensors (name to dtype, shape, place) and its metadata, without its data.

    Raises:
        UserError: not a whole session of this version; the message is the reason alone.
    """
    header, size = _parse(path)
    meta = header.pop("__metadata__", {})
    if meta.get("format") != FORMAT:
        raise UserError("not a session of moshi-ttt-mlx")
    if meta.get("version") != str(VERSION):
        raise UserError(f"of version {meta.get('version')}: this program reads {VERSION}")
    wanted = max(entry["data_offsets"][1] for entry in header.values())
    if wanted != size:
        raise UserError(f"cut short: {size} of {wanted} bytes of data")
    return header, meta


def _parse(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and how many bytes of data follow it."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError("a link: not followed" if path.is_symlink() else "not a file")
    try:
        with open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            text = file.read(length) if length < _HEADER_BYTES else b""
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError("not a session of moshi-ttt-mlx, or cut short in its first part")
    return header, size - 8 - length


def _open_regular(path: str, flags: int) -> int:
    # What was a file a moment ago may be a link out of the folder, or a pipe that waits for ever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_ours(path: Path) -> bool:
    """Whether a file was written as a session, whole or not, of whatever version."""
    try:
        return _parse(path)[0]["__metadata__"]["format"] == FORMAT
    except (UserError, KeyError, TypeError):
        return False


def _unfinished_save_of(path: Path) -> str | None:
    """The session file whose save has left this one, see `session.write_session`."""
    found = re.fullmatch(rf"\.(.+{re.escape(ENDING)})\.\w+\.safetensors", path.name)
    return found[1] if found else None


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") and not _unfinished_save_of(path)
