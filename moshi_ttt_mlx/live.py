"""A live talk: microphone -> queue -> one worker thread -> queue -> loudspeaker, in real time.

What lives here: :class:`Talk`, which runs it all: mute, pause, and waiting for a device that was
unplugged. What does not: the queues (`frame_queues.py`), sound devices (`devices.py`), noticing what
is wrong (`watches.py`), files (`keep.py`), the screen.

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

from .audio import FRAME_MS, SAMPLE_RATE, SILENCE
from .errors import UserError
from .frame_queues import CUSHION_SAMPLES, HeardQueue, ReplyQueue
from .quiet_start import QuietStart
from .transcript import MOSHI, USER
from .voice import level
from .watches import (
    LAG_FRAMES,
    LAG_SECONDS,
    MEMORY_BROKE,
    PATIENCE_SECONDS,
    DeviceWatch,
    Patience,
    no_play_message,
    no_sound_message,
    too_slow_message,
)

# The command line reads this file for its flags, and MLX takes a second to import.
if TYPE_CHECKING:
    from .session import Session, SpokenFrame

MAX_WAIT_SECONDS = 300.0
"""A lost device is waited for so long: time to find the cable, not for ever."""

MEMORY_SECONDS = 1.0
"""The memory is looked at once in so many seconds at most: it costs a wait for the device."""

_PACE_FRAMES = 50  # frame times behind the median: four seconds
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_CLOSE_SECONDS = 5.0


class Device(Protocol):
    """What a talk needs of a microphone or loudspeaker; see `devices`."""

    name: str
    calls: int
    glitches: int
    active: bool

    def start(self, exchange: Callable) -> None: ...
    def stop(self) -> None: ...
    def abandon(self) -> None: ...


class Speaker(Device, Protocol):
    """A loudspeaker, which may take its sound in bursts."""

    burst: int


# -- what the worker tells ------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The devices are open: talk now."""


@dataclass(frozen=True)
class Said:
    """Words, with the seconds since the talk's beginning, and whose they are."""

    text: str
    time: float
    speaker: str = MOSHI


@dataclass(frozen=True)
class Noted:
    """Something that is good to know."""

    message: str


@dataclass(frozen=True)
class Saved:
    """The talk so far is in a file."""

    path: str | Path


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
class MemoryStatus:
    """A memory at one moment; see `Session.memory_report`.

    Attributes:
        layers: whose gate is open; 0 when the memory is off or was never trained.
        updates, tokens: folds and tokens so far, the same in every layer.
        step, drift, gate: the largest over the layers.
    """

    layers: int
    updates: int = 0
    tokens: int = 0
    step: float = 0.0
    drift: float = 0.0
    gate: float = 0.0


def read_memory(session: "Session") -> MemoryStatus | None:
    """How a session's memory fares; None without one. Waits for the device: not every frame."""
    if session.model.memory is None:
        return None
    layers = list(session.memory_report().values())
    if not layers:
        return MemoryStatus(layers=0)
    largest = {name: max(layer[name] for layer in layers) for name in ("step", "drift", "gate")}
    return MemoryStatus(len(layers), layers[0]["updates"], layers[0]["tokens"], **largest)


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
        window, filled: frames attention can see, and sees by now.
        memory: as it was in the last seconds; None without one, and before the first look.
        muted, paused: as the user asked.
        hushed: it keeps quiet until the user speaks.
        waiting_for: the device that is gone, None when none is.
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
    window: int = 0
    filled: int = 0
    memory: MemoryStatus | None = None
    muted: bool = False
    paused: bool = False
    hushed: bool = False
    waiting_for: str | None = None


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
        on_words: likewise with each frame of the user's words that comes after the last step.
        max_seconds: end by itself after so much talk.
        find_again: whether the devices, both closed, are there to be started again, after one was
            lost; None ends a talk whose device is lost.
        max_wait: seconds to wait for a lost device.
        quiet_start: say nothing before the user does, see `quiet_start.py`.
        clock: seconds; another one in tests.

    Attributes:
        events: `Said`, `Noted`, `Saved`, `Warned`, `Ready`, and `Ended` as the last one.
        session: None until it is loaded.
        started, ended: whether the devices were opened, whether the talk is over.
        muted: set it, and the model hears silence.
        paused: set it, and the talk stands still: what the microphone hears is thrown away.
    """

    def __init__(
        self,
        open_session: "Callable[[], Session]",
        microphone: Device,
        loudspeaker: Speaker,
        *,
        on_frame: "Callable[[SpokenFrame, np.ndarray], None]" = lambda spoken, user: None,
        on_words: "Callable[[SpokenFrame], None]" = lambda words: None,
        max_seconds: float | None = None,
        find_again: Callable[[], bool] | None = None,
        max_wait: float = MAX_WAIT_SECONDS,
        quiet_start: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.heard, self.replies = HeardQueue(), ReplyQueue(CUSHION_SAMPLES + loudspeaker.burst)
        self.session: Session | None = None
        self.started = self.ended = self.muted = self.paused = False
        self._open_session, self._on_frame, self._clock = open_session, on_frame, clock
        self._on_words = on_words
        self._microphone, self._loudspeaker = microphone, loudspeaker
        self._find_again, self._max_wait = find_again, max_wait
        self._running: list[Device] = []
        self._waiting_for: str | None = None
        self._quiet_start, self._quiet = quiet_start, None
        self._frames_left = float("inf") if max_seconds is None else max_seconds * 1000 / FRAME_MS
        self._stopping = threading.Event()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        self._pace: deque[float] = deque(maxlen=_PACE_FRAMES)
        self._levels = -100.0, -100.0
        self._first_frame = self._frames = 0  # without those that `Session.finish` adds
        self._zeros, self._slow = Patience(PATIENCE_SECONDS), Patience(LAG_SECONDS)
        self._memory_ok = True
        self._memory: MemoryStatus | None = None
        self._look_at = 0.0
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
        frames, window = self._frames, 0 if self.session is None else self._context
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
            window=window,
            filled=min(frames, window),
            memory=self._memory,
            muted=self.muted,
            paused=self.paused,
            hushed=self._quiet is not None and self._quiet.waits,
            waiting_for=self._waiting_for,
        )

    def save(self, path: str | Path) -> None:
        """Save the session, during the talk or after it; waits until it is written.

        Raises:
            UserError: it could not be written.
        """
        done: Future = Future()
        self._jobs.put((lambda: self.session.save(path), done))
        done.result()

    def save_soon(self, path: str | Path) -> None:
        """Save the session without waiting for it: `Saved` or `Warned` tells how it went."""

        def save() -> None:
            try:
                self.session.save(path)
            except UserError as error:
                self.events.put(Warned(f"{error}; the talk goes on"))
            else:
                self.events.put(Saved(path))

        self._jobs.put((save, Future()))

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

    def _do_jobs(self) -> None:
        while not self._jobs.empty():
            self._do_job(self._jobs.get())

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
        lost: Device | None = None
        try:
            self._open()
            self.started = True
            self.events.put(Ready())
            lost = self._listen()
            while lost is not None and self._recover(lost):
                lost = self._listen()
            if lost is None:
                self._play_out()
            self._hear_out()
        finally:
            self._shut(abandon=lost is not None)
        return None if lost is None else f"the device {lost.name!r} is gone"

    def _begin(self) -> None:
        """The silence that an stt model expects before the first sound."""
        self._first_frame = self._frames = self.session.frame
        if self._first_frame == 0:
            for _ in range(self.session.model.silence_frames):
                self._step(SILENCE)
        if self._quiet_start:
            self._quiet = QuietStart(self.session)

    # -- devices

    def _open(self) -> None:
        devices = [(self._microphone, self.heard.put)]
        if self.session.model.speaks:
            devices.insert(0, (self._loudspeaker, self.replies.fetch))
        for device, exchange in devices:
            self._running.append(device)
            device.start(exchange)

    def _shut(self, abandon: bool = False) -> None:
        for device in self._running:
            # A lost device, or both when the sound server went, may never play its last block.
            device.abandon() if abandon else device.stop()
        self._running = []

    def _recover(self, lost: Device) -> bool:
        """Wait for a device to come back, unless asked to stop; False when it took too long.

        The talk stands still meanwhile: silence fed to the model would push out of its window what
        was said, and let it talk to nobody.
        """
        self._shut(abandon=True)
        if self._find_again is None or self._max_wait <= 0:
            return False
        self.events.put(Warned(f"{lost.name!r} is gone: plug it in again, the talk waits for it"))
        self.replies.rest()
        self._waiting_for = lost.name
        until = self._clock() + self._max_wait
        back = False
        while not back and self._clock() < until and not self._stopping.wait(_RETRY_SECONDS):
            self._do_jobs()
            back = self._reopen()
        self._waiting_for = None
        if back:
            self.events.put(Noted(f"{lost.name!r} is back: the talk goes on"))
        return back or self._stopping.is_set()

    def _reopen(self) -> bool:
        """Whether all devices could be opened again and do call."""
        if not self._find_again():
            return False
        before = {id(device): device.calls for device in (self._microphone, self._loudspeaker)}
        try:
            self._open()
        except UserError:
            self._shut(abandon=True)
            return False
        for _ in range(round(PATIENCE_SECONDS / _POLL_SECONDS)):
            if all(device.calls > before[id(device)] for device in self._running):
                self.heard.clear()
                return True
            if self._stopping.wait(_POLL_SECONDS):
                break
        self._shut(abandon=True)
        return False

    # -- frames

    def _listen(self) -> Device | None:
        """Frame after frame, until asked to stop; returns a device that was lost."""
        watches = [DeviceWatch(device) for device in self._running]
        while not self._stopping.is_set() and self._frames_left > 0:
            frame = self.heard.get(_POLL_SECONDS)
            if self.paused:
                self._rest()
            elif frame is not None:
                self._hear(np.zeros_like(frame) if self.muted else frame)
            for watch in watches:
                if self._check(watch) == "lost":
                    return watch.device
            self._do_jobs()
        return None

    def _rest(self) -> None:
        self.replies.rest()
        self._slow.reset()
        self._zeros.reset()

    def _hear(self, frame: np.ndarray) -> None:
        self._step(frame)
        self._frames_left -= 1
        self._warn_about(frame)
        if self._clock() >= self._look_at and not len(self.heard):
            self._memory = read_memory(self.session)
            self._look_at = self._clock() + MEMORY_SECONDS

    def _step(self, user: np.ndarray) -> None:
        began = self._clock()
        spoken = (self._quiet or self.session).step(user)
        self._pace.append(1000 * (self._clock() - began))
        self._frames = self.session.frame
        if spoken.pcm is not None:
            self.replies.put(spoken.pcm)
        if spoken.text:
            self.events.put(Said(spoken.text, spoken.time, self.session.speaker))
        if spoken.user is not None:
            self._tell_user(spoken.user)
        if self._memory_ok and not spoken.memory_ok:
            self.events.put(Warned(MEMORY_BROKE))
        self._memory_ok = spoken.memory_ok
        self._on_frame(spoken, user)
        reply_level = -100.0 if spoken.pcm is None else level(spoken.pcm)
        self._levels = level(user), reply_level

    def _tell_user(self, words: "SpokenFrame") -> None:
        if words.text:
            time = self.session.transcript.time(words.index, USER)
            self.events.put(Said(words.text, time, USER))

    def _hear_out(self) -> None:
        """The user's last words, which trail (`user_words.py`)."""
        for words in self.session.finish():
            self._tell_user(words)
            self._on_words(words)

    def _warn_about(self, user: np.ndarray) -> None:
        now = self._clock()
        if self._zeros.over(not self.muted and not user.any(), now):
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
            name, what = watch.device.name, "no sound at all"
            is_deaf = watch.device is self._microphone
            message = no_sound_message(name, what) if is_deaf else no_play_message(name)
            self.events.put(Warned(message))
        return found

    def _play_out(self) -> None:
        """Let what Moshi has said be heard, unless asked to stop."""
        self.replies.finish()
        for _ in range(100):
            if not len(self.replies) or self._stopping.wait(0.02):
                return
