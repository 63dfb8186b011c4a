"""No greeting: until the user speaks the model hears silence, and what it says is dropped.

What lives here: :class:`QuietStart`, a session that keeps quiet until then. What does not: deciding
whether somebody speaks (`voice.py`), devices, the screen: the terminal and the page both use it.

Moshi opens a talk by itself. Not stepping it would only put that off to the user's first words, so it
is stepped, on exact silence, and gets its greeting over with unheard.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .transcript import WORD_START, Transcript
from .voice import VoiceGate

if TYPE_CHECKING:
    from .session import Session, SpokenFrame


class QuietStart:
    """Steps a session that says nothing before the user does.

    Sound comes back with the user's voice; words from the next whole one on. What was dropped is not
    in the session's transcript either.

    Args:
        session: at any point of a talk.
    """

    def __init__(self, session: "Session"):
        self._session, self._gate = session, VoiceGate()
        self._wordless = True

    @property
    def waits(self) -> bool:
        """Whether nobody has spoken yet."""
        return not self._gate.is_open

    def step(self, user: np.ndarray) -> "SpokenFrame":
        """`Session.step`, without what is not to be heard: arguments and result as there."""
        heard = self._gate(user)
        if not self._wordless:
            return self._session.step(heard)
        spoken = self._step_unwritten(heard)
        if self.waits:
            return replace(spoken, text="", piece=None, codes=None, pcm=None)
        if spoken.piece is None or not spoken.piece.startswith(WORD_START):
            return replace(spoken, text="", piece=None)
        self._wordless = False
        words = self._session.transcript.add(spoken.index, spoken.piece, self._session.speaker)
        return replace(spoken, text=words or "")

    def _step_unwritten(self, heard: np.ndarray) -> "SpokenFrame":
        """One step whose words do not reach the transcript, also if the talk is saved after it."""
        kept, self._session.transcript = self._session.transcript, Transcript()
        try:
            return self._session.step(heard)
        finally:
            self._session.transcript = kept
