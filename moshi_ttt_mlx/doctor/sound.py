"""Microphone and loudspeaker: what they are called, whether they answer, and how loud it is."""

import threading

import numpy as np

from ..audio import SAMPLE_RATE
from ..devices import Loudspeaker, Microphone, find_device
from ..voice import level
from ..watches import no_play_message, no_sound_message
from .case import Case
from .finding import Finding

LISTEN_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
"""A device that has not answered for so long does not answer."""

NO_AUDIO = "left out with --no-audio"


class _Listener:
    """Keeps what a microphone delivers until there is enough."""

    def __init__(self, samples: int):
        self.enough = threading.Event()
        self._frames: list[np.ndarray] = []
        self._missing = samples

    def take(self, frame: np.ndarray) -> None:
        """A frame, on the sound system's thread."""
        self._frames.append(frame)
        self._missing -= len(frame)
        if self._missing <= 0:
            self.enough.set()

    @property
    def heard(self) -> np.ndarray:
        """Float32 `[N]`; empty where nothing came."""
        return np.concatenate(self._frames) if self._frames else np.empty(0, np.float32)


def _facts(device) -> dict:
    found = device.device
    return {
        "name": device.name,
        "host": found.host,
        "rate": device.rate,
        "channels": device.channels,
    }


def check_microphone(case: Case) -> Finding:
    """One second from the microphone. Exact zeros are no silence: macOS gives them without
    permission."""
    if not case.audio:
        return Finding("microphone", "skipped", NO_AUDIO)
    microphone = Microphone(find_device("input", case.input_device))
    listener = _Listener(round(LISTEN_SECONDS * SAMPLE_RATE))
    microphone.start(listener.take)
    try:
        listener.enough.wait(LISTEN_SECONDS + PATIENCE_SECONDS)
    finally:
        microphone.stop()
    return _judge_input(microphone, listener.heard)


def _judge_input(microphone: Microphone, heard: np.ndarray) -> Finding:
    facts = _facts(microphone) | {"seconds": len(heard) / SAMPLE_RATE}
    if not len(heard):
        line = no_sound_message(microphone.name, "no sound at all")
        return Finding("microphone", "problem", line, facts)
    loudness, peak = level(heard), 20 * float(np.log10(np.abs(heard).max() + 1e-10))
    facts |= {"rms_dbfs": round(loudness, 1), "peak_dbfs": round(peak, 1)}
    if not heard.any():
        seconds = f"exact zeros for {len(heard) / SAMPLE_RATE:.1f} s"
        return Finding("microphone", "problem", no_sound_message(microphone.name, seconds), facts)
    line = (
        f"{microphone.name!r} ({facts['host']}, {microphone.rate} Hz): "
        f"{loudness:.0f} dBFS, peak {peak:.0f}"
    )
    return Finding("microphone", "ok", line, facts)


def check_loudspeaker(case: Case) -> Finding:
    """Whether the loudspeaker takes sound; it is given a moment of silence."""
    if not case.audio:
        return Finding("loudspeaker", "skipped", NO_AUDIO)
    loudspeaker, asked = Loudspeaker(find_device("output", case.output_device)), threading.Event()

    def silence(count: int) -> np.ndarray:
        asked.set()
        return np.zeros(count, np.float32)

    loudspeaker.start(silence)
    try:
        answered = asked.wait(PATIENCE_SECONDS)
    finally:
        loudspeaker.stop()
    if not answered:
        line = no_play_message(loudspeaker.name)
        return Finding("loudspeaker", "problem", line, _facts(loudspeaker))
    line = f"{loudspeaker.name!r} ({loudspeaker.device.host}, {loudspeaker.rate} Hz) takes sound"
    return Finding("loudspeaker", "ok", line, _facts(loudspeaker))
