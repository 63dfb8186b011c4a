"""What is kept of the demo's talks: sound and words in files, and what the picture needs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..audio import FRAME_SECONDS, FRAMES_PER_SECOND, SILENCE, WavWriter
from ..errors import UserError
from ..transcript import USER, WORD_START, Transcript
from .story import Passage, Question, Story, Window
from .turns import Recording, Turn

# Who prints or draws a record needs no MLX, which takes a second to import.
if TYPE_CHECKING:
    from .runs import Report, Step

TRANSCRIPTS = ("txt", "json", "srt")


@dataclass
class Heard:
    """One talk so far.

    Attributes:
        frames: of it.
        peaks: loudest sample of each of Moshi's frames, 0..1, in step with the user's.
        reports: the memory's norms, by layer, with the seconds at which they were read.
        memory_ok: the memory has stayed finite.
    """

    sound: WavWriter
    frames: int = 0
    peaks: list[float] = field(default_factory=list)
    reports: "list[tuple[float, Report]]" = field(default_factory=list)
    memory_ok: bool = True


def make_folder(path: str | Path) -> Path:
    """A folder to write into, made where its parent exists.

    Raises:
        UserError: it cannot be made, or is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


class Record(AbstractContextManager):
    """Takes the steps of all talks; `with` closes their sound.

    Args:
        recording: what the user says.
        runs: names of the talks.
        window: what their attention sees.
        folder: from `make_folder`; holds `NAME.wav` a talk (left Moshi, right the user) and, after
            `finish`, `transcript.txt`, `.json` and `.srt` of all sides.

    Attributes:
        passages: all that are over.
        talks: `Heard` by run.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, recording: Recording, runs: Sequence[str], window: Window, folder: Path):
        self.recording, self.runs, self.window, self.folder = recording, runs, window, folder
        self.transcript = Transcript()
        self.passages: list[Passage] = []
        self._story = Story(recording.turns, runs, window)
        self.talks: dict[str, Heard] = {}
        try:
            for run in runs:
                name = run.lower().replace(" ", "_")
                self.talks[run] = Heard(WavWriter(folder / f"{name}.wav", channels=2))
        except UserError:
            self.__exit__()
            raise

    @property
    def frames(self) -> int:
        """Frames that all talks have reached."""
        return min(talk.frames for talk in self.talks.values())

    @property
    def seconds(self) -> float:
        """The same in seconds."""
        return self.frames * FRAME_SECONDS

    @property
    def questions(self) -> list[Question]:
        """All that were asked."""
        return [p.question for p in self.passages if p.question is not None]

    def user_peaks(self) -> np.ndarray:
        """The loudest sample of each of the user's frames that all talks have heard: `[frames]`."""
        return np.array([np.abs(pcm).max() for pcm in self.recording.frames[: self.frames]])

    def take(self, step: "Step") -> list[Passage]:
        """Keep a step; returns the passages that are over with it.

        Raises:
            UserError: the disk is full.
        """
        talk, spoken = self.talks[step.run], step.spoken
        if spoken.pcm is not None:
            self._write(talk, spoken.pcm)
        if spoken.piece is not None:
            self.transcript.add(spoken.index, spoken.piece, step.run)
        talk.frames += 1
        talk.memory_ok = spoken.memory_ok
        if step.report:
            talk.reports.append((talk.frames * FRAME_SECONDS, step.report))
        return self._tell(self._story.advance(self.seconds, self.transcript))

    def _write(self, talk: Heard, reply: np.ndarray) -> None:
        # The reply is that of an earlier frame: written beside that one it is in step.
        talk.sound.write(np.stack([reply, self.recording.frames[len(talk.peaks)]]))
        talk.peaks.append(float(np.abs(reply).max()))

    def _tell(self, passages: list[Passage]) -> list[Passage]:
        for passage in passages:
            if passage.turn is not None:
                self._add_words(passage.turn)
        self.passages += passages
        return passages

    def _add_words(self, turn: Turn) -> None:
        """The user's words, spread over their turn by their length."""
        words = turn.text.split()
        sizes = np.array([len(word) for word in words])
        starts = turn.start + (turn.end - turn.start) * (np.cumsum(sizes) - sizes) / sizes.sum()
        for word, start in zip(words, starts, strict=True):
            self.transcript.add(int(start * FRAMES_PER_SECOND), WORD_START + word, USER)

    def finish(self) -> list[Passage]:
        """Write what is not complete, and the words; returns the last passages.

        Raises:
            UserError: the disk is full.
        """
        passages = self._tell(self._story.stop(self.seconds, self.transcript))
        for talk in self.talks.values():
            while len(talk.peaks) < talk.frames:  # the reply of the last frames will not come
                self._write(talk, SILENCE)
        for kind in TRANSCRIPTS:
            self.transcript.write(self.folder / f"transcript.{kind}", kind)
        return passages

    def __exit__(self, *_: object) -> None:
        for talk in self.talks.values():
            talk.sound.close()
