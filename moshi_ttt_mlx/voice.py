"""How loud sound is, and whether somebody speaks: from levels alone, without a model.

gate = VoiceGate()
heard = gate(pcm)                   # zeros until somebody has spoken
"""

import numpy as np

OPEN_DB = 15.0
"""A frame so far above the room's noise may be speech."""

CLOSE_DB = 8.0
"""Speech stays at least so far above it: vowels and consonants differ, so this is lower."""

LEAST_LEVEL = -50.0
"""dBFS; nothing below is speech, however quiet the room."""

CONFIRM_FRAMES = 3
"""A click is over after one or two frames of 80 ms, a syllable is not."""

NOISE_FRAMES = 25
"""The room's noise is the quietest frame of the last two seconds."""


def level(pcm: np.ndarray) -> float:
    """Loudness of samples of any count, in dBFS (RMS), -100 at the least."""
    return max(-100.0, 10 * float(np.log10(np.mean(np.square(pcm, dtype=np.float64)) + 1e-10)))


class VoiceGate:
    """Silence in place of the microphone until somebody speaks; from then on every frame, for good.

    Hysteresis twice over: a frame `OPEN_DB` above the room's noise opens the gate on trial, so that
    a word's beginning is not lost; it stays so while frames are `CLOSE_DB` above, and for good after
    `CONFIRM_FRAMES` of them. A click closes it again.

    Attributes:
        is_open: whether somebody has spoken.
    """

    def __init__(self):
        self.is_open = False
        self._tried = 0
        self._levels: list[float] = []

    def __call__(self, pcm: np.ndarray) -> np.ndarray:
        """What the model shall hear in place of a frame, float32 of the same shape."""
        if not self.is_open:
            self._listen(level(pcm))
        return pcm if self.is_open or self._tried else np.zeros_like(pcm)

    def _listen(self, loudness: float) -> None:
        noise = max(min(self._levels, default=loudness), LEAST_LEVEL - OPEN_DB)
        if loudness > noise + (CLOSE_DB if self._tried else OPEN_DB):
            self._tried += 1
        else:
            self._tried = 0
        self.is_open = self._tried == CONFIRM_FRAMES
        self._levels = [*self._levels, loudness][-NOISE_FRAMES:]
