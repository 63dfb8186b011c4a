"""A headless Chromium whose microphone is a wav, and ears for what the page plays."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 24000
FRAME = 1920
_HOP = RATE // 50  # 20 ms: finer than syllables, coarser than a resampler's delay

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)

NEEDS_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH (Debian: chromium)"),
]

# Lets a test hear what the page gives to the loudspeaker, from outside of the page's code.
TAP = """
window.tapped = [];
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (target, ...rest) {
  if (target instanceof AudioDestinationNode && !(this instanceof ScriptProcessorNode)) {
    const ear = this.context.createScriptProcessor(4096, 1, 1);
    ear.onaudioprocess = ({ inputBuffer }) => {
      window.tapped.push(...inputBuffer.getChannelData(0));
    };
    connect.call(this, ear);
    connect.call(ear, target);
  }
  return connect.call(this, target, ...rest);
};
"""

# Every violation of the page's Content-Security-Policy, for the check at the end of each test.
WATCH_POLICY = """
window.violations = [];
addEventListener('securitypolicyviolation', (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


@contextmanager
def launched(playwright, microphone: Path | None, *flags: str):
    """A browser whose microphone plays a wav once, or that has none at all."""
    arguments = ["--no-sandbox", *flags]
    if microphone:
        arguments += [
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}%noloop",
        ]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
    try:
        yield browser
    finally:
        browser.close()


def write_microphone(path: Path, sound: np.ndarray, rate: int = RATE) -> Path:
    """The sound between two seconds of silence: Chromium goes on with the file's end for ever."""
    silence = np.zeros(rate)
    soundfile.write(path, np.concatenate([silence, sound, silence]), rate, subtype="PCM_16")
    return path


def played(page) -> np.ndarray:
    """All that the page has played so far: float32 `[N]` at 24 kHz; needs `TAP`."""
    return np.array(page.evaluate("window.tapped"), np.float32)


def envelope(sound: np.ndarray) -> np.ndarray:
    """RMS of every 20 ms."""
    whole = sound[: len(sound) - len(sound) % _HOP].reshape(-1, _HOP)
    return np.sqrt((whole.astype(np.float64) ** 2).mean(axis=1))


def resemblance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest correlation of two sounds' envelopes over all shifts; 1 for the same sound.

    Sound that only one of them has counts against it, except silence.
    """
    one, other = envelope(one), envelope(other)
    products = np.correlate(one, other, mode="full")
    return float(products.max() / (np.linalg.norm(one) * np.linalg.norm(other) + 1e-12))
