"""The two bounded queues of a talk, and what they do when the model is late.

What lives here: :class:`HeardQueue` in front of the model, :class:`ReplyQueue` in front of the
loudspeaker. What does not: the threads at their ends (`live.py`, `serve/talk.py`).
"""

import threading
from collections import deque

import numpy as np

from .audio import FRAME_SIZE
from .voice import level

HEARD_FRAMES = 12
"""User frames that may wait for the model: about a second of speech survives a hiccup."""

CUSHION_SAMPLES = FRAME_SIZE // 2
"""Silence played ahead of the first reply, beside a loudspeaker's burst. A late frame adds its
lateness, so a little is enough."""

CALM_FRAMES = 3
"""With more than this ahead of the loudspeaker, silent reply frames are left out to catch up."""

REPLY_FRAMES = HEARD_FRAMES + CALM_FRAMES
"""Reply frames that may wait to be played; only clocks that drift apart get there."""

SILENT_LEVEL = -50.0
"""A reply frame below this (dBFS) is silent: a codec's silence is not made of zeros."""


class HeardQueue:
    """User frames on their way to the model. When it is full the oldest goes: late is worse.

    Args:
        limit: frames that may wait.

    Attributes:
        dropped: frames that went.
    """

    def __init__(self, limit: int = HEARD_FRAMES):
        self.limit, self.dropped = limit, 0
        self._frames: deque[np.ndarray] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: np.ndarray) -> None:
        """Take a frame, float32 `[1920]`; from any thread."""
        with self._changed:
            if len(self._frames) == self.limit:
                self._frames.popleft()
                self.dropped += 1
            self._frames.append(frame)
            self._changed.notify()

    def clear(self) -> None:
        """Forget what waits, uncounted: it is too old to be heard."""
        with self._changed:
            self._frames.clear()

    def get(self, timeout: float) -> np.ndarray | None:
        """The oldest frame; None when none came within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames, timeout)
            return self._frames.popleft() if self._frames else None


class ReplyQueue:
    """Reply sound on its way to the loudspeaker: frames in, any number of samples out.

    Running dry plays silence, which delays all that follows by as much. So that a hiccup does not
    last for the rest of the talk, silent frames are left out while too much waits.

    Args:
        cushion: samples of silence that go ahead of the first reply.

    Attributes:
        underruns: times that it ran dry between two replies.
        skipped: reply frames that were left out.
    """

    def __init__(self, cushion: int = CUSHION_SAMPLES):
        self.underruns = self.skipped = 0
        self._cushion, self._begun, self._dry, self._finished = cushion, False, False, False
        self._samples = np.empty(0, np.float32)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._samples)

    def put(self, frame: np.ndarray) -> None:
        """Take a reply frame, float32 `[1920]`: the first one after a rest behind the cushion."""
        with self._lock:
            if not self._begun and not len(self):
                self._samples = np.zeros(self._cushion, np.float32)
            self._begun = True
            silent = level(frame) < SILENT_LEVEL
            if silent and len(self) > CALM_FRAMES * FRAME_SIZE:
                self.skipped += 1
                return
            waiting = self._samples
            if len(waiting) > (REPLY_FRAMES - 1) * FRAME_SIZE:
                waiting = waiting[FRAME_SIZE:]
                self.skipped += 1
            self._samples = np.concatenate([waiting, frame])

    def fetch(self, count: int) -> np.ndarray:
        """The next samples, float32 `[count]`: silence before the first reply and when it is late."""
        with self._lock:
            taken, self._samples = self._samples[:count], self._samples[count:]
            was_dry, self._dry = self._dry, len(taken) < count
            self.underruns += self._dry and not was_dry and self._begun and not self._finished
        return np.pad(taken, (0, count - len(taken)))

    def rest(self) -> None:
        """No frames will come for a while: until one does, running dry is right."""
        self._begun = False

    def finish(self) -> None:
        """No more frames will come: running dry is right from here on."""
        self._finished = True
