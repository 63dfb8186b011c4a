"""Events on their way to one client. Lives on the event loop; the model never waits for a client.

An event is a reply frame (float32 `[1920]`) or one of the server's JSON messages of docs/server.md,
as a dict. Order is kept, with two exceptions: a meter waits behind all else and only the latest one
is sent, and of too many reply frames the oldest go.
"""

import asyncio
from collections import deque

import numpy as np

from .limits import Limits

Event = np.ndarray | dict

# Why a WebSocket is closed (RFC 6455, section 7.4.1).
DONE = 1000
GOING_AWAY = 1001
POLICY = 1008
INTERNAL = 1011


def ended(reason: str, again: bool = False) -> dict:
    """The last message of a connection."""
    return {"type": "ended", "reason": reason, "again": again}


class Outbox:
    """Bounded queue of events, ended by :meth:`close`.

    Attributes:
        skipped: reply frames that the client was too slow for.
        code, reason: why the WebSocket is closed after the last event.
        closed: nothing more goes in.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._events: deque[Event] = deque()
        self._frames = 0
        self._meter: dict | None = None
        self._changed = asyncio.Event()
        self.skipped, self.code, self.reason, self.closed = 0, DONE, "", False

    def put(self, event: Event) -> None:
        """Take one event; after `close` it is dropped."""
        if self.closed:
            return
        if isinstance(event, np.ndarray):
            self._put_frame(event)
        elif event["type"] == "meter":
            self._meter = event
        elif len(self._events) - self._frames >= self._limits.outbox_events:
            self.close("this client does not read what it is sent", again=True, code=POLICY)
        else:
            self._events.append(event)
        self._changed.set()

    def _put_frame(self, frame: np.ndarray) -> None:
        if self._frames == self._limits.outbox_frames:
            # By hand: arrays have no `==` that `deque.remove` could use.
            oldest = next(i for i, e in enumerate(self._events) if isinstance(e, np.ndarray))
            del self._events[oldest]
            self._frames -= 1
            self.skipped += 1
        self._events.append(frame)
        self._frames += 1

    def close(self, reason: str, again: bool = False, code: int = DONE) -> None:
        """Say why it ends, after what waits already; only the first reason counts."""
        if self.closed:
            return
        self.closed, self.code, self.reason, self._meter = True, code, reason, None
        self._events.append(ended(reason, again))
        self._changed.set()

    async def get(self) -> Event | None:
        """The next event; None after the last one."""
        while True:
            if self._events:
                event = self._events.popleft()
                self._frames -= isinstance(event, np.ndarray)
                return event
            if self._meter is not None:
                event, self._meter = self._meter, None
                return event
            if self.closed:
                return None
            self._changed.clear()
            await self._changed.wait()
