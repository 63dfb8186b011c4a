"""Watches over a live talk: each says once that something has gone on for too long, and what to do.

What lives here: patience, devices that fall silent, and the sentences a user reads then. What does
not: the talk that asks them (`live.py`).
"""

from typing import Protocol

from .audio import FRAME_MS

PATIENCE_SECONDS = 3.0
"""Exact zeros from the microphone, or nothing at all, for this long is no pause in speech."""

LOST_SECONDS = 4.0
"""A device that called before and has not for this long is gone (ALSA takes 2 to recover)."""

LAG_FRAMES = 4
LAG_SECONDS = 5.0
"""The model is too slow when so many frames have waited all this time."""

MEMORY_BROKE = "the memory is no longer finite: it is shut, the talk goes on without it"
"""What a user reads when `SpokenFrame.memory_ok` has become false."""


class Counted(Protocol):
    """What a watch looks at: how often a device has called, and whether it is still open."""

    name: str
    calls: int
    active: bool


class Patience:
    """Says once that something has gone on for too long.

    Time counts in steps of half a second at most: a program that was suspended has not waited.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Wait from the beginning, and say it once more if need be."""
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

    def __init__(self, device: Counted):
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


def no_play_message(name: str) -> str:
    """What a user can do about a loudspeaker that never asks for sound."""
    return f"the loudspeaker {name!r} takes no sound: choose another device"


def too_slow_message(frame_ms: float, context: int) -> str:
    """What a user can do about a machine that does not keep up."""
    return (
        f"this machine needs {frame_ms:.0f} ms a frame, {FRAME_MS:.0f} are available: "
        f"try -q 4 or --context {max(1, context // 2)}"
    )
