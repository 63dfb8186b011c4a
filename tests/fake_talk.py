"""A session, devices and a clock without MLX and without sound, so that live talk is deterministic."""

import threading
from types import SimpleNamespace

import numpy as np

from moshi_ttt_mlx.audio import FRAME_SIZE
from moshi_ttt_mlx.session import SpokenFrame
from moshi_ttt_mlx.transcript import Transcript


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


class FakeSession:
    """Says one word a frame; its reply to a frame is that frame, halved.

    `gate`: when given, a step waits for it. `cost`: seconds of `clock` that a step takes.
    `breaks_at`: the frame from which its memory is no longer finite. `hears`: it writes the user's
    words, too, two frames late.
    """

    def __init__(
        self,
        *,
        clock=None,
        cost=0.0,
        gate=None,
        speaks=True,
        prefix=0.0,
        fail_at=None,
        breaks_at=np.inf,
        hears=False,
    ):
        transformer = SimpleNamespace(context=3000)
        lm = SimpleNamespace(cfg=SimpleNamespace(transformer=transformer))
        self.model = SimpleNamespace(
            speaks=speaks,
            silence_frames=round(prefix / 0.08),
            silence_prefix=prefix,
            lm=lm,
            memory=None,
        )
        self.settings = SimpleNamespace(context=None)
        self.clock, self.cost, self.gate, self.fail_at = clock, cost, gate, fail_at
        self.breaks_at, self.hears = breaks_at, hears
        self.speaker = "moshi" if speaks else "user"
        self.transcript = Transcript({"user": 0.16} if hears else {})
        self.frame, self.users, self.threads, self.saved = 0, [], set(), []
        self.stepping = threading.Event()

    def step(self, user):
        self.threads.add(threading.get_ident())
        self.stepping.set()
        if self.gate:
            assert self.gate.acquire(timeout=120)
        if self.clock:
            self.clock.now += self.cost
        if self.frame == self.fail_at:
            raise RuntimeError("out of memory")
        index, piece = self.frame, f"\u2581w{self.frame}"
        self.frame += 1
        self.users.append(user)
        text = self.transcript.add(index, piece, self.speaker)
        pcm = user / 2 if self.model.speaks else None
        ok, words = index < self.breaks_at, self._words(index) if self.hears else None
        return SpokenFrame(index, index * 0.08, text, piece, None, pcm, ok, words)

    def _words(self, index):
        piece = f"\u2581u{index - 2}" if index > 1 else None
        text = self.transcript.add(index, piece, "user") if piece else ""
        return SpokenFrame(index, index * 0.08, text, piece, None, None)

    def finish(self):
        return [self._words(self.frame + i) for i in range(2)] if self.hears else []

    def warm_up(self):
        assert self.frame == 0

    def save(self, path):
        self.threads.add(threading.get_ident())
        self.saved.append(str(path))


class FakeDevice:
    """A microphone or loudspeaker that a test operates by hand."""

    burst = 0

    def __init__(self, name="fake"):
        self.name, self.calls, self.glitches, self.active = name, 0, 0, False
        self.exchange = None
        self.ending = None

    def start(self, exchange):
        self.exchange, self.active = exchange, True

    def stop(self):
        self.ending, self.active = "stopped", False

    def abandon(self):
        self.ending, self.active = "abandoned", False

    def speak(self, *frames):
        """As a microphone: deliver frames."""
        for frame in frames:
            self.calls += 1
            self.exchange(frame)


class EagerDevice(FakeDevice):
    """A loudspeaker that has called again whenever one looks."""

    @property
    def calls(self):
        self._calls += 1
        return self._calls

    @calls.setter
    def calls(self, value):
        self._calls = value


class PlayingDevice(FakeDevice):
    """A loudspeaker that plays 20 ms every 2 ms on a thread, and remembers."""

    def start(self, exchange):
        super().start(exchange)
        self.played = []
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.thread.start()

    def _play(self):
        pause = threading.Event()
        while self.active:
            self.calls += 1
            self.played.append(self.exchange(480))
            pause.wait(0.002)

    @property
    def sound(self):
        self.thread.join()
        return np.concatenate(self.played)


def voice(value=0.5):
    """A frame that is not silent; its level tells which one it is."""
    return np.full(FRAME_SIZE, value, np.float32)


SILENCE = np.zeros(FRAME_SIZE, np.float32)
