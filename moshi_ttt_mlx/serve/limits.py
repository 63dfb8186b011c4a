"""How much of everything a server allows, in one place, and the bucket that bounds a rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..frame_queues import HEARD_FRAMES


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    Attributes:
        sessions: talks at a time.
        waiting: clients that may wait for a place.
        start_seconds: a connection that has not said `start` by then is closed.
        resume_seconds: how long a talk without its client stands still.
        message_bytes, text_bytes: of one binary message, of one JSON or Opus message.
        heard_frames: user frames that may wait for the model; then the oldest go.
        outbox_frames: reply frames that may wait for a slow client; then the oldest go.
        outbox_events: words and answers that may wait; then the client is disconnected.
        burst_seconds: sound that may come at once; more must come at twice its pace at most.
        requests: JSON messages that may come at once, and a second.
        kept_talks: talks whose downloads stay.
        record_minutes: of each talk's sound; 0 keeps none.
    """

    sessions: int = 1
    waiting: int = 16
    start_seconds: float = 10.0
    resume_seconds: float = 60.0
    message_bytes: int = 1 << 18
    text_bytes: int = 1 << 14
    heard_frames: int = HEARD_FRAMES
    outbox_frames: int = 50
    outbox_events: int = 1000
    burst_seconds: float = 60.0
    requests: int = 20
    kept_talks: int = 16
    record_minutes: float = 120.0


class Bucket:
    """Lets through `burst` at once, and `rate` a second on average.

    Args:
        clock: seconds; another one in tests.
    """

    def __init__(self, burst: float, rate: float, clock: Callable[[], float] = time.monotonic):
        self._burst, self._rate, self._clock = burst, rate, clock
        self._left, self._last = burst, clock()

    def take(self, amount: float) -> bool:
        """Whether so much is allowed now; it is taken if so."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._last) * self._rate)
        self._last = now
        if amount > self._left:
            return False
        self._left -= amount
        return True
