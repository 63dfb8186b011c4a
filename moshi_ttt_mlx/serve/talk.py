"""One served talk: a session, the user's frames that wait for it, and the client that listens now.

The event loop calls `hear`, `attach`, `pause`; the model thread calls `waiting`, `turn`, `fail`. What
crosses over: frames through a `HeardQueue`, events through `call_soon_threadsafe`.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from ..audio import FRAME_MS, FRAME_SECONDS, FRAME_SIZE, SILENCE
from ..errors import UserError
from ..frame_queues import HeardQueue
from ..live import MemoryStatus, read_memory
from ..transcript import USER, Transcript
from ..voice import level
from ..watches import (
    LAG_FRAMES,
    LAG_SECONDS,
    MEMORY_BROKE,
    PATIENCE_SECONDS,
    Patience,
    too_slow_message,
)
from .limits import Limits
from .outbox import Event, Outbox
from .sound import KeptSound

if TYPE_CHECKING:
    from ..session import Session, SpokenFrame

NO_SOUND = (
    f"your side has been exact silence for {PATIENCE_SECONDS:.0f} s: is the microphone muted, or not "
    "allowed in the browser or the system's settings?"
)

_PACE_FRAMES = 50
_LOOK_FRAMES = 12  # a memory's norms cost a read of the device: about once a second


class ServedTalk:
    """A talk that a client may leave and take up again.

    Args:
        key: what the client proves that it is the same one with.
        name: under which it is saved, or None.
        session: made on the model thread, and touched nowhere else.
        limits: bounds.
        wake: tells the model thread that a frame waits.
        on_fail: called on the event loop with a reason, when a step has failed.

    Attributes:
        sound: keeps every frame; set before the first one.
        outbox: of the connected client, or None.
        ended: no frame will be stepped any more.
        mode: of the memory.
        words: the transcript that stays when the session is gone.
    """

    def __init__(
        self,
        key: str,
        name: str | None,
        session: "Session",
        limits: Limits,
        wake: Callable[[], None],
        on_fail: Callable[["ServedTalk", str], None],
    ):
        self.key, self.name, self.session = key, name, session
        self.sound: KeptSound | None = None
        self.outbox: Outbox | None = None
        self.ended = self.paused = False
        self.words: Transcript | None = None
        self.began = time.time()
        self._wake, self._on_fail = wake, on_fail
        self._loop = asyncio.get_running_loop()
        self._heard = HeardQueue(limits.heard_frames)
        self._rest = np.empty(0, np.float32)
        self._pace: deque[float] = deque(maxlen=_PACE_FRAMES)
        self._levels = -100.0, -100.0
        self._memory_ok = True
        self._look: MemoryStatus | None = None
        self._frames = session.frame
        self._zeros, self._slow = Patience(PATIENCE_SECONDS), Patience(LAG_SECONDS)
        model, settings = session.model, session.settings
        self.mode = settings.memory
        self._context = settings.context or model.lm.cfg.transformer.context
        # An stt model expects silence before the first sound.
        self._prefix = 0 if session.frame else model.silence_frames

    # -- on the event loop

    @property
    def age(self) -> float:
        """Seconds of talk, earlier sittings included."""
        return round(self._frames * FRAME_SECONDS, 3)

    def attach(self, outbox: Outbox) -> None:
        """Send events there from now on; who listened before is told."""
        if self.outbox is not None:
            self.outbox.close("this talk was taken up by another connection")
        self.outbox = outbox

    def detach(self) -> None:
        """Nobody listens: the frames that wait are still answered, into the transcript."""
        self.outbox = None
        self.pause(False)  # what was asked for on one connection ends with it

    def pause(self, paused: bool) -> None:
        """Hear nothing, or hear again."""
        self.paused = paused
        self._rest = self._rest[:0]

    def hear(self, samples: np.ndarray) -> None:
        """Take sound of any length: float32 `[N]`, finite."""
        if self.paused or self.ended:
            return
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) - len(samples) % FRAME_SIZE
        self._rest = samples[whole:]
        for frame in samples[:whole].reshape(-1, FRAME_SIZE):
            self._heard.put(frame)
        if whole:
            self._wake()

    def meter(self) -> dict:
        """Where the talk stands, as the `meter` message."""
        pace, (user, reply) = list(self._pace), self._levels
        return {
            "type": "meter",
            "age": self.age,
            "lag_ms": round(len(self._heard) * FRAME_MS),
            "frame_ms": round(float(np.median(pace)), 1) if pace else None,
            "dropped": self._heard.dropped,
            "skipped": self.outbox.skipped if self.outbox else 0,
            "window_fill": round(min(1.0, self._frames / self._context), 4),
            "levels": {"user": round(user, 1), "moshi": round(reply, 1)},
            "paused": self.paused,
            "memory": self._memory(),
        }

    def _memory(self) -> dict | None:
        if self._look is None:
            return None
        look = {name: _finite(value) for name, value in asdict(self._look).items()}
        return {"mode": self.mode, "ok": self._memory_ok} | look

    # -- on the model thread

    def waiting(self) -> bool:
        return self._prefix > 0 or len(self._heard) > 0

    def turn(self) -> None:
        frame = self._next_frame()
        began = time.perf_counter()
        spoken = self.session.step(frame)
        self._pace.append(1000 * (time.perf_counter() - began))
        reply = -100.0 if spoken.pcm is None else level(spoken.pcm)
        # Before the client hears of the frame: a meter behind it has seen it.
        self._frames, self._levels = self.session.frame, (level(frame), reply)
        self.sound.put(spoken, frame)
        self._tell(spoken)
        self._watch(spoken, frame)

    def _next_frame(self) -> np.ndarray:
        if self._prefix:
            self._prefix -= 1
            return SILENCE
        return self._heard.get(0)

    def _tell(self, spoken: "SpokenFrame") -> None:
        if spoken.pcm is not None:
            self.emit(spoken.pcm)
        for frame, speaker in ((spoken, self.session.speaker), (spoken.user, USER)):
            if frame is not None and frame.text:
                self.emit(self._word(frame, speaker))

    def _word(self, spoken: "SpokenFrame", speaker: str) -> dict:
        start = self.session.transcript.time(spoken.index, speaker)
        return {
            "type": "word",
            "text": spoken.text,
            "speaker": speaker,
            "start": round(start, 3),
            "end": round(start + FRAME_SECONDS, 3),
        }

    def _watch(self, spoken: "SpokenFrame", user: np.ndarray) -> None:
        now = time.monotonic()
        if self._memory_ok and not spoken.memory_ok:
            self.warn(MEMORY_BROKE)
        self._memory_ok = spoken.memory_ok
        if spoken.index % _LOOK_FRAMES == 0:
            self._look = read_memory(self.session)
        if self._zeros.over(not user.any(), now):
            self.warn(NO_SOUND)
        if self._slow.over(len(self._heard) >= LAG_FRAMES, now):
            self.warn(_late_message(float(np.mean(self._pace)), self._context))

    def fail(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._post(self._on_fail, self, reason)

    def warn(self, message: str) -> None:
        """Tell the client, from any thread."""
        self.emit({"type": "warning", "message": message})

    def emit(self, event: Event) -> None:
        """Send an event to whoever listens, from any thread."""
        self._post(self._deliver, event)

    def _post(self, callback: Callable, *args) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(callback, *args)

    def _deliver(self, event: Event) -> None:
        if self.outbox is not None:
            self.outbox.put(event)


def _late_message(frame_ms: float, context: int) -> str:
    """What can be done about answers that come late."""
    if frame_ms > FRAME_MS:
        return too_slow_message(frame_ms, context)
    return (
        f"the answers are late, though a frame takes {frame_ms:.0f} of {FRAME_MS:.0f} ms: other "
        "talks or other programs take this machine's time"
    )


def _finite(value: float) -> float | None:
    """A number as JSON can hold it: it has no word for what is not finite."""
    return value if math.isfinite(value) else None
