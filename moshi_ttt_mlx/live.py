"""A live talk: microphone -> queue -> one worker thread -> queue -> loudspeaker, in real time.

What lives here: the two bounded queues and what they do when the model is late, the watches that
notice a mute microphone, a slow machine or a lost device, and :class:`Talk`, which runs it all. What
does not: sound devices (`devices.py`), files (`keep.py`), and anything on the screen.

    talk = Talk(lambda: Session(load("demo")), microphone, loudspeaker)
    talk.start()
    while not isinstance(event := talk.events.get(), Ended):
        print(event, talk.status())
    talk.save("talk.session")
    talk.close()

All MLX work, loading included, happens on the worker thread: MLX streams belong to the thread that
made them.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .audio import FRAME_SIZE, SAMPLE_RATE

# The command line reads this file for its flags, and MLX takes a second to import.
if TYPE_CHECKING:
    from .session import Session, SpokenFrame

FRAME_MS = 1000 * FRAME_SIZE / SAMPLE_RATE

MEMORY_BROKE = "the memory is no longer finite: it is shut, the talk goes on without it"

HEARD_FRAMES = 12
"""User frames that may wait for the model: about a second of speech survives a hiccup."""

CUSHION_SAMPLES = FRAME_SIZE // 2
"""Silence played ahead of the first reply. A late frame adds its lateness, so a little is enough."""

CALM_FRAMES = 3
"""With more than this ahead of the loudspeaker, silent reply frames are left out to catch up."""

REPLY_FRAMES = HEARD_FRAMES + CALM_FRAMES
"""Reply frames that may wait to be played; only clocks that drift apart get there."""

SILENT_LEVEL = -50.0
"""A reply frame below this (dBFS) is silent: a codec's silence is not made of zeros."""

PATIENCE_SECONDS = 3.0
"""Exact zeros from the microphone, or nothing at all, for this long is no pause in speech."""

LOST_SECONDS = 4.0
"""A device that called before and has not for this long is gone (ALSA takes 2 to recover)."""

LAG_FRAMES = 4
LAG_SECONDS = 5.0
"""The model is too slow when so many frames have waited all this time."""

_PACE_FRAMES = 50  # frame times behind the median: four seconds
_POLL_SECONDS = 0.1
_CLOSE_SECONDS = 5.0


class Device(Protocol):
    """What a talk needs of a microphone or loudspeaker; see `devices.Microphone`."""

    name: str
    calls: int
    glitches: int
    active: bool

    def start(self, exchange: Callable) -> None: ...
    def stop(self) -> None: ...
    def abandon(self) -> None: ...


# -- what the worker tells ------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The devices are open: talk now."""


@dataclass(frozen=True)
class Said:
    """Words, with the seconds since the talk's beginning."""

    text: str
    time: float


@dataclass(frozen=True)
class Warned:
    """Something is wrong, the talk goes on."""

    message: str


@dataclass(frozen=True)
class Ended:
    """The last event of a talk.

    Attributes:
        reason: why it ended by itself; None when it was asked to.
        error: what stopped it, an exception of loading or stepping.
    """

    reason: str | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Status:
    """A talk at one moment.

    Attributes:
        age: seconds of the session, earlier sittings included.
        sitting: seconds of it since this talk began.
        lag_ms: user's sound that waits for the model.
        ahead_ms: reply that waits to be played.
        frame_ms: median time of a frame in the last seconds, None before the first.
        dropped, skipped: user frames that were never heard; reply frames that were never played.
        underruns: times that the loudspeaker ran out of reply.
        glitches: callbacks at which the sound system says that it lost sound.
        user_level, reply_level: dBFS (RMS) of the latest frame.
    """

    age: float = 0.0
    sitting: float = 0.0
    lag_ms: float = 0.0
    ahead_ms: float = 0.0
    frame_ms: float | None = None
    dropped: int = 0
    skipped: int = 0
    underruns: int = 0
    glitches: int = 0
    user_level: float = -100.0
    reply_level: float = -100.0


# -- queues ---------------------------------------------------------------------------------------


class HeardQueue:
    """User frames on their way to the model. When it is full the oldest goes: late is worse."""

    def __init__(self, limit: int = HEARD_FRAMES):
        self.limit, self.dropped = limit, 0
        self._frames: deque[np.ndarray] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: np.ndarray) -> None:
        with self._changed:
            if len(self._frames) == self.limit:
                self._frames.popleft()
                self.dropped += 1
            self._frames.append(frame)
            self._changed.notify()

    def get(self, timeout: float) -> np.ndarray | None:
        """The oldest frame; None when none came within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames, timeout)
            return self._frames.popleft() if self._frames else None


def level(pcm: np.ndarray) -> float:
    """Loudness in dBFS (RMS), -100 at the least."""
    return max(-100.0, 10 * float(np.log10(np.mean(np.square(pcm, dtype=np.float64)) + 1e-10)))


class ReplyQueue:
    """Reply sound on its way to the loudspeaker: frames in, any number of samples out.

    Running dry plays silence, which delays all that follows by as much. So that a hiccup does not
    last for the rest of the talk, silent frames are left out while too much waits.
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
        with self._lock:
            if not self._begun:
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

    def finish(self) -> None:
        """No more frames will come: running dry is right from here on."""
        self._finished = True


# -- watches --------------------------------------------------------------------------------------


class Patience:
    """Says once that something has gone on for too long.

    Time counts in steps of half a second at most: a program that was suspended has not waited.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        self._waited, self._last, self._over = 0.0, None, False

    def over(self, wrong: bool, now: float) -> bool:
        """True at the call at which `wrong` has been true for longer than the patience."""
        step = 0.0 if self._last is None else min(now - self._last, 0.5)
        self._last = now
        self._waited = self._waited + step if wrong else 0.0
        if self._over or self._waited < self._seconds:
            return False
        self._over = True
        return True


class DeviceWatch:
    """Notices a device that has stopped calling back."""

    def __init__(self, device: Device):
        self.device, self._calls = device, 0
        self._lost, self._mute = Patience(LOST_SECONDS), Patience(PATIENCE_SECONDS)

    def check(self, now: float) -> str | None:
        """`"lost"` after it called and then no more, `"mute"` when it never did, both once."""
        still = self.device.calls == self._calls
        self._calls = self.device.calls
        if self._lost.over(still and self._calls > 0, now):
            return "lost"
        if self._calls and not self.device.active:
            return "lost"
        return "mute" if self._mute.over(still and not self._calls, now) else None


def no_sound_message(name: str, what: str) -> str:
    """What a user can do about a microphone that gives nothing."""
    return (
        f"the microphone {name!r} gives {what}. Is it muted? On macOS a program without permission "
        "hears silence: System Settings > Privacy & Security > Microphone > your terminal app, "
        "then start again"
    )


def too_slow_message(frame_ms: float, context: int) -> str:
    """What a user can do about a machine that does not keep up."""
    return (
        f"this machine needs {frame_ms:.0f} ms a frame, {FRAME_MS:.0f} are available: "
        f"try -q 4 or --context {max(1, context // 2)}"
    )


# -- the talk -------------------------------------------------------------------------------------


def leave_mlx() -> None:
    """End what MLX has started for this thread, as the last thing the thread does.

    Left to the end of the process, mlx 0.32.4 aborts it in about half of all runs on Linux, when a
    thread that used MLX has ended before. mlx 0.26.5 has no streams of threads and nothing to end.
    """
    import mlx.core as mx

    if hasattr(mx, "clear_streams"):
        mx.clear_streams()


class Talk:
    """One live talk from loading to the last frame.

    Args:
        open_session: makes the session, on the worker thread; may take minutes and may raise.
        microphone, loudspeaker: devices, not yet started.
        on_frame: called on the worker thread with each step's result and the user's frame; quick.
        max_seconds: end by itself after so much talk.
        clock: seconds; another one in tests.

    Attributes:
        events: `Said`, `Warned`, `Ready`, and `Ended` as the last one.
        session: None until it is loaded.
        started, ended: whether the devices were opened, whether the talk is over.
    """

    def __init__(
        self,
        open_session: "Callable[[], Session]",
        microphone: Device,
        loudspeaker: Device,
        *,
        on_frame: "Callable[[SpokenFrame, np.ndarray], None]" = lambda spoken, user: None,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.heard, self.replies = HeardQueue(), ReplyQueue()
        self.session: Session | None = None
        self.started = self.ended = False
        self._open_session, self._on_frame, self._clock = open_session, on_frame, clock
        self._microphone, self._loudspeaker = microphone, loudspeaker
        self._frames_left = float("inf") if max_seconds is None else max_seconds * 1000 / FRAME_MS
        self._stopping = threading.Event()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        self._pace: deque[float] = deque(maxlen=_PACE_FRAMES)
        self._levels = -100.0, -100.0
        self._first_frame = 0
        self._zeros, self._slow = Patience(PATIENCE_SECONDS), Patience(LAG_SECONDS)
        self._memory_ok = True
        self._thread = threading.Thread(target=self._run, name="talk", daemon=True)

    # -- from other threads

    def start(self) -> None:
        """Begin to load and to talk."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the talk to end after the current frame; `Ended` tells when it has."""
        self._stopping.set()

    def status(self) -> Status:
        """Where the talk stands now, also while the worker is busy with a frame."""
        user_level, reply_level = self._levels
        pace = list(self._pace)
        frames = 0 if self.session is None else self.session.frame
        return Status(
            age=frames * FRAME_MS / 1000,
            sitting=(frames - self._first_frame) * FRAME_MS / 1000,
            lag_ms=len(self.heard) * FRAME_MS,
            ahead_ms=1000 * len(self.replies) / SAMPLE_RATE,
            frame_ms=float(np.median(pace)) if pace else None,
            dropped=self.heard.dropped,
            skipped=self.replies.skipped,
            underruns=self.replies.underruns,
            glitches=self._microphone.glitches + self._loudspeaker.glitches,
            user_level=user_level,
            reply_level=reply_level,
        )

    def save(self, path: str | Path) -> None:
        """Save the session, during the talk or after it; waits until it is written.

        Raises:
            UserError: it could not be written.
        """
        done: Future = Future()
        self._jobs.put((lambda: self.session.save(path), done))
        done.result()

    def close(self) -> None:
        """Let the worker thread go. The session can no longer be saved."""
        self.stop()
        self._jobs.put(None)
        self._thread.join(_CLOSE_SECONDS)

    # -- on the worker thread

    def _run(self) -> None:
        try:
            self.session = self._open_session()
            ended = Ended(self._talk())
        except Exception as error:  # whatever it is, the screen must hear of it
            ended = Ended(error=error)
        self.ended = True
        self.events.put(ended)
        while not self._closed:
            self._do_job(self._jobs.get())
        leave_mlx()

    def _do_job(self, job: tuple[Callable, Future] | None) -> None:
        if job is None:
            self._closed = True
            return
        work, done = job
        try:
            done.set_result(work())
        except Exception as error:  # it belongs to whoever asked
            done.set_exception(error)

    def _talk(self) -> str | None:
        """Open the devices, talk, close them. Returns why it ended by itself, None when asked to."""
        self._begin()
        devices = [self._microphone]
        lost: Device | None = None
        try:
            if self.session.model.speaks:
                self._loudspeaker.start(self.replies.fetch)
                devices.append(self._loudspeaker)
            self._microphone.start(self.heard.put)
            self.started = True
            self.events.put(Ready())
            lost = self._listen([DeviceWatch(device) for device in devices])
            if lost is None:
                self._play_out()
        finally:
            for device in devices:
                # A lost device, or both when the sound server went, may never play its last block.
                device.stop() if lost is None else device.abandon()
        return None if lost is None else f"the device {lost.name!r} is gone"

    def _begin(self) -> None:
        """The silence that an stt model expects before the first sound."""
        self._first_frame = self.session.frame
        if self._first_frame == 0:
            for _ in range(round(self.session.model.silence_prefix * 1000 / FRAME_MS)):
                self._step(np.zeros(FRAME_SIZE, np.float32))

    def _listen(self, watches: list[DeviceWatch]) -> Device | None:
        """Frame after frame, until asked to stop; returns a device that was lost."""
        while not self._stopping.is_set() and self._frames_left > 0:
            frame = self.heard.get(_POLL_SECONDS)
            if frame is not None:
                self._step(frame)
                self._frames_left -= 1
                self._warn_about(frame)
            for watch in watches:
                if self._check(watch) == "lost":
                    return watch.device
            while not self._jobs.empty():
                self._do_job(self._jobs.get())
        return None

    def _step(self, user: np.ndarray) -> None:
        began = self._clock()
        spoken = self.session.step(user)
        self._pace.append(1000 * (self._clock() - began))
        if spoken.pcm is not None:
            self.replies.put(spoken.pcm)
        if spoken.text:
            self.events.put(Said(spoken.text, spoken.time))
        if self._memory_ok and not spoken.memory_ok:
            self.events.put(Warned(MEMORY_BROKE))
        self._memory_ok = spoken.memory_ok
        self._on_frame(spoken, user)
        reply_level = -100.0 if spoken.pcm is None else level(spoken.pcm)
        self._levels = level(user), reply_level

    def _warn_about(self, user: np.ndarray) -> None:
        now = self._clock()
        if self._zeros.over(not user.any(), now):
            what = f"exact zeros for {PATIENCE_SECONDS:.0f} s"
            self.events.put(Warned(no_sound_message(self._microphone.name, what)))
        if self._slow.over(len(self.heard) >= LAG_FRAMES, now):
            self.events.put(Warned(too_slow_message(float(np.mean(self._pace)), self._context)))

    @property
    def _context(self) -> int:
        return self.session.settings.context or self.session.model.lm.cfg.transformer.context

    def _check(self, watch: DeviceWatch) -> str | None:
        found = watch.check(self._clock())
        if found == "mute":
            device = watch.device
            message = f"the loudspeaker {device.name!r} takes no sound: choose another device"
            if device is self._microphone:
                message = no_sound_message(device.name, "no sound at all")
            self.events.put(Warned(message))
        return found

    def _play_out(self) -> None:
        """Let what Moshi has said be heard, unless asked to stop."""
        self.replies.finish()
        for _ in range(100):
            if not len(self.replies) or self._stopping.wait(0.02):
                return
