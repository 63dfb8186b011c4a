"""moshi_mlx's layers on this package's caches.

The layers stay moshi_mlx's own: only the read of attention is handed to the cache, because stock
`Attention` builds no mask and so takes one token at a time.
"""

import mlx.core as mx
from moshi_mlx.modules.transformer import Attention, LayerCache, Transformer

from .kv_cache import WindowKVCache


class WindowAttention(Attention):
    """moshi_mlx's `Attention`, with what a query may see decided by the cache.

    Same parameters, same projections, same RoPE.

    Shape:
        - Input: `[B, T, D]`, any `T >= 1`.
        - Output: `[B, T, D]`.
    """

    @classmethod
    def sharing(cls, attention: Attention) -> "WindowAttention":
        """The same attention with the same weight arrays."""
        new = cls(attention.cfg)
        new.in_proj, new.out_proj, new.rope = attention.in_proj, attention.out_proj, attention.rope
        return new

    def __call__(
        self, xs: mx.array, cache: WindowKVCache, mask: mx.array | None = None
    ) -> mx.array:
        b, t, d = xs.shape
        heads = self.in_proj(xs).reshape(b, t, 3, self.cfg.num_heads, -1).transpose(2, 0, 3, 1, 4)
        q, k, v = heads[0], heads[1], heads[2]
        if self.rope is not None:
            q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        out = cache.attend(q, k, v, self.scale)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(b, t, d))


def use_window_attention(transformer: Transformer) -> None:
    """Let every layer of a moshi_mlx transformer read through its cache; weights are shared."""
    for layer in transformer.layers:
        if not isinstance(layer.self_attn, WindowAttention):
            layer.self_attn = WindowAttention.sharing(layer.self_attn)


def make_window_cache(
    transformer: Transformer, window: int | None = None, sinks: int = 0
) -> list[LayerCache]:
    """One `WindowKVCache` a layer, in moshi_mlx's `LayerCache` (which also holds cross-attention).

    Args:
        transformer: a moshi_mlx transformer.
        window: keys a query sees. Default: the context the model was trained with.
        sinks: first tokens kept for ever, counted inside the window. Default: 0.
    """
    window = transformer.cfg.context if window is None else window
    return [
        LayerCache(WindowKVCache(window, sinks, layer.self_attn.rope))
        for layer in transformer.layers
    ]
