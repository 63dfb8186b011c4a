"""The teacher-forced losses of a moshi_mlx `Lm`: text and every codebook, delays right.

What lives here: how a talk's streams are delayed, what is a target and how much it counts, and the
negative log-likelihood of every token. What does not: gradients (`segments.py`), data (`data.py`).

    line = delayed(codes[None], lm.cfg)                     # [1, S, T + 1]
    inputs, targets = cut(line, lm.cfg, 0, 100)             # frames 0..99
    caches = make_memory_cache(lm.transformer, batch=1)
    nll = token_losses(lm, inputs, targets, caches)         # [1, 1 + K, 100], nats

These are the numbers of the frame loop: `FrameGenerator.step`, forced to the same tokens, has the
same logits (`tests/test_train_loss.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from moshi_mlx.models import Lm, LmConfig
from moshi_mlx.modules.transformer import LayerCache

from ..generate import BOS, DepformerCache, embed, embed_frame
from ..layers import use_window_attention
from ..model import NOT_PRINTED
from ..ttt import wide
from .data import NOTHING, unlearned


@dataclass(frozen=True)
class LossWeights:
    """How much tokens count beside each other; the defaults are those of moshi-finetune.

    Args:
        text_padding: of a text token that nobody says, beside one that somebody does.
        first_codebook: of the first codebook (it carries the words), beside each of the others.
        audio: of all codebooks together, beside text; 0 learns from text alone.
        lately: of the second loss, see `lately.py`; only where the base learns.
        kept: phrases whose last word is no rival behind the others, see `kept.py`.
    """

    text_padding: float = 0.5
    first_codebook: float = 100.0
    audio: float = 1.0
    lately: float = 0.0
    kept: tuple[tuple[int, ...], ...] = ()


def prepare(lm: Lm) -> None:
    """Let all attention of a model, the depformer's too, read through this package's caches."""
    for transformer in (lm.transformer, *(s.transformer for s in lm.depformer.slices)):
        use_window_attention(transformer)


def start_tokens(config: LmConfig) -> np.ndarray:
    """What each stream is fed before its first token: int32 `[S]`."""
    tokens = np.full(1 + config.audio_codebooks, config.audio_padding_token, np.int32)
    # Helium has no row for "nothing said yet": a text begins with SentencePiece's BOS.
    has_start = config.text_in_vocab_size > config.text_out_vocab_size
    tokens[0] = config.text_out_vocab_size if has_start else BOS
    return tokens


def delayed(codes: np.ndarray, config: LmConfig) -> np.ndarray:
    """A whole talk as the model reads it, each stream moved back by its delay.

    Args:
        codes: int `[B, S, T]`, undelayed.
        config: of the model; gives the delays.

    Returns:
        int32 `[B, S, T + 1]`. Column `t` is the input of frame `t`, column `t + 1` its target. What
        lies before a stream's first token is its start token; the last `delay` tokens of a delayed
        stream fall off, as they do when a talk ends.
    """
    frames = codes.shape[2]
    line = np.broadcast_to(
        start_tokens(config)[None, :, None], (*codes.shape[:2], frames + 1)
    ).copy()
    for stream, delay in enumerate([0, *config.audio_delays]):
        line[:, stream, 1 + delay :] = codes[:, stream, : max(frames - delay, 0)]
    return line


def cut(line: np.ndarray, config: LmConfig, start: int, stop: int) -> tuple[mx.array, mx.array]:
    """Frames `start..stop-1` of a delayed talk.

    Returns:
        Inputs int32 `[B, S, n]` and targets int32 `[B, 1 + K, n]`: the text and the `K` codebooks
        that the depformer makes. Targets that are not to be learned stay `data.unlearned`.
    """
    made = 1 + config.generated_codebooks
    inputs, targets = line[:, :, start:stop], line[:, :made, start + 1 : stop + 1]
    return as_read(mx.array(inputs)), mx.array(targets)


def as_read(tokens: mx.array) -> mx.array:
    """Tokens as the model is fed them, those not to be learned too."""
    return mx.where(tokens < NOTHING, unlearned(tokens), tokens)


def counts(targets: mx.array, config: LmConfig) -> mx.array:
    """Which targets are tokens to learn: bool `[B, 1 + K, T]`; start tokens and padding are none."""
    sizes = [config.text_out_vocab_size] + [config.audio_vocab_size - 1] * (targets.shape[1] - 1)
    return (targets >= 0) & (targets < mx.array(sizes)[None, :, None])


def is_word(text: mx.array) -> mx.array:
    """Which text tokens are no padding: bool, shaped as `text`."""
    return (text != NOT_PRINTED[0]) & (text != NOT_PRINTED[1])


def target_weights(targets: mx.array, config: LmConfig, weights: LossWeights) -> mx.array:
    """How much each target counts: float32 `[B, 1 + K, T]`, 0 for those that are no tokens."""
    text, codes = targets[:, :1], counts(targets, config).astype(mx.float32)
    scale = [mx.where(is_word(text), 1.0, weights.text_padding)]
    for codebook in range(targets.shape[1] - 1):
        share = 1.0 if codebook else weights.first_codebook
        scale.append(mx.full(text.shape, share, dtype=mx.float32))
    return codes * mx.concatenate(scale, axis=1)


def totals(weights: mx.array) -> mx.array:
    """The sums that text's and codebooks' losses are divided by: float32 `[2]`."""
    return mx.stack([mx.sum(weights[:, :1]), mx.sum(weights[:, 1:])])


def weighted_sums(nll: mx.array, weights: mx.array) -> mx.array:
    """Weighted losses `[B, 1 + K, T]` of text and of all codebooks, summed: `[2]`."""
    weighted = nll * weights.astype(nll.dtype)
    return mx.stack([mx.sum(weighted[:, :1]), mx.sum(weighted[:, 1:])])


def weighted_loss(
    nll: mx.array, weights: mx.array, total: mx.array, audio: float = 1.0
) -> mx.array:
    """The loss: weighted mean of text plus `audio` times that of the codebooks, a scalar.

    Args:
        nll, weights: `[B, 1 + K, T]`.
        total: `[2]`, of all that the mean goes over; more than `weights` where a batch is taken in
            pieces. A sum over pieces with one total is the loss of the whole.
    """
    means = weighted_sums(nll, weights) / mx.maximum(total, 1e-6).astype(nll.dtype)
    return means[0] + audio * means[1]


def stream_sums(nll: mx.array, targets: mx.array, config: LmConfig) -> mx.array:
    """For reports: summed nll and number of tokens of each stream, `[2, 2 + K]`.

    Columns: all text, text that somebody says, then each codebook.
    """
    told = counts(targets, config)
    said = told[:, :1] & is_word(targets[:, :1])
    told = mx.concatenate([told[:, :1], said, told[:, 1:]], axis=1).astype(nll.dtype)
    nll = mx.concatenate([nll[:, :1], nll[:, :1], nll[:, 1:]], axis=1)
    return mx.stack([mx.sum(nll * told, axis=(0, 2)), mx.sum(told, axis=(0, 2))])


def nll_of(logits: mx.array, targets: mx.array, told: mx.array) -> mx.array:
    """Of targets `[...]` under logits `[..., V]`, in float32; 0 where nothing was told."""
    logits = wide(logits)
    chosen = mx.take_along_axis(logits, mx.where(told, targets, 0)[..., None], axis=-1)[..., 0]
    return mx.where(told, mx.logsumexp(logits, axis=-1) - chosen, 0)


def hidden_states(lm: Lm, inputs: mx.array, run_layers: Callable[[mx.array], mx.array]) -> mx.array:
    """Inputs `[B, S, T]` -> what text head and depformer read, `[B, T, D]`."""
    return lm.out_norm(run_layers(embed_frame(lm, inputs)))


def text_losses(
    lm: Lm, hidden: mx.array, targets: mx.array, left_out: mx.array | None = None
) -> mx.array:
    """`[B, 1, T]` of hidden states `[B, T, D]` and targets `[B, 1 + K, T]`.

    Tokens of `left_out`, bool `[B, T, V]`, are not compared with, but for the targets themselves.
    """
    told, logits = counts(targets[:, :1], lm.cfg)[:, 0], lm.text_linear(hidden)
    if left_out is not None:
        itself = mx.arange(logits.shape[-1]) == targets[:, 0, :, None]
        logits = mx.where(left_out & ~itself, -mx.inf, logits)
    return nll_of(logits, targets[:, 0], told)[:, None]


def audio_losses(lm: Lm, hidden: mx.array, targets: mx.array) -> mx.array:
    """`[B, K, T]` of hidden states `[B, T, D]` and targets `[B, 1 + K, T]`; after `prepare`.

    The depformer starts over with each frame, so all frames are one batch; its slices go one after
    another, each on the true token of the one before.
    """
    b, t, d = hidden.shape
    frames, tokens = hidden.reshape(b * t, 1, d), targets.swapaxes(1, 2).reshape(b * t, -1)
    told = counts(targets, lm.cfg).swapaxes(1, 2).reshape(b * t, -1)
    first = lm.depformer.slices[0].transformer
    caches = [LayerCache(DepformerCache(first.cfg.context)) for _ in first.layers]
    losses, before = [], as_read(tokens)
    for i, piece in enumerate(lm.depformer.slices):
        xs = piece.linear_in(frames) + embed(piece.emb, before[:, i : i + 1])
        logits = piece.linear_out(piece.transformer(xs, cache=caches))
        losses.append(nll_of(logits[:, 0], tokens[:, i + 1], told[:, i + 1]))
    return mx.stack(losses, axis=1).reshape(b, t, -1).swapaxes(1, 2)


def token_losses(lm: Lm, inputs: mx.array, targets: mx.array, caches: list[LayerCache]) -> mx.array:
    """Negative log-likelihood of every target, and the caches moved on.

    Args:
        inputs, targets: see `cut`.
        caches: of `make_memory_cache`, after the frames before these; changed.

    Returns:
        float32 `[B, 1 + K, T]` in nats, 0 where `counts` is False.
    """
    prepare(lm)
    hidden = hidden_states(lm, inputs, lambda xs: lm.transformer(xs, cache=caches))
    losses = text_losses(lm, hidden, targets)
    if targets.shape[1] == 1:
        return losses
    return mx.concatenate([losses, audio_losses(lm, hidden, targets)], axis=1)
