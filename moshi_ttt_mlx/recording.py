"""A sitting in a folder, written as it comes: `talk-DATE-TIME.wav` and, beside it, its words.

What lives here: :class:`Recording`, of which a crash leaves all but the last second, and its
:class:`WordLog`. What does not: transcripts of whole talks with exact times (`transcript.py`), which are
rewritten as a whole and so cannot follow a long talk by the second.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .audio import WavWriter
from .errors import UserError

if TYPE_CHECKING:
    from .session import SpokenFrame

SETTLED_SECONDS = 0.8
"""A word to which nothing was added for so long is over."""

PAUSE_SECONDS = 2.0
LINE_CHARS = 160
"""A line ends with a pause, or at the next word after so many characters."""


class Recording:
    """The sound and the words of one sitting.

    The WAV holds what a listener hears: left the reply that came with a step, right the user's frame
    of that step. The times of the words are those of the WAV: of the step that wrote them or, for the
    user's words beside Moshi's, of their sound.

    Args:
        folder: made if its parent exists; earlier recordings in it stay.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike):
        base = _free_name(_folder(Path(folder)))
        self._sound = WavWriter(base.with_suffix(".wav"), channels=2)
        self._words = WordLog(base.with_suffix(".txt"))
        self._began: float | None = None
        self._now = 0.0

    def take(self, spoken: "SpokenFrame", user: np.ndarray, speaker: str) -> None:
        """One step's result, the user's frame float32 `[1920]`, and whose words the step brought.

        Raises:
            UserError: the disk is full or gone. What was written before stays whole.
        """
        if self._began is None:
            self._began = spoken.time
        reply = np.zeros_like(user) if spoken.pcm is None else spoken.pcm
        self._sound.write(np.stack([reply, user]))
        self._now = spoken.time - self._began
        self.write(spoken.text, spoken.time, speaker)
        self._words.settle(self._now - SETTLED_SECONDS)

    def write(self, text: str, time: float, speaker: str) -> None:
        """Words with the time of their sound in the talk, which the latest frame may be ahead of.

        Without a frame there is no recording for them.

        Raises:
            UserError: as `take`.
        """
        if text and self._began is not None:
            self._words.add(text, max(0.0, time - self._began), speaker, self._now)

    def settle(self) -> None:
        """Write the words that were begun: nothing more may come for a while."""
        self._words.settle(float("inf"))

    def close(self) -> None:
        """Finish both files; those of a talk that never began are removed."""
        try:
            self._words.close()
        finally:
            self._sound.close()
        if self._began is None:
            self._sound.path.unlink(missing_ok=True)
            self._words.path.unlink(missing_ok=True)


def _folder(path: Path) -> Path:
    if path.is_file() or (path.suffix == ".wav" and not path.exists()):
        raise UserError(f"expected a folder to record into, found {path}: name a folder")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
    return path


def _free_name(folder: Path) -> Path:
    name = time.strftime("talk-%Y%m%d-%H%M%S")
    names = [name, *(f"{name}-{n}" for n in range(2, 100))]
    taken = {path.stem for path in folder.iterdir()}
    return next(folder / n for n in names if n not in taken)


@dataclass
class _Begun:
    """A word that may go on: its text, when its first and its latest piece were said, and when that
    came."""

    text: str
    first: float
    latest: float
    came: float


class WordLog:
    """A text file of words that only grows, so that no crash harms what it holds.

    A line is the time of its first word, who says it, and words, until a pause or another speaker.
    A word is written when the next one begins or `settle` says that it is over.

    Args:
        path: a new file.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, path: Path):
        self.path = path
        self._begun: dict[str, _Begun] = {}
        self._speaker, self._latest, self._chars = "", 0.0, 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot write the words: {error.strerror}") from error

    def add(self, text: str, time: float, speaker: str, came: float | None = None) -> None:
        """Take text as it is to be printed, a space ahead of every word, with its seconds.

        Args:
            came: seconds at which it was written, where that is later.

        Raises:
            UserError: the disk is full or gone.
        """
        if text.startswith(" "):
            self._write(speaker)
        word = self._begun.setdefault(speaker, _Begun("", time, time, time))
        word.text += text
        word.latest = time
        word.came = time if came is None else came

    def settle(self, before: float) -> None:
        """Write the words to which nothing was added since `before`.

        Raises:
            UserError: as `add`.
        """
        for speaker in [name for name, word in self._begun.items() if word.came < before]:
            self._write(speaker)

    def close(self) -> None:
        """Write what was begun and end the last line."""
        try:
            self.settle(float("inf"))
            if self._chars:
                self._append("\n")
        finally:
            os.close(self._fd)

    def _write(self, speaker: str) -> None:
        word = self._begun.pop(speaker, None)
        if word is None:
            return
        pause = word.first - self._latest > PAUSE_SECONDS
        if self._speaker != speaker or pause or self._chars > LINE_CHARS:
            minutes, tenths = divmod(round(10 * word.first), 600)
            end = "\n" if self._chars else ""
            self._append(f"{end}{minutes}:{tenths / 10:04.1f} {speaker}: ")
            self._chars, word.text = 0, word.text.lstrip()
        text = word.text.replace("\n", " ").rstrip()
        self._append(text)
        self._speaker, self._latest = speaker, word.latest
        self._chars += len(text)

    def _append(self, text: str) -> None:
        try:
            os.write(self._fd, text.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the words: {error.strerror}") from error
