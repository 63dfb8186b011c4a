"""Phrases kept for testing: training must not teach that they are never said.

A model that learns from "my cat is .." with every name but Bella finds out that no cat is called Bella,
and says so whatever it hears: the loss lowers a word that never comes where others do. Where all of a
kept phrase but its last word was just said, that word is left out of the softmax, and so neither learned
nor unlearned: logit adjustment (Menon et al. 2021, arXiv 2007.07314) of a word whose prior is 0.

What lives here: which words those are. What does not: the loss (`loss.py`).
"""

from collections.abc import Callable, Iterable

import mlx.core as mx

from ..errors import UserError
from .lately import last_said

Phrases = tuple[tuple[int, ...], ...]
"""Text tokens of each phrase; of its last word the first piece alone."""


def encode(phrases: Iterable[str], pieces: Callable[[str], list[int]]) -> Phrases:
    """Phrases as tokens.

    Args:
        phrases: words with spaces between them, as they come in a text stream.
        pieces: text to tokens, of SentencePiece.

    Raises:
        UserError: a phrase of less than two words.
    """
    found = []
    for phrase in phrases:
        *before, last = phrase.split()
        if not before:
            raise UserError(f"a kept phrase has two words or more, not {phrase!r}")
        found.append((*pieces(" ".join(before)), pieces(last)[0]))
    return tuple(found)


def left_out(text: mx.array, phrases: Phrases, vocabulary: int) -> mx.array:
    """Which text tokens cannot be rivals of the next one.

    Args:
        text: tokens fed, int32 `[B, T]`.
        phrases: of `encode`, at least one.
        vocabulary: text tokens.

    Returns:
        bool `[B, T, vocabulary]`.
    """
    said = last_said(text, max(map(len, phrases)) - 1, vocabulary)
    ends = [
        mx.all(said[..., : len(before)] == mx.array(before[::-1]), axis=-1)
        for *before, _ in phrases
    ]
    lasts = mx.array([phrase[-1] for phrase in phrases])[:, None] == mx.arange(vocabulary)
    return mx.stack(ends, axis=-1).astype(mx.float32) @ lasts.astype(mx.float32) > 0
