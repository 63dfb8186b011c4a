"""moshi_mlx's layers on this package's caches, with and without a memory.

The layers stay moshi_mlx's own. Only the read of attention is handed to the cache, because stock
`Attention` builds no mask and so takes one token at a time; and where a layer has a memory, that
joins inside the attention module, which sees the very `norm1(x)` that attention itself sees.
"""

from functools import partial

import mlx.core as mx
from moshi_mlx.modules.transformer import Attention, LayerCache, Transformer

from .kv_cache import HybridKVCache, WindowKVCache
from .memory import Mode, TTTMemory


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
        return self._attend(xs, cache, virtual=None)

    def _attend(self, xs: mx.array, cache: WindowKVCache, virtual) -> mx.array:
        b, t, d = xs.shape
        # One [B, 3H, T, D] for all three: one transpose, and one rotation for queries and keys.
        heads = self.in_proj(xs).reshape(b, t, 3 * self.cfg.num_heads, -1).swapaxes(1, 2)
        plain, k, v = mx.split(heads, 3, axis=1)
        q = plain
        if self.rope is not None:
            both = self.rope(heads[:, : 2 * self.cfg.num_heads], offset=cache.offset)
            q, k = mx.split(both, 2, axis=1)
        beside = None if virtual is None else (virtual, plain)
        out = cache.attend(q, k, v, self.scale, beside)
        return self.out_proj(out.swapaxes(1, 2).reshape(b, t, d))


class MemoryAttention(WindowAttention):
    """Attention with a memory, in the placement its config names.

    `cache`: `attention(q | virtual, sinks, window)`; `after`: `attention + tanh(gate) * memory`;
    `replace`: `attention + gate * (memory - attention)`. The memory is no child of this module: the
    base model's parameters, dtype, quantization and files never know of it.

    Shape:
        - Input: `[B, T, D]`, the layer's `norm1(x)`.
        - Output: `[B, T, D]`.
    """

    @classmethod
    def with_memory(cls, attention: Attention, memory: TTTMemory) -> "MemoryAttention":
        """The same attention with the same weight arrays, and a memory."""
        new = cls.sharing(attention)
        object.__setattr__(new, "memory", memory)
        return new

    def __call__(
        self, xs: mx.array, cache: WindowKVCache, mask: mx.array | None = None
    ) -> mx.array:
        state = getattr(cache, "memory", None)
        # "stream" memories join behind attention: legacy.StreamLayer.
        if state is None or self.memory.config.placement == "stream":
            return super().__call__(xs, cache)
        if self.memory.config.placement == "cache":
            return self._attend(xs, cache, self.memory.virtual(xs, state))
        memory, ok = self.memory.output(xs, state)
        attention = super().__call__(xs, cache)
        gate = mx.where(ok, self.memory.gate, 0)
        if self.memory.config.placement == "after":
            change = mx.tanh(gate) * memory
        else:
            change = gate * (memory - attention)
        return attention + change.astype(attention.dtype)


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


def make_memory_cache(
    transformer: Transformer,
    window: int | None = None,
    sinks: int = 0,
    *,
    batch: int = 1,
    mode: Mode = "on",
    closed_too: bool = False,
) -> list[LayerCache]:
    """As `make_window_cache`, with a memory's state in every layer that has an open memory.

    Args:
        transformer, window, sinks: as there; a memory's config may set its layer's own.
        batch: rows, each with a state of its own.
        mode: `on`, `frozen` (read, never learn) or `off` (the base model).
        closed_too: run memories whose gates are shut as well: training opens them.
    """
    caches = make_window_cache(transformer, window, sinks)
    for layer, cache in zip(transformer.layers, caches, strict=True):
        attention = layer.self_attn
        if mode == "off" or not isinstance(attention, MemoryAttention):
            continue
        memory = attention.memory
        if not closed_too and memory.is_closed():
            continue
        config, plain = memory.config, cache.self_attn
        cache.self_attn = HybridKVCache(
            min(config.window or plain.window, plain.window),
            config.sinks or plain.sinks,
            plain.rope,
            partial(memory.init_cache, batch, mode),
        )
    return caches


def end_step(layer, cache: LayerCache, arrays: dict[str, mx.array]) -> None:
    """Take over a traced step's arrays; a full mini-batch is folded now."""
    cache.self_attn.end_step(arrays)
    if isinstance(cache.self_attn, HybridKVCache):
        layer.self_attn.memory.end_step(cache.self_attn.memory)
