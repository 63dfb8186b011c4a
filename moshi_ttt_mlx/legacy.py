"""Memories trained by the PyTorch Moshi-TTT code, as they were trained: for converted checkpoints.

What lives here: all that such a memory does differently from `memory.TTTMemory`, which is its base.
It reads the stream behind attention, not `norm1(x)`, and adds to it there:

    x1 = x + attention(norm1(x))
    x2 = x1 + tanh(clamp(alpha, -3, 3)) * memory(x1)
    y  = x2 + ffn(norm2(x2))

What does not: reading checkpoint files (`convert.py`). New memories should not use any of this:
the un-normalized stream gives the learned rate and the values a scale that drifts from layer to
layer, and the target and the averaged share were replaced for a reason (`memory.py`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import mlx.core as mx
from mlx import nn
from moshi_mlx.modules.transformer import LayerCache, TransformerLayer

from .errors import UserError
from .memory import MemoryCache, MemoryConfig, TTTMemory
from .ttt import InnerLearner, Rules, wide

_LN_EPS, _TARGET_EPS, _POST_EPS = 1e-8, 1e-5, 1e-6


@dataclass(frozen=True)
class LegacyConfig(MemoryConfig):
    """The shape of a converted memory. `heads * head_dim` is the model's width.

    Of `MemoryConfig`'s fields it uses `layers`, `heads`, `head_dim`, `mini_batch`, `base_lr`,
    `window`, `sinks` and `rope`.

    Args:
        sizes: widths of the inner network, `(f, F, .., f)`; three or more layers answer with their
            own mini-batch's step applied twice, as their code did.
        causal: False: a token also learns from the later tokens of its mini-batch, where they come
            in the same call, as in training. One token at a time is causal either way.
        l2_norm: False for checkpoints trained before the `place_into` fix: no L2 norm of queries
            and keys, no RoPE, and a target divided by itself rather than its standard deviation.
        post_norm: layer norm and output projection behind the inner network.
        rope_theta: base of RoPE's frequencies.
    """

    placement: Literal["stream"] = "stream"
    conv: int = 1
    sizes: tuple[int, ...] = ()
    causal: bool = False
    l2_norm: bool = True
    post_norm: bool = False
    rope_theta: float = 10000.0

    PLACEMENTS: ClassVar[tuple[str, ...]] = ("stream",)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if len(self.sizes) < 3 or self.sizes[0] != self.head_dim or self.sizes[-1] != self.head_dim:
            raise UserError(
                f"memory config: sizes must go from head_dim {self.head_dim} over one or more "
                f"hidden widths back to it, got {list(self.sizes)}"
            )
        if self.base_lr is None or self.conv != 1:
            raise UserError("memory config: placement stream has a base_lr and no convolution")

    @property
    def rules(self) -> Rules:
        """How the inner learner learns; without the limits that newer memories have."""
        return Rules(
            mini_batch=self.mini_batch,
            causal=self.causal,
            tau="mean",
            # Before the fix the target was another one: `LegacyMemory._self_divided`.
            target="standardized" if self.l2_norm else "plain",
            ln_eps=_LN_EPS,
            target_eps=_TARGET_EPS,
            read_gain=2 if len(self.sizes) > 3 else 1,
            max_step=math.inf,
            bound=math.inf,
        )


class LegacyMemory(TTTMemory):
    """The outer-loop parameters of one converted layer, float32.

    Parameters: `q_proj`, `k_proj`, `v_proj`, `rate` with biases, `learner`, `gate [D]` (alpha), and
    `post_norm`, `out_proj` where the config has them.

    Args:
        width: `D` of the model.
        heads: attention heads; not used, converted memories make no virtual tokens.
        config: its shape.

    Shape:
        - Input: `[B, T, D]`, the stream behind attention.
        - Output: see `output`.

    Raises:
        UserError: heads of a width that do not make up the model's.
    """

    def __init__(self, width: int, heads: int, config: LegacyConfig):
        nn.Module.__init__(self)  # not TTTMemory's own: it has other parameters
        if config.heads * config.head_dim != width:
            raise UserError(
                f"memory config: {config.heads} heads of {config.head_dim} are not the model's "
                f"width {width}: this memory belongs to another model"
            )
        self._config, self._width = config, width
        for name in ("q_proj", "k_proj", "v_proj"):
            self[name] = nn.Linear(width, width)
        self.rate = nn.Linear(width, config.heads)
        self.learner = InnerLearner(config.heads, config.sizes, config.rules)
        self.gate = mx.zeros((width,))
        if config.post_norm:
            self.post_norm = nn.LayerNorm(width, eps=_POST_EPS)
            self.out_proj = nn.Linear(width, width)

    def output(self, xs: mx.array, cache: MemoryCache) -> tuple[mx.array, mx.array]:
        """Learn from the tokens and return the answer `[B, T, D]` and, per row, if it is finite."""
        answer, ok = self._answer(xs, cache)
        b, h, t, f = answer.shape
        out = answer.swapaxes(1, 2).reshape(b, t, h * f)
        if self._config.post_norm:
            out = _affine(self.out_proj, self.post_norm(out))
        return out, ok.reshape(b, 1, 1)

    def share(self) -> mx.array:
        """How much of the answer joins the stream, `[D]`."""
        return mx.tanh(mx.clip(self.gate, -3, 3))

    def _inputs(self, xs: mx.array, cache: MemoryCache) -> dict[str, mx.array | None]:
        xs = wide(xs)
        q, k, v = (
            self._split(_affine(proj, xs)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if not self._config.l2_norm:
            v = self._self_divided(k, v)
        else:
            q, k = _normalize(q), _normalize(k)
            if self._config.rope:
                q, k = self._rotate(q, cache), self._rotate(k, cache)
        return {"q": q, "k": k, "v": v, "lr": self._learned_rate(xs), "decay": None}

    def _self_divided(self, k: mx.array, v: mx.array) -> mx.array:
        """Values whose plain target is what old code made of `v - k` before the fix."""
        r = v - k
        gamma, beta = (wide(self.learner[name])[:, None] for name in ("gamma", "beta"))
        return k + gamma * (r - mx.mean(r, axis=-1, keepdims=True)) / (r + _TARGET_EPS) + beta

    def _frequencies(self) -> mx.array:
        i, f = mx.arange(0, self._config.head_dim, 2), self._config.head_dim
        plain = mx.exp(-math.log(self._config.rope_theta) * i / f)
        return plain * (0.5 + 1.5 * mx.exp(-i / (2 * f)))


def _affine(layer: nn.Linear, x: mx.array) -> mx.array:
    # nn.Linear goes through addmm, which has no float64 on CPU.
    return x @ layer.weight.T + layer.bias


def _normalize(x: mx.array) -> mx.array:
    """`x / max(||x||, 1e-12)` along the last axis, as PyTorch's `normalize`."""
    return x * mx.rsqrt(mx.maximum(mx.sum(x * x, axis=-1, keepdims=True), 1e-24))


class StreamLayer(TransformerLayer):
    """moshi_mlx's layer with a memory on the stream between attention and feed-forward.

    The memory belongs to the layer's `MemoryAttention`, as in every placement. Make one with
    `share_layer`.

    Shape:
        - Input, output: `[B, T, D]`.
    """

    def __call__(
        self, xs: mx.array, cache: LayerCache, cross_attention_src: mx.array | None = None
    ) -> mx.array:
        xs = xs + self.layer_scale_1(self.self_attn(self.norm1(xs), cache=cache.self_attn))
        if self.cross_attention is not None:
            xs = self._cross_attention_block(xs, cache, cross_attention_src)
        state = getattr(cache.self_attn, "memory", None)
        if state is not None:
            xs = self._remember(xs, state)
        return xs + self.layer_scale_2(self.gating(self.norm2(xs)))

    def _remember(self, xs: mx.array, state: MemoryCache) -> mx.array:
        memory = self.self_attn.memory
        answer, ok = memory.output(xs, state)
        return xs + (mx.where(ok, memory.share(), 0) * answer).astype(xs.dtype)


Layer = TypeVar("Layer", bound=TransformerLayer)


def share_layer(kind: type[Layer], layer: TransformerLayer) -> Layer:
    """A layer of another kind with the same modules, and so the same weight arrays."""
    new = kind(layer.cfg)
    for name, child in layer.children().items():
        setattr(new, name, child)
    return new
