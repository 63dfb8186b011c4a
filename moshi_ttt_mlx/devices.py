"""Sound devices: any microphone and loudspeaker, whatever its rate and channels, as 24 kHz mono.

What lives here: finding devices, :class:`Microphone` (calls back with frames of 80 ms),
:class:`Loudspeaker` (asks for samples). What does not: queues and what to do about a lost device.

    microphone = Microphone(find_device("input", "usb"))
    microphone.start(print)                             # float32 [1920], from PortAudio's thread
    microphone.stop()

sounddevice (PortAudio) opens devices and soxr resamples.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import soxr

from .audio import FRAME_SIZE, SAMPLE_RATE
from .errors import UserError

BLOCK_SECONDS = 0.02
"""Sound in one callback: short, so that a resampled frame does not wait long for its last block."""

LATENCY_SECONDS = {"Core Audio": 0.1, "ALSA": 0.2}
"""Buffer asked of PortAudio: a callback in Python may have to wait for its turn. ALSA's pulse plugin
needs about two seconds to recover from an underrun, so there the buffer is larger."""

_LATENCY_ELSEWHERE = 0.15

BURST_SECONDS = {"ALSA": 0.06}
"""Sound that a device takes, or brings, in one go where that is more than a block: PortAudio's ALSA
side calls back three times in a row (seen with the pulse plugin)."""

_WORDS = {"input": "microphone", "output": "loudspeaker"}


@dataclass(frozen=True)
class Device:
    """A device as PortAudio lists it.

    Args:
        index: its number in the list.
        kind: ``"input"`` or ``"output"``.
        channels: what it has of that kind.
        rate: samples per second it prefers.
        host: the system's interface to it, such as ``Core Audio`` or ``ALSA``.
    """

    index: int
    name: str
    kind: str
    channels: int
    rate: float
    host: str


def _portaudio() -> ModuleType:
    """sounddevice, imported on first use: it loads the system's PortAudio library."""
    try:
        import sounddevice
    except OSError as error:
        raise UserError(
            f"live talk needs the PortAudio library ({error}): install it "
            "(Debian, Ubuntu: apt install libportaudio2; macOS: it comes with sounddevice)"
        ) from error
    except ImportError as error:
        raise UserError("live talk needs sounddevice: pip install sounddevice") from error
    _hush_alsa()
    return sounddevice


@ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p
)
def _say_nothing(*_: object) -> None:
    pass


@cache
def _hush_alsa() -> None:
    """Linux's ALSA reports every underrun on stderr, into the middle of the screen; we count them."""
    with suppress(OSError):  # there is none on other systems
        ctypes.CDLL("libasound.so.2").snd_lib_error_set_handler(_say_nothing)


@contextmanager
def _without_chatter() -> Iterator[None]:
    """PortAudio writes on the program's stderr what it also returns: keep the screen clean."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def all_devices(kind: str) -> list[Device]:
    """Every device that can listen (``"input"``) or play (``"output"``).

    Raises:
        UserError: no PortAudio.
    """
    sounddevice = _portaudio()
    hosts = [host["name"] for host in sounddevice.query_hostapis()]
    return [
        Device(
            index,
            entry["name"],
            kind,
            entry[f"max_{kind}_channels"],
            entry["default_samplerate"],
            hosts[entry["hostapi"]],
        )
        for index, entry in enumerate(sounddevice.query_devices())
        if entry[f"max_{kind}_channels"] > 0
    ]


def describe_devices() -> str:
    """A table of all devices for people; ``*`` marks what is used when none is named."""
    lines = []
    for kind in ("input", "output"):
        default = _default_index(kind)
        lines.append(f"{kind}:")
        for device in all_devices(kind):
            mark = "*" if device.index == default else " "
            lines.append(
                f"  {mark} {device.index:3}  {device.name}  "
                f"({device.host}, {device.channels} channels, {device.rate:.0f} Hz)"
            )
        if lines[-1] == f"{kind}:":
            lines.append("    none")
    return "\n".join(lines)


def _default_index(kind: str) -> int:
    """-1 where there is none."""
    return _portaudio().default.device[0 if kind == "input" else 1]


def find_device(kind: str, name: str | None = None) -> Device:
    """The device that a user means.

    Args:
        kind: ``"input"`` or ``"output"``.
        name: its number, its name, or a part of it in any case; None takes the system's choice.

    Raises:
        UserError: no PortAudio, no device at all, none or several that match.
    """
    devices = all_devices(kind)
    if not devices:
        raise UserError(
            f"found no {_WORDS[kind]}: connect one (--list-devices shows what there is)"
        )
    if name is None:
        found = [d for d in devices if d.index == _default_index(kind)] or devices[:1]
    elif name.strip().isdigit():
        found = [d for d in devices if d.index == int(name)]
    else:
        part = [d for d in devices if name.lower() in d.name.lower()]
        found = [d for d in part if d.name.lower() == name.lower()] or part
    if len(found) != 1:
        raise UserError(_no_match(kind, name, devices, found))
    return found[0]


def _no_match(kind: str, name: str | None, devices: list[Device], found: list[Device]) -> str:
    listed = ", ".join(f"{d.index} {d.name!r}" for d in found or devices)
    if found:
        return f"--{kind}-device {name!r} matches several, give a number: {listed}"
    return f"no {kind} device {name!r}; there are: {listed}"


def _can_open(device: Device, rate: float, channels: int) -> bool:
    sounddevice = _portaudio()
    check = getattr(sounddevice, f"check_{device.kind}_settings")
    try:
        with _without_chatter():
            check(device=device.index, channels=channels, dtype="float32", samplerate=rate)
    except (sounddevice.PortAudioError, ValueError):
        return False
    return True


def _settings(device: Device) -> tuple[int, int]:
    """Rate and channels to open a device with.

    Two channels where there are two: on macOS a mono stream plays on the left side only, and a
    microphone on the right input of an interface would not be heard.
    """
    channels = min(2, device.channels)
    # Core Audio says yes to 24 kHz and then stutters on Bluetooth microphones: take their own rate.
    if device.host != "Core Audio" and _can_open(device, SAMPLE_RATE, channels):
        return SAMPLE_RATE, channels
    return round(device.rate), channels


class Resampler:
    """A stream of mono sound at one rate, as a stream at another; the same rate passes untouched.

    Args:
        source, target: samples per second.
    """

    def __init__(self, source: int, target: int):
        same = source == target
        self._stream = None if same else soxr.ResampleStream(source, target, 1, dtype="float32")

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Float32 ``[N]`` in, all that is ready out; what is missing comes with later calls."""
        return samples if self._stream is None else self._stream.resample_chunk(samples)


class Framer:
    """Blocks of any length in, whole frames out: float32 ``[1920]`` each."""

    def __init__(self):
        self._rest = np.empty(0, np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """The frames that became whole, ``[frames, 1920]``."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) - len(samples) % FRAME_SIZE
        self._rest = samples[whole:]
        return samples[:whole].reshape(-1, FRAME_SIZE)


class _Stream:
    """What both directions share: opening, closing, and counting PortAudio's calls.

    Attributes:
        glitches: callbacks at which PortAudio said that sound was lost.
        calls: callbacks so far; where this stands still, the device is gone.
    """

    def __init__(self, device: Device, rate: int | None = None):
        self.device, self.name = device, device.name
        self._asked_rate = rate
        self.rate, self.channels = _settings(device)
        self.rate = rate or self.rate
        self.glitches = 0
        self.calls = 0
        self._stream = None

    def _open(self, callback: Callable) -> None:
        sounddevice = _portaudio()
        streams = {"input": sounddevice.InputStream, "output": sounddevice.OutputStream}
        try:
            with _without_chatter():
                self._stream = streams[self.device.kind](
                    device=self.device.index,
                    samplerate=self.rate,
                    channels=self.channels,
                    blocksize=round(self.rate * BLOCK_SECONDS),
                    latency=LATENCY_SECONDS.get(self.device.host, _LATENCY_ELSEWHERE),
                    dtype="float32",
                    callback=callback,
                )
                self._stream.start()
        except (sounddevice.PortAudioError, ValueError) as error:
            raise UserError(
                f"cannot open the {_WORDS[self.device.kind]} {self.name!r}: {error}; "
                f"choose another with --{self.device.kind}-device (--list-devices)"
            ) from error

    def find_again(self) -> bool:
        """Look for the same device by its name; True when `start` can open it as it is now.

        To be asked while it is closed: its number, rate and channels may have changed.
        """
        found = [d for d in all_devices(self.device.kind) if d.name == self.name]
        if not found:
            return False
        self.device = next((d for d in found if d.host == self.device.host), found[0])
        rate, self.channels = _settings(self.device)
        self.rate = self._asked_rate or rate
        return True

    def _called(self, status) -> None:
        self.calls += 1
        self.glitches += bool(status)

    @property
    def active(self) -> bool:
        """Whether PortAudio still runs the stream. A device that went may go on saying so."""
        return self._stream is not None and self._stream.active

    def stop(self) -> None:
        """Close the device."""
        if self._stream is not None:
            self._stream.stop()
            self._stream.close()
        self._stream = None

    def abandon(self) -> None:
        """Close a device that no longer answers: what it still holds is not waited for."""
        if self._stream is not None:
            self._stream.abort()
            self._stream.close()
        self._stream = None


class Microphone(_Stream):
    """Listens to a device.

    Args:
        device: from `find_device`.
        rate: samples per second to open it with; None takes 24 kHz where the device can.
    """

    def start(self, deliver: Callable[[np.ndarray], None]) -> None:
        """Open the device; `deliver` gets float32 ``[1920]`` at 24 kHz, on PortAudio's thread.

        Raises:
            UserError: the device is gone or taken.
        """
        resample, frame = Resampler(self.rate, SAMPLE_RATE), Framer()

        def callback(block: np.ndarray, _frames: int, _time, status) -> None:
            self._called(status)
            for samples in frame(resample(block.mean(axis=1, dtype=np.float32))):
                deliver(samples)

        self._open(callback)


class Loudspeaker(_Stream):
    """Plays on a device. Arguments as for `Microphone`."""

    @property
    def burst(self) -> int:
        """Samples at 24 kHz by which it may be ahead of the clock: so much should wait for it."""
        return round(SAMPLE_RATE * BURST_SECONDS.get(self.device.host, 0.0))

    def stop(self) -> None:
        """Close the device after what was given to it is played."""
        if self._stream is not None and self._stream.active:
            # PortAudio should wait by itself; its ALSA side cuts the last 0.1 s off.
            time.sleep(self._stream.latency)
        super().stop()

    def start(self, fetch: Callable[[int], np.ndarray]) -> None:
        """Open the device; `fetch(n)` must give float32 ``[n]`` at 24 kHz, on PortAudio's thread.

        Raises:
            UserError: the device is gone or taken.
        """
        resample = Resampler(SAMPLE_RATE, self.rate)
        block_size = round(SAMPLE_RATE * BLOCK_SECONDS)
        ready = np.empty(0, np.float32)

        def callback(block: np.ndarray, frames: int, _time, status) -> None:
            nonlocal ready
            self._called(status)
            while len(ready) < frames:
                ready = np.concatenate([ready, resample(fetch(block_size))])
            block[:] = np.clip(ready[:frames, None], -1.0, 1.0)
            ready = ready[frames:]

        self._open(callback)


def find_again(*streams: _Stream) -> bool:
    """Look for closed devices by their names, one that was unplugged among them.

    PortAudio lists the devices once, when it begins: so it is ended and begun again, which no open
    stream of this process would survive.

    Returns:
        Whether all are there.
    """
    sounddevice = _portaudio()
    try:
        if sounddevice._initialized:
            sounddevice._terminate()
        sounddevice._initialize()
        return all(stream.find_again() for stream in streams)
    except sounddevice.PortAudioError:
        return False
