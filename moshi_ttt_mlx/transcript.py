"""From text pieces on frames to words with times, and from words to txt, json, srt and vtt.

What lives here: :class:`Transcript`, the last station of a frame. What does not: tokens (the
generator turns ids into SentencePiece pieces and drops padding) and printing.

    transcript = Transcript()
    for frame in session.frames():
        text = transcript.add(frame.index, frame.piece)     # " Hel", then "lo", then ...
        print(text or "", end="", flush=True)
    transcript.write("talk.srt", "srt")
"""

import codecs
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .audio import FRAME_SECONDS, FRAMES_PER_SECOND, SAMPLE_RATE
from .errors import UserError

FORMATS = ("txt", "json", "srt", "vtt")

LINE_CHARS = 42
"""Characters in a subtitle line; two lines make a cue."""

CUE_SECONDS = 6.0
"""A cue's longest time on screen."""

MOSHI, USER = "moshi", "user"
"""Who speaks."""

NAMES = {MOSHI: "Moshi", USER: "You"}
"""What people read for a speaker; JSON keeps the speaker."""

_CUE_LINES = 2
# A word's last piece comes before its sound is over, so the shortest gaps are not pauses.
_PAUSE_SECONDS = 1.0
# The last word of a cue lasts one frame on paper: too short to read.
_LEAST_CUE_SECONDS = 1.0
_STATE_VERSION = 1
_JSON_VERSION = 1

WORD_START = "\u2581"
"""SentencePiece's mark."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What SentencePiece prints for its own symbols.
_SYMBOLS = {"<unk>": f"{WORD_START}\u2047 ", "<s>": "", "</s>": "", "<pad>": ""}


@dataclass(frozen=True)
class Word:
    """One word: its text, its start and end in seconds, and who says it."""

    text: str
    start: float
    end: float
    speaker: str


@dataclass
class _Stretch:
    """A word in frames: the frame of its first piece and of its last."""

    text: str
    first: int
    last: int
    speaker: str


@dataclass
class _Voice:
    """What one speaker has begun: a word, and the first bytes of a character."""

    word: _Stretch | None = None
    frame: int = 0
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )


class Transcript:
    """Collects text pieces by frame; gives words with times at any moment.

    A word starts with its first piece's frame and ends with its last piece's frame (80 ms each): a
    text stream knows no more. Words are ordered by start, and one speaker's times never go back.

    Args:
        delays: seconds by which a speaker's text trails the sound, per speaker; an stt model's
            ``audio_delay_seconds``. Times move back by it, to 0 at the earliest.
    """

    def __init__(self, delays: Mapping[str, float] | None = None):
        self._delays = dict(delays or {})
        self._done: list[_Stretch] = []
        self._voices: dict[str, _Voice] = {}

    def add(self, frame: int, piece: str, speaker: str = MOSHI) -> str | None:
        """Take one SentencePiece piece and return the text to print now.

        Args:
            frame: 80 ms steps since the start; one speaker's frames never go back.
            piece: with U+2581 where a word starts. Byte pieces such as ``<0xE2>`` are collected
                until they make a character.
            speaker: whose piece it is.

        Returns:
            The text, spaces included, or None while a character is incomplete.
        """
        voice = self._voices.setdefault(speaker, _Voice(frame=frame))
        if frame < voice.frame:
            raise ValueError(f"[Transcript] expected a frame >= {voice.frame}, found {frame}")
        voice.frame = frame
        text = _decode(voice.decoder, piece)
        for character in text:
            self._take(voice, character, frame, speaker)
        return text.replace(WORD_START, " ") or None

    def _take(self, voice: _Voice, character: str, frame: int, speaker: str) -> None:
        is_start = character == WORD_START
        if is_start or character.isspace():
            self._close(voice)
            # A word's first piece may be the bare mark; a newline only ends the word before it.
            voice.word = _Stretch("", frame, frame, speaker) if is_start else None
            return
        voice.word = voice.word or _Stretch("", frame, frame, speaker)
        voice.word.text += character
        voice.word.last = frame

    def _close(self, voice: _Voice) -> None:
        if voice.word and voice.word.text:
            self._done.append(voice.word)

    @property
    def words(self) -> list[Word]:
        """All words so far, those not yet ended included, by start time."""
        begun = [v.word for v in self._voices.values() if v.word and v.word.text]
        words = [self._timed(stretch) for stretch in self._done + begun]
        return sorted(words, key=lambda word: (word.start, word.end, word.speaker))

    def time(self, frame: int, speaker: str) -> float:
        """Seconds at which a frame of a speaker's text begins in the sound, 0 at the earliest."""
        return max(0.0, frame / FRAMES_PER_SECOND - self._delays.get(speaker, 0.0))

    def _timed(self, stretch: _Stretch) -> Word:
        start = self.time(stretch.first, stretch.speaker)
        end = max(start + FRAME_SECONDS, self.time(stretch.last + 1, stretch.speaker))
        return Word(stretch.text, round(start, 3), round(end, 3), stretch.speaker)

    def to_txt(self) -> str:
        """Plain text: a line for each turn, ended by a pause; names when more than one speaks."""
        turns = _group(self.words, lambda turn, word: True)
        names = _names(turns)
        lines = [_named(name, _text(turn)) for name, turn in zip(names, turns, strict=True)]
        return "".join(line + "\n" for line in lines)

    def to_json(self) -> str:
        """A JSON object: version, sample_rate, speakers, words (text, start, end, speaker)."""
        words = self.words
        value = {
            "version": _JSON_VERSION,
            "sample_rate": SAMPLE_RATE,
            "speakers": sorted({word.speaker for word in words}),
            "words": [asdict(word) for word in words],
        }
        return json.dumps(value, ensure_ascii=False, indent=1) + "\n"

    def to_srt(self) -> str:
        """SubRip subtitles. The format has no escapes: text goes in as it is."""
        cues = [
            f"{number}\n{_exact(start, ',')} --> {_exact(end, ',')}\n{_named(name, text)}\n"
            for number, (start, end, name, text) in enumerate(self._cues(), 1)
        ]
        return "\n".join(cues)

    def to_vtt(self) -> str:
        """WebVTT subtitles, with a voice tag when more than one speaks."""
        cues = ["WEBVTT\n"]
        for start, end, name, text in self._cues():
            voice = f"<v {_escape(name)}>" if name else ""
            cues.append(f"{_exact(start, '.')} --> {_exact(end, '.')}\n{voice}{_escape(text)}\n")
        return "\n".join(cues)

    def _cues(self) -> list[tuple[float, float, str, str]]:
        """Start, end, name (empty where one speaks) and wrapped text of each cue."""
        cues = _group(self.words, _fits_cue)
        return [
            (cue[0].start, end, name, "\n".join(_wrap(cue)))
            for cue, end, name in zip(cues, _cue_ends(cues), _names(cues), strict=True)
        ]

    def write(self, path: str | os.PathLike, format: str) -> None:
        """Write one of ``FORMATS`` to ``path``: all of it or, on an error, nothing.

        Raises:
            UserError: unknown format, no such folder, not allowed, disk full.
        """
        if format not in FORMATS:
            raise UserError(f"expected a format from {', '.join(FORMATS)}, found {format!r}")
        _write_whole(Path(path), getattr(self, f"to_{format}")())

    def state(self) -> dict:
        """Everything as a JSON-able dict, begun words and characters included."""
        voices = {
            speaker: {
                "word": asdict(voice.word) if voice.word else None,
                "frame": voice.frame,
                "bytes": list(voice.decoder.getstate()[0]),
            }
            for speaker, voice in self._voices.items()
        }
        return {
            "version": _STATE_VERSION,
            "delays": dict(self._delays),
            "words": [[word.text, word.first, word.last, word.speaker] for word in self._done],
            "voices": voices,
        }

    @classmethod
    def from_state(cls, state: dict) -> "Transcript":
        """Go on from ``state()`` as if never interrupted.

        Raises:
            UserError: the state is of another version.
        """
        if state.get("version") != _STATE_VERSION:
            raise UserError(
                f"expected a transcript of version {_STATE_VERSION}, "
                f"found {state.get('version')}: start a new session"
            )
        transcript = cls(state["delays"])
        transcript._done = [_Stretch(*word) for word in state["words"]]
        for speaker, saved in state["voices"].items():
            voice = _Voice(_Stretch(**saved["word"]) if saved["word"] else None, saved["frame"])
            voice.decoder.setstate((bytes(saved["bytes"]), 0))
            transcript._voices[speaker] = voice
        return transcript


def _decode(decoder: codecs.IncrementalDecoder, piece: str) -> str:
    """The characters that ``piece`` completes, word starts still marked."""
    byte = _BYTE.fullmatch(piece)
    if byte:
        return decoder.decode(bytes.fromhex(byte[1]))
    # A character that other text cuts short becomes U+FFFD.
    return decoder.decode(b"", final=True) + _SYMBOLS.get(piece, piece)


def _group(words: list[Word], fits: Callable[[list[Word], Word], bool]) -> list[list[Word]]:
    """Split words into runs of one speaker without a pause, each as long as ``fits`` allows.

    Speakers may talk at once: a run goes on beside another's. Runs are ordered by start.
    """
    groups: list[list[Word]] = []
    open_groups: dict[str, list[Word]] = {}
    for word in words:
        group = open_groups.get(word.speaker)
        if not group or word.start - group[-1].end >= _PAUSE_SECONDS or not fits(group, word):
            group = open_groups[word.speaker] = []
            groups.append(group)
        group.append(word)
    return groups


def _fits_cue(cue: list[Word], word: Word) -> bool:
    return word.end - cue[0].start <= CUE_SECONDS and len(_wrap([*cue, word])) <= _CUE_LINES


def _cue_ends(cues: list[list[Word]]) -> list[float]:
    """When each cue goes: after its last word, long enough to read unless the next one comes."""
    ends, next_start = [], {}
    for cue in reversed(cues):
        speaker, start, end = cue[0].speaker, cue[0].start, cue[-1].end
        readable = min(start + _LEAST_CUE_SECONDS, next_start.get(speaker, float("inf")))
        ends.append(max(end, readable))
        next_start[speaker] = start
    return ends[::-1]


def _wrap(words: list[Word]) -> list[str]:
    return textwrap.wrap(_text(words), LINE_CHARS, break_long_words=False, break_on_hyphens=False)


def _text(words: list[Word]) -> str:
    return " ".join(word.text for word in words)


def _names(groups: list[list[Word]]) -> list[str]:
    """The name of each group's speaker, or empty names where there is only one."""
    speakers = [group[0].speaker for group in groups]
    if len(set(speakers)) < 2:
        return [""] * len(groups)
    return [NAMES.get(speaker, speaker) for speaker in speakers]


def _named(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text


def clock(seconds: float) -> str:
    """``M:SS``, or ``H:MM:SS``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _exact(seconds: float, point: str) -> str:
    """``HH:MM:SS`` and milliseconds after ``point``; hours take as many digits as they need."""
    total_minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(total_minutes, 60)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _write_whole(path: Path, text: str) -> None:
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or a device: nothing to replace
        else:
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise UserError(f"{path}: cannot write the transcript: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    """Write a file beside ``path`` and rename it over ``path``."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
