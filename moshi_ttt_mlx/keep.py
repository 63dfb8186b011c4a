"""Keep a talk on disk while it goes on, so that a crash loses little: a recording, and transcripts.

What lives here: :class:`Keeper`, a thread of its own, since a disk may take its time and a reply may
not. What does not: the session file, which is written by the worker thread (`live.Talk.save`).
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from .errors import UserError
from .recording import Recording
from .transcript import USER, Transcript

if TYPE_CHECKING:
    from .session import Session, SpokenFrame

REWRITE_SECONDS = 1.0
"""A transcript on disk is at most this old, while writing it is quick; a recording's words always."""

REWRITE_SHARE = 0.05
"""A transcript is rewritten whole, so a long one takes long: no more than this share of the time."""

WAITING_FRAMES = 750
"""Frames that may wait for a slow disk: a minute, 11 MB."""

_CLOSE_SECONDS = 10.0


class Keeper:
    """Writes what was heard and said, as it comes.

    A recording holds this sitting. The transcripts hold the whole talk, earlier sittings included.

    Args:
        record: folder for a `Recording`; begun at once, so that a typo shows before loading.
        transcripts: path by format, of `transcript.FORMATS`.
        warn: called with one line, on another thread, when something cannot be written.

    Raises:
        UserError: nothing can be recorded there.
    """

    def __init__(
        self,
        record: str | PathLike | None,
        transcripts: Mapping[str, str | PathLike],
        warn: Callable[[str], None],
    ):
        self._recording = Recording(record) if record else None
        self._paths, self._warn = dict(transcripts), warn
        self._frames: queue.Queue = queue.Queue(WAITING_FRAMES)
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._late = self._dirty = False

    def begin(self, session: "Session") -> None:
        """Go on from the words that a session has; before its first frame."""
        # A copy: the session belongs to another thread.
        self._words = Transcript.from_state(session.transcript.state())
        self._speaker = session.speaker
        self._dirty = True
        self._thread.start()

    def put(self, spoken: "SpokenFrame", user: np.ndarray) -> None:
        """Take one step's result and the user's frame; does not wait for the disk."""
        self._put((spoken, user))

    def put_words(self, words: "SpokenFrame") -> None:
        """Take a frame of the user's words that came after the last step, as `put` does."""
        self._put((words, None))

    def _put(self, item: tuple) -> None:
        try:
            self._frames.put_nowait(item)
        except queue.Full:
            if not self._late:
                self._warn(
                    "the disk does not keep up: recording and transcript have gaps from here"
                )
            self._late = True

    def close(self) -> None:
        """Write all that is left."""
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._frames.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)
        self._record(lambda: self._recording.close())

    def _run(self) -> None:
        rewrite_at = 0.0
        while (item := self._next()) is not None:
            if item:
                self._take(*item)
            else:
                self._record(lambda: self._recording.settle())
            if self._dirty and time.monotonic() >= rewrite_at:
                seconds = self._rewrite()
                rewrite_at = time.monotonic() + max(REWRITE_SECONDS, seconds / REWRITE_SHARE)
        if self._dirty:
            self._rewrite()

    def _next(self) -> tuple | None:
        try:
            return self._frames.get(timeout=REWRITE_SECONDS)
        except queue.Empty:
            return ()

    def _take(self, spoken: "SpokenFrame", user: np.ndarray | None) -> None:
        if user is None:
            self._take_words(spoken)
            return
        self._write_down(spoken, self._speaker)
        self._record(lambda: self._recording.take(spoken, user, self._speaker))
        if spoken.user is not None:
            self._take_words(spoken.user)

    def _take_words(self, words: "SpokenFrame") -> None:
        self._write_down(words, USER)
        time = self._words.time(words.index, USER)
        self._record(lambda: self._recording.write(words.text, time, USER))

    def _write_down(self, spoken: "SpokenFrame", speaker: str) -> None:
        if spoken.piece is not None:
            self._words.add(spoken.index, spoken.piece, speaker)
            self._dirty = True

    def _record(self, work: Callable[[], None]) -> None:
        """Do something with the recording, if there is one; after a fault there is none."""
        if self._recording is None:
            return
        try:
            work()
        except UserError as error:
            self._warn(f"{error} The talk goes on unrecorded.")
            broken, self._recording = self._recording, None
            with suppress(UserError):
                broken.close()

    def _rewrite(self) -> float:
        """Write every transcript; returns the seconds it took."""
        began = time.monotonic()
        self._dirty = False
        for kind, path in list(self._paths.items()):
            try:
                self._words.write(path, kind)
            except UserError as error:
                self._warn(str(error))
                del self._paths[kind]
        return time.monotonic() - began
