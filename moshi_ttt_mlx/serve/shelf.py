"""Saved talks as a client sees them: names in one folder, for the model that is served."""

import time
from pathlib import Path

from ..errors import UserError
from ..session_store import ENDING, SessionInfo, SessionStore


class Shelf:
    """The sessions folder of a server. Reads files, so not on the event loop.

    Args:
        store: the folder.
        fingerprint: of the model that is served; it cannot go on with another's talks.
        usual: the talk that is meant where none is named, there yet or not; None: a new one.
    """

    def __init__(self, store: SessionStore, fingerprint: str, usual: str | None = None):
        self._store, self._fingerprint, self.usual = store, fingerprint, usual

    def is_there(self, name: str) -> bool:
        """Whether something has this name, be it damaged."""
        return self._store.has(name)

    def find(self, name: object) -> Path:
        """The file of a saved talk.

        Raises:
            UserError: there is none of that name, or it cannot be resumed.
        """
        return self._store.whole(_text(name)).path

    def room(self, name: object) -> Path:
        """The path to save a talk to; makes the folder.

        Raises:
            UserError: not a name, or the folder cannot be made.
        """
        path = self._store.path(_text(name))
        self._store.make_folder()
        return path

    def list(self) -> list[dict]:
        """The saved talks, the latest first.

        Returns:
            `session`, `saved` (UTC, ISO 8601), `bytes`, `fits` (whether the served model can go on
            with it), `model` and `age` in seconds, both null for a damaged file.
        """
        return [self._entry(info) for info in self._store.list() if info.path.suffix == ENDING]

    def _entry(self, info: SessionInfo) -> dict:
        whole = info.fault is None
        return {
            "session": info.name,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(info.saved)),
            "bytes": info.bytes,
            "fits": whole and info.fingerprint == self._fingerprint,
            "model": info.model if whole else None,
            "age": round(info.seconds, 3) if whole else None,
        }


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise UserError("expected a session's name")
    return name
