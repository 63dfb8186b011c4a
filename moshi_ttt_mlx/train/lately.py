"""A second loss while a base learns: half-way up, the model can tell which words it said last.

To know what came before is the first half of looking something up ("Your cat is" - which value has a
cat before it?). On the usual loss alone a model finds out about either half only when it has the other:
induction heads, which form all at once after a plateau (Olsson et al. 2022, arXiv 2209.11895). Taught by
itself the first half was found in a hundred updates (docs/voice.md).

What lives here: the head, which is thrown away after training, and its loss. What does not: where it
is added (`segments.py`).
"""

import mlx.core as mx
from mlx import nn

from .loss import is_word, nll_of

WORDS = 3  # as many as from a fact's value back to its key: "Your", "cat", "is", "Bella"


def last_said(text: mx.array, words: int, vocabulary: int) -> mx.array:
    """The text tokens said last at each frame, the frame's own first; padding is not said.

    Args:
        text: int32 `[B, T]`.
        words: how many.
        vocabulary: tokens below it are text.

    Returns:
        int32 `[B, T, words]`, -1 where there were not so many.
    """
    frames = mx.broadcast_to(mx.arange(text.shape[1], dtype=mx.int32), text.shape)
    said = is_word(text) & (text >= 0) & (text < vocabulary)
    # With a frame before the first: mlx 0.26 divides by zero in cummax of a single element.
    before = mx.full((len(text), 1), -1, dtype=mx.int32)
    last = mx.cummax(mx.concatenate([before, mx.where(said, frames, -1)], axis=1), axis=1)[:, 1:]
    place, found = frames, []
    for _ in range(words):
        place = mx.where(place < 0, -1, mx.take_along_axis(last, mx.maximum(place, 0), axis=1))
        token = mx.take_along_axis(text, mx.maximum(place, 0), axis=1)
        found.append(mx.where(place < 0, -1, token))
        place = place - 1
    return mx.stack(found, axis=-1)


class Lately(nn.Module):
    """Names the last words said, from the middle of a model.

    Args:
        width: of the model.
        vocabulary: text tokens.

    Shape:
        - Input: `[B, T, width]`, the output of the lower half of the layers.
        - Output: logits `[B, T, WORDS, vocabulary]`.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self._vocabulary = vocabulary
        self.head = nn.Linear(width, WORDS * vocabulary)

    def __call__(self, xs: mx.array) -> mx.array:
        logits = xs @ self.head.weight.T + self.head.bias  # nn.Linear has no float64 on CPU
        return logits.reshape(*xs.shape[:2], WORDS, self._vocabulary)

    def losses(self, xs: mx.array, text: mx.array) -> mx.array:
        """Of each frame, the mean over the words there were: `[B, T]` in nats; `text` is `[B, T]`."""
        words = last_said(text, WORDS, self._vocabulary)
        there = words >= 0
        found = mx.maximum(mx.sum(there, axis=-1), 1)
        return mx.sum(nll_of(self(xs), words, there), axis=-1) / found
