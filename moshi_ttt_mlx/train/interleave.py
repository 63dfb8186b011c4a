"""Words with times -> Moshi's text stream, one token a frame; moshi-finetune's rules.

A word's pieces begin in the frame in which the word begins and follow frame by frame. The frame
before a word that comes after padding holds `END_OF_PADDING`. Where the next word begins before all
pieces of the last are out, the rest of the last word is lost (`Stream.lost` counts that).

Source: `Interleaver` of github.com/kyutai-labs/moshi-finetune, with its training script's settings
(`keep_main_only`, no delay).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

from ..audio import FRAMES_PER_SECOND
from ..errors import UserError
from ..model import NOT_PRINTED

END_OF_PADDING, PADDING = NOT_PRINTED
MAIN_SPEAKER = "SPEAKER_MAIN"
SLACK_SECONDS = 1.0
"""Aligners put the last word's end a little past the end of the file."""


class Word(NamedTuple):
    """A word that Moshi says, in seconds from the start of the talk."""

    text: str
    start: float
    end: float


class Stream(NamedTuple):
    """A text stream: int32 `[T]`, and the word pieces that there was no room for."""

    tokens: np.ndarray
    lost: int


def main_words(alignments: object, duration: float) -> list[Word]:
    """The main speaker's words, sorted by their start; words without a duration are left out.

    Args:
        alignments: what a transcript holds: `[[word, [start, end], speaker], ...]`.
        duration: seconds of sound.

    Raises:
        UserError: not of that form, times that are no numbers or outside the sound, or words of
            other speakers only.
    """
    if not isinstance(alignments, list):
        raise UserError("alignments should be a list of [word, [start, end], speaker]")
    every = [_word(entry, duration) for entry in alignments]
    main = [word for word, speaker in every if speaker == MAIN_SPEAKER]
    if every and not main:
        raise UserError(f"no word is of {MAIN_SPEAKER}, only of {sorted({s for _, s in every})}")
    return sorted((w for w in main if w.start < w.end), key=lambda word: word.start)


def _word(entry: object, duration: float) -> tuple[Word, str]:
    match entry:
        case [str(text), [int() | float() as start, int() | float() as end], str(speaker)]:
            if not (math.isfinite(start) and math.isfinite(end)):
                raise UserError(f"word {text!r} has times {start}, {end}")
            if start < 0 or end > duration + SLACK_SECONDS:
                raise UserError(
                    f"word {text!r} at {start:.2f}..{end:.2f} s lies outside {duration:.2f} s"
                )
            return Word(text, start, end), speaker
    raise UserError(f"expected [word, [start, end], speaker], found {entry!r:.60}")


def pieces(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """The tokens of one word; the lines of a word of several are joined by the newline's piece."""
    first, *rest = text.strip().split("\n")
    tokens = list(tokenizer.encode(first))
    for line in rest:
        tokens += [tokenizer.encode("\n")[-1], *tokenizer.encode(line)]
    return tokens


def text_stream(
    words: Sequence[Word], tokenizer: sentencepiece.SentencePieceProcessor, frames: int
) -> Stream:
    """Lay words out over `frames` frames.

    Args:
        words: sorted by their start.
    """
    tokens = np.full(frames, PADDING, np.int32)
    waiting: list[int] = []
    upcoming, lost = list(words), 0
    for t in range(frames):
        while upcoming and upcoming[0].start * FRAMES_PER_SECOND < t + 1:
            lost += len(waiting)
            waiting = pieces(tokenizer, upcoming.pop(0).text)
        if waiting:
            if t and tokens[t - 1] == PADDING:
                tokens[t - 1] = END_OF_PADDING
            tokens[t] = waiting.pop(0)
    return Stream(tokens, lost + len(waiting))
