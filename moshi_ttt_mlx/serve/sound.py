"""A talk's sound on disk, for download: bounded in length, gone when the server stops."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..audio import FRAME_SECONDS
from ..errors import UserError
from ..keep import Keeper

if TYPE_CHECKING:
    from ..session import Session, SpokenFrame


class KeptSound:
    """Stereo WAV of one talk: left Moshi, right the user. A talk is worth more than its recording.

    Args:
        folder: made for it.
        minutes: of sound at most; 0 keeps none.
        warn: called with one line, on any thread, when it ends early or cannot begin.
    """

    def __init__(self, folder: Path, minutes: float, warn: Callable[[str], None]):
        self._folder, self._minutes, self._warn = folder, minutes, warn
        self._frames_left = round(minutes * 60 / FRAME_SECONDS)
        self._keeper: Keeper | None = None

    def begin(self, session: "Session") -> None:
        """Before the first frame, on the session's thread."""
        if not self._frames_left:
            return
        try:
            self._keeper = Keeper(self._folder, {}, self._warn)
        except UserError as error:
            self._warn(f"{error} The talk goes on unrecorded.")
            self._frames_left = 0
        else:
            self._keeper.begin(session)

    def put(self, spoken: "SpokenFrame", user: np.ndarray) -> None:
        """Take one step's result and the user's frame; does not wait for the disk."""
        if not self._frames_left:
            return
        self._keeper.put(spoken, user)
        self._frames_left -= 1
        if not self._frames_left:
            self._warn(f"the recording is full: it holds the first {self._minutes:g} minutes")

    @property
    def path(self) -> Path | None:
        """The WAV, whole at any moment; None where there is none."""
        return next(self._folder.glob("*.wav"), None)

    def close(self) -> None:
        """Write what is left; waits for the disk."""
        if self._keeper:
            self._keeper.close()

    def delete(self) -> None:
        """Remove the sound."""
        shutil.rmtree(self._folder, ignore_errors=True)
