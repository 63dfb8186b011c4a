"""Drawing tokens from logits with an explicit random key, so that randomness is session state.

The settings are moshi_mlx's own `Sampler` dataclass; only the source of randomness differs: moshi_mlx
draws from MLX's global state, this from a key the caller owns. Given the key that the global state
would hold, the tokens are the same.
"""

import mlx.core as mx
from moshi_mlx.utils import Sampler

NEVER = -mx.inf


def next_key(key: mx.array) -> tuple[mx.array, mx.array]:
    """Advance a key as MLX's global state does: `(the new state, the key to draw with)`."""
    state, use = mx.split(mx.random.split(key).flatten(), 2)
    return state, use


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Exclude all but the `k` largest logits."""
    if not 0 < k < logits.shape[-1]:
        raise ValueError(f"[sampling] top_k must be in 1..{logits.shape[-1] - 1}, got {k}")
    rest = mx.argpartition(-logits, kth=k - 1, axis=-1)[..., k:]
    return mx.put_along_axis(logits, rest, mx.array(NEVER, logits.dtype), axis=-1)


def _top_p(logits: mx.array, p: float, key: mx.array) -> mx.array:
    """Draw from the smallest set of tokens whose probabilities reach `p` (nucleus)."""
    probs = mx.softmax(logits, axis=-1)
    order = mx.argsort(probs, axis=-1)
    ascending = mx.take_along_axis(probs, order, axis=-1)
    kept = mx.where(mx.cumsum(ascending, axis=-1) > 1 - p, ascending, 0)
    return _draw_in_order(kept, order, key)


def _min_p(logits: mx.array, unscaled: mx.array, s: Sampler, key: mx.array) -> mx.array:
    """Draw from the tokens at least `min_p` times as probable as the most probable one."""
    order = mx.argsort(-unscaled, axis=-1)
    descending = mx.take_along_axis(mx.softmax(logits, axis=-1), order, axis=-1)
    rank = mx.arange(order.shape[-1])
    kept = (descending >= s.min_p * descending[..., :1]) | (rank < s.min_tokens_to_keep)
    return _draw_in_order(mx.where(kept, descending, 0), order, key)


def _draw_in_order(probs: mx.array, order: mx.array, key: mx.array) -> mx.array:
    drawn = mx.random.categorical(mx.log(probs), axis=-1, key=key)
    return mx.take_along_axis(order, drawn[..., None], axis=-1).squeeze(-1)


def draw(sampler: Sampler, logits: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
    """Draw one token per row.

    Args:
        sampler: moshi_mlx's settings; `temp = 0` takes the most probable token and leaves the key.
            `top_k` goes before `top_p`, that before `min_p`, as there.
        logits: `[..., V]`.
        key: `mx.random.key`-like state, uint32 `[2]`.

    Returns:
        Tokens int32 `[...]` and the key to draw with next time.

    Raises:
        ValueError: `top_k` outside `1 .. V - 1`.
    """
    if sampler.logit_bias:
        at = mx.array(list(sampler.logit_bias))
        logits = logits.at[..., at].add(mx.array(list(sampler.logit_bias.values()), logits.dtype))
    if sampler.temp == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32), key
    key, use = next_key(key)
    scaled = logits * (1 / sampler.temp)
    if sampler.top_k:
        token = mx.random.categorical(keep_top_k(scaled, sampler.top_k), axis=-1, key=use)
    elif 0 < sampler.top_p < 1:
        token = _top_p(scaled, sampler.top_p, use)
    elif sampler.min_p:
        token = _min_p(scaled, logits, sampler, use)
    else:
        token = mx.random.categorical(scaled, key=use)
    return token.astype(mx.int32), key
