"""A memory for one layer: what it reads, how it learns from it, and what it hands to attention.

    norm1(x) --conv--> q, k      --> inner learner (ttt.py) --> read --> virtual keys and values
             --------> v, rate, decay

What lives here: `MemoryConfig`, the module `TTTMemory` with its outer-loop parameters, and
`MemoryCache`, all of one layer's memory that changes while talking. What does not: the inner
learner's maths (`ttt.py`), where a layer puts the result (`layers.py`), softmax (`kv_cache.py`).

Parameters and state are float32 whatever the model's dtype: in bfloat16 an inner step of 0.001
rounds away (74 to 99 % of the entries never move).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import mlx.core as mx
from mlx import nn

from .errors import UserError
from .ttt import TTTMLP, Arrays, Rules, TTTLinear, TTTState, wide

Placement = Literal["cache", "after", "replace"]
Mode = Literal["on", "off", "frozen"]
MODES = get_args(Mode)
# Arrays of a `MemoryCache` that are not its inner learner's.
_OUTER = ("tail", "slot_keys", "slot_values")


@dataclass(frozen=True)
class MemoryConfig:
    """The shape of a memory and where it sits. All widths are independent of the model's.

    Args:
        layers: indices of temporal layers, or `"top:N"` for the last N.
        placement: `cache` hands attention virtual keys and values, `after` adds a gated output to
            attention's, `replace` takes attention's place as far as its gate is open.
        read: `query` makes one virtual token per token, from the memory's answer to that token;
            `slots` makes `slots` of them with learned probes, anew whenever a mini-batch is folded.
        inner: `mlp` or `linear`.
        heads, head_dim: `H` and `f` of the inner learner.
        hidden: `F` of the inner MLP.
        mini_batch: `C`, tokens between two changes of the inner weights.
        base_lr: the learned rate is `base_lr * sigmoid(x . w + b) / f`, and begins at a tenth of
            `base_lr / f`. Default: `0.05 f`.
        conv: width of the causal convolution in front of queries and keys; 1 is none.
        slots: probes of the `slots` read.
        window: keys attention sees beside the memory; None keeps the talk's own setting.
        sinks: first tokens kept visible for ever, counted in the window.
        forget: learned decay at every fold, towards the learned initial weights (`init`) or `zero`.
        rope: rotate queries and keys of the memory by position inside the mini-batch.
        target: `plain` or `standardized`, see `ttt.Rules`.
    """

    layers: tuple[int, ...] | str
    placement: Placement = "cache"
    read: Literal["query", "slots"] = "query"
    inner: Literal["mlp", "linear"] = "mlp"
    heads: int = 2
    head_dim: int = 64
    hidden: int = 128
    mini_batch: int = 16
    base_lr: float | None = None
    conv: int = 4
    slots: int = 16
    window: int | None = None
    sinks: int = 0
    forget: Literal["init", "zero"] | None = None
    rope: bool = False
    target: Literal["plain", "standardized"] = "standardized"

    PLACEMENTS: ClassVar[tuple[str, ...]] = ("cache", "after", "replace")

    def __post_init__(self):
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("heads", "head_dim", "hidden", "mini_batch", "conv", "slots"):
            if getattr(self, name) < 1:
                raise UserError(f"memory config: {name} must be at least 1")
        known = {
            "placement": self.PLACEMENTS,
            "read": ("query", "slots"),
            "inner": ("mlp", "linear"),
            "forget": (None, "init", "zero"),
            "target": ("plain", "standardized"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"memory config: {name} must be one of {values}, got {getattr(self, name)!r}"
                )
        if self.read == "slots" and self.placement != "cache":
            raise UserError("memory config: the slots read makes virtual tokens: placement cache")

    @property
    def rules(self) -> Rules:
        """How the inner learner learns."""
        return Rules(mini_batch=self.mini_batch, forget=self.forget, target=self.target)

    def layer_indices(self, num_layers: int) -> list[int]:
        """The layers meant, in a model of `num_layers`.

        Raises:
            UserError: a layer that the model does not have, or words other than `top:N`.
        """
        layers = self.layers
        if isinstance(layers, str):
            word, _, count = layers.partition(":")
            if word == "depformer":
                raise UserError(
                    "memory config: memory does not go into the depformer: it starts over with "
                    "every frame and has nothing to remember"
                )
            if word != "top" or not count.isdigit():
                raise UserError(f"memory config: layers must be a list or 'top:N', got {layers!r}")
            layers = range(num_layers - int(count), num_layers)
        wrong = [i for i in layers if not 0 <= i < num_layers]
        if wrong or not len(layers) or len(set(layers)) != len(layers):
            raise UserError(
                f"memory config: layers {self.layers} do not name distinct layers of "
                f"0..{num_layers - 1}"
            )
        return sorted(layers)


@dataclass
class MemoryCache:
    """One layer's memory of one session: the inner learner, and the last inputs of the convolution.

    Attributes:
        mode: `on` learns and reads, `frozen` only reads.
        tail: the last `conv - 1` inputs, `[B, conv - 1, D]`.
        inner: the inner learner's state.
        slots: virtual keys and values of the `slots` read, `[B, H, slots, D_h]`, else None.
    """

    mode: Mode
    tail: mx.array
    inner: TTTState
    slots: tuple[mx.array, mx.array] | None = None
    # While a step is traced: the place in the mini-batch. Nothing is folded then.
    place: mx.array | None = None
    # After a step: bool `[B]`, rows whose memory is finite.
    ok: mx.array | None = None

    def traced(self, arrays: Arrays, place: mx.array) -> "MemoryCache":
        """The same memory on other arrays, for one traced step."""
        twin = replace(self, place=place)
        twin.take(arrays)
        return twin

    @property
    def position(self) -> int:
        """Place of the next token in its mini-batch."""
        return self.inner.tokens % self.inner.rows["lr"].shape[2]

    @property
    def state(self) -> Arrays:
        # An empty array has no place in a safetensors file (mlx 0.26).
        arrays = ({"tail": self.tail} if self.tail.size else {}) | self.inner.arrays()
        if self.slots is not None:
            arrays |= {"slot_keys": self.slots[0], "slot_values": self.slots[1]}
        return arrays

    @property
    def meta_state(self) -> dict[str, int]:
        return {"tokens": self.inner.tokens, "updates": self.inner.updates}

    def load_state(self, arrays: Arrays, meta: dict[str, int]) -> None:
        """Continue from `state` and `meta_state`, bit for bit.

        Raises:
            UserError: the state of another memory.
        """
        own = {name: a for name, a in arrays.items() if name not in _OUTER}
        self.inner = self.inner.load(own, meta)
        self.take(arrays)

    def take(self, arrays: Arrays) -> None:
        """Go on with other arrays, named as in `state`; unchecked, for every frame."""
        if self.tail.size:
            self.tail = arrays["tail"]
        if self.slots is not None:
            self.slots = arrays["slot_keys"], arrays["slot_values"]
        self.inner = self.inner.with_arrays(arrays)


class Virtual:
    """Virtual keys and values for `T` tokens, at distance 0 from whoever asks.

    Args:
        parts: pieces of consecutive tokens, each `(tokens, keys, values)`: `[B, H, n, D]` shared by
            the piece's tokens, or, where `own` is set, `[B, H, tokens, D]`, one for each token.
        gate: amplitude per attention head, `[H, 1, 1]`; 0 is closed.
        ok: bool `[B, 1, 1, 1]`: rows whose memory is finite.
    """

    def __init__(self, parts: Sequence, gate: mx.array, ok: mx.array, own: bool):
        self.parts, self.ok, self.own = parts, ok, own
        self.gate = mx.where(ok, gate, 0)

    def part(self, tokens: slice) -> "Virtual":
        """The virtual tokens of some of the tokens."""
        chosen, done = [], 0
        for count, keys, values in self.parts:
            first, last = max(tokens.start - done, 0), min(tokens.stop - done, count)
            if first < last:
                own = (slice(None), slice(None), slice(first, last))
                pair = (keys[own], values[own]) if self.own else (keys, values)
                chosen.append((last - first, *pair))
            done += count
        return Virtual(chosen, self.gate, self.ok, self.own)

    def logits(self, q: mx.array, scale: float) -> mx.array:
        """`[B, H, T, n]` float32 for unrotated queries `[B, H, T, D]`."""
        q, done, out = wide(q), 0, []
        for tokens, keys, _ in self.parts:
            mine = q[:, :, done : done + tokens]
            out.append(
                mx.sum(mine * keys, axis=-1, keepdims=True)
                if self.own
                else mine @ keys.swapaxes(2, 3)
            )
            done += tokens
        return mx.where(self.ok, mx.concatenate(out, axis=2) * scale, 0)

    def mix(self, weights: mx.array) -> mx.array:
        """`[B, H, T, n]` weights -> `[B, H, T, D]`."""
        done, out = 0, []
        for tokens, _, values in self.parts:
            mine = weights[:, :, done : done + tokens]
            out.append(mine * values if self.own else mine @ values)
            done += tokens
        return mx.concatenate(out, axis=2)


def _unit(x: mx.array) -> mx.array:
    """L2-normalized along the last axis; zero stays zero, with a finite gradient."""
    return x * mx.rsqrt(mx.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _orthonormal(rows: int, columns: int) -> mx.array:
    """Random `[rows, columns]` with orthonormal rows, or columns where those are fewer."""
    tall = mx.random.normal((max(rows, columns), min(rows, columns)))
    q, _ = mx.linalg.qr(tall, stream=mx.cpu)  # MLX has no other
    return q if rows >= columns else q.T


def _affine(layer: nn.Linear, x: mx.array) -> mx.array:
    # nn.Linear goes through addmm, which has no float64 on CPU.
    return x @ layer.weight.T + layer.bias


class TTTMemory(nn.Module):
    """The outer-loop parameters of one layer's memory.

    Args:
        width: `D` of the model.
        heads: attention heads, for virtual tokens.
        config: its shape.

    Shape:
        - Input: `[B, T, D]`, the layer's `norm1(x)`.
        - Output: see `virtual` and `output`.
    """

    def __init__(self, width: int, heads: int, config: MemoryConfig):
        super().__init__()
        self._config, self._width, self._heads = config, width, heads
        inner = config.heads * config.head_dim
        if config.read == "query":
            self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.rate = nn.Linear(width, config.heads)
        self.rate.weight = 0.1 * self.rate.weight
        self.rate.bias = mx.full((config.heads,), -2.2)  # sigmoid: 0.1
        if config.forget:
            self.decay = nn.Linear(width, config.heads)
            # Little is forgotten at first: exp(-softplus(-8)) is 0.9997 a token.
            self.decay.bias = mx.full((config.heads,), -8.0)
        if config.conv > 1:
            for name in ("q_conv", "k_conv") if config.read == "query" else ("k_conv",):
                self[name] = 0.02 * mx.random.normal((config.conv, width))
                self[name][-1] += 1  # at first the token itself
        sizes = (config.heads, config.head_dim)
        if config.inner == "mlp":
            self.learner = TTTMLP(*sizes, config.hidden, config.rules)
            # Keys have length 1: from smaller weights all hidden units say the same of all keys.
            self.learner.W1 = mx.random.normal(self.learner.W1.shape)
        else:
            self.learner = TTTLinear(*sizes, config.rules)
        # tau_t = 1: every row counts in full from the start. Averaged over the mini-batch (tau_t =
        # 1/(t+1)) the steps were too small to learn recall from.
        self.learner.token_idx = 1 - 1 / mx.arange(1, config.mini_batch + 1).astype(mx.float32)
        if config.placement == "cache":
            self.key_proj = nn.Linear(inner, width, bias=False)
            self.value_proj = nn.Linear(inner, width, bias=False)
            # Closed, and still with a gradient: see `kv_cache.mix`.
            self.gate = mx.zeros((heads, 1, 1))
            if config.read == "slots":
                shape = (config.heads, config.slots, config.head_dim)
                self.probes = _unit(mx.random.normal(shape))
        else:
            self.out_proj = nn.Linear(inner, width, bias=False)
            self.gate = mx.zeros((width,))

    def inherit(self, in_proj: mx.array, out_proj: mx.array) -> None:
        """Start from the attention beside which the memory sits.

        It files under attention's keys and asks by its queries, turned at random for each head, and
        what it recalls of a token gives, as far as its width goes, that token's own key and value.
        From here an untrained memory already recalls at once; from random projections recall stayed
        at chance for hundreds of steps (docs/evidence.md).

        Args:
            in_proj: attention's queries, keys and values, `[3 D, D]`.
            out_proj: behind it, `[D, D]`.
        """
        config, width = self._config, self._width
        queries, keys, values = mx.split(in_proj, 3)
        turns = [_orthonormal(config.head_dim, width // self._heads) for _ in range(config.heads)]

        def turned(weight: mx.array) -> mx.array:
            by_head = weight.reshape(self._heads, -1, width)
            return mx.concatenate([r @ by_head[j % self._heads] for j, r in enumerate(turns)])

        self.k_proj.weight = turned(keys)
        if config.read == "query":
            self.q_proj.weight = turned(queries)
        inner = config.heads * config.head_dim
        spread = _orthonormal(inner, width) * math.sqrt(max(inner / width, 1))
        back = spread.T / max(inner / width, 1)
        self.v_proj.weight = spread
        if config.placement == "cache":
            self.key_proj.weight, self.value_proj.weight = keys @ back, values @ back
        else:
            self.out_proj.weight = out_proj @ values @ back

    @property
    def config(self) -> MemoryConfig:
        return self._config

    def init_cache(
        self, batch: int, mode: Mode = "on", dtype: mx.Dtype = mx.float32
    ) -> MemoryCache:
        """The memory before the first token.

        Args:
            batch: rows, each with a state of its own.
            mode: `on` or `frozen`.
        """
        dtype = wide(self.gate).dtype
        tail = mx.zeros((batch, self._config.conv - 1, self._width), dtype)
        cache = MemoryCache(mode, tail, self.learner.init_state(batch))
        if self._config.read == "slots":
            cache.slots = self._probe(cache.inner)
        return cache

    def report(self, cache: MemoryCache) -> dict[str, float | int]:
        """Counters and norms of one layer; see `Session.memory_report`."""
        norms = {n: mx.max(a).item() for n, a in self.learner.norms(cache.inner).items()}
        return cache.meta_state | norms | {"gate": mx.max(mx.abs(self.gate)).item()}

    def is_closed(self) -> bool:
        """Whether every gate is exactly shut (one host read): then the layer is the base model's."""
        return not mx.any(self.gate != 0).item()

    # -- reading and learning -----------------------------------------------------------------

    def virtual(self, xs: mx.array, cache: MemoryCache) -> Virtual:
        """Learn from the tokens and return what attention should see beside their window."""
        if self._config.read == "slots":
            return self._virtual_slots(xs, cache)
        answer, ok = self._answer(xs, cache)
        tokens = xs.shape[1]
        return Virtual([(tokens, *self._tokens(answer))], self.gate, ok, own=True)

    def output(self, xs: mx.array, cache: MemoryCache) -> tuple[mx.array, mx.array]:
        """Learn from the tokens and return the answer `[B, T, D]` and, per row, if it is finite."""
        answer, ok = self._answer(xs, cache)
        b, h, t, f = answer.shape
        out = self.out_proj(answer.swapaxes(1, 2).reshape(b, t, h * f))
        return out, ok.reshape(b, 1, 1)

    def _answer(self, xs: mx.array, cache: MemoryCache) -> tuple[mx.array, mx.array]:
        """The inner learner's answer `[B, H, T, f]`, zero in rows that are not finite."""
        inputs = self._inputs(xs, cache)
        answer = self._learn(inputs, cache)
        ok = mx.isfinite(answer).all(axis=(1, 2, 3), keepdims=True)
        cache.ok = ok.reshape(-1)
        return mx.where(ok, answer, 0), ok

    def _learn(self, inputs: dict, cache: MemoryCache) -> mx.array:
        """Answer the queries and, unless frozen, learn: `[B, H, T, f]`."""
        if cache.mode == "frozen":
            return self.learner.read(inputs["q"], cache.inner)
        if cache.place is not None:
            answer, cache.inner = self.learner.trace(**inputs, state=cache.inner, place=cache.place)
        else:
            answer, cache.inner = self.learner(**inputs, state=cache.inner)
        return answer

    def end_step(self, cache: MemoryCache) -> None:
        """After a traced step: count the token, fold a full mini-batch, ask the probes anew."""
        if cache.mode == "frozen":
            return
        cache.inner = self.learner.advance(cache.inner)
        if cache.slots is not None and cache.inner.tokens % self._config.mini_batch == 0:
            cache.slots = self._probe(cache.inner)

    def _virtual_slots(self, xs: mx.array, cache: MemoryCache) -> Virtual:
        inputs, parts, done, tokens = self._inputs(xs, cache), [], 0, xs.shape[1]
        while done < tokens:
            end = min(tokens, done + self._until_fold(cache))
            parts.append((end - done, *cache.slots))
            if cache.mode == "on":
                piece = {n: None if a is None else a[:, :, done:end] for n, a in inputs.items()}
                self._learn(piece, cache)
                # The fold at a piece's end shows in the slots of the next piece.
                if cache.place is None and cache.inner.tokens % self._config.mini_batch == 0:
                    cache.slots = self._probe(cache.inner)
            done = end
        keys = mx.concatenate([keys for _, keys, _ in parts], axis=2)
        ok = mx.isfinite(keys).all(axis=(1, 2, 3), keepdims=True)
        cache.ok = ok.reshape(-1)
        parts = [(n, mx.where(ok, k, 0), mx.where(ok, v, 0)) for n, k, v in parts]
        return Virtual(parts, self.gate, ok, own=False)

    def _until_fold(self, cache: MemoryCache) -> int:
        """Tokens that see the same slots from here on."""
        if cache.mode == "frozen" or cache.place is not None:
            return 1 << 30
        return self._config.mini_batch - cache.inner.tokens % self._config.mini_batch

    def _probe(self, inner: TTTState) -> tuple[mx.array, mx.array]:
        """What the probes find in the folded weights, as virtual keys and values."""
        batch = inner.step.shape[0]
        probes = mx.broadcast_to(self.probes[None], (batch, *self.probes.shape))
        answer = self.learner.read(probes, inner)
        return self._tokens(answer)

    def _tokens(self, answer: mx.array) -> tuple[mx.array, mx.array]:
        """Answers `[B, H_m, n, f]` -> virtual keys and values `[B, H, n, D_h]`."""
        b, h, n, f = answer.shape
        flat = answer.swapaxes(1, 2).reshape(b, n, h * f)
        shape = (b, n, self._heads, self._width // self._heads)
        keys, values = self.key_proj(flat), self.value_proj(flat)
        return keys.reshape(shape).swapaxes(1, 2), values.reshape(shape).swapaxes(1, 2)

    def _inputs(self, xs: mx.array, cache: MemoryCache) -> dict[str, mx.array | None]:
        """Queries, keys, values `[B, H, T, f]`, rates and decays `[B, H, T]`, in float32."""
        line, xs = self._line(xs, cache), wide(xs)
        k = _unit(self._split(self.k_proj(self._convolve(line, "k_conv"))))
        # The slots read asks by its probes alone.
        q = k
        if self._config.read == "query":
            q = _unit(self._split(self.q_proj(self._convolve(line, "q_conv"))))
        if self._config.rope:
            q, k = self._rotate(q, cache), self._rotate(k, cache)
        return {
            "q": q,
            "k": k,
            "v": self._split(self.v_proj(xs)),
            "lr": self._learned_rate(xs),
            "decay": self._learned_decay(xs),
        }

    def _line(self, xs: mx.array, cache: MemoryCache) -> mx.array:
        """The inputs behind the `conv - 1` before them, which are state: `[B, conv - 1 + T, D]`."""
        line = mx.concatenate([cache.tail, wide(xs)], axis=1) if cache.tail.size else wide(xs)
        cache.tail = line[:, xs.shape[1] :]
        return line

    def _convolve(self, line: mx.array, name: str) -> mx.array:
        """Causal depthwise convolution: `[B, conv - 1 + T, D]` -> `[B, T, D]`."""
        if self._config.conv == 1:
            return line
        tokens = line.shape[1] - self._config.conv + 1
        return sum(tap * line[:, i : i + tokens] for i, tap in enumerate(self[name]))

    def _split(self, x: mx.array) -> mx.array:
        b, t, _ = x.shape
        return x.reshape(b, t, self._config.heads, self._config.head_dim).swapaxes(1, 2)

    def _rotate(self, x: mx.array, cache: MemoryCache) -> mx.array:
        """RoPE by place in the mini-batch; the place may be a traced array."""
        c, t = self._config.mini_batch, x.shape[2]
        start = cache.inner.tokens if cache.place is None else cache.place
        # A frozen memory stays where it stopped: one token at a time or many, the same place.
        steps = mx.arange(t) if cache.mode == "on" else mx.zeros((t,), mx.int32)
        place = (start + steps) % c
        angle = place[:, None] * self._frequencies()
        cos, sin = mx.cos(angle), mx.sin(angle)
        a, b = x[..., 0::2], x[..., 1::2]
        return mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)

    def _frequencies(self) -> mx.array:
        """RoPE's angle from one place to the next, for each pair of entries: `[f / 2]`."""
        f = self._config.head_dim
        return mx.exp(-math.log(10000.0) * mx.arange(0, f, 2) / f)

    def _learned_rate(self, xs: mx.array) -> mx.array:
        f = self._config.head_dim
        base = 0.05 * f if self._config.base_lr is None else self._config.base_lr
        return base / f * mx.sigmoid(_affine(self.rate, xs)).swapaxes(1, 2)

    def _learned_decay(self, xs: mx.array) -> mx.array | None:
        if not self._config.forget:
            return None
        return mx.exp(-nn.softplus(_affine(self.decay, xs))).swapaxes(1, 2)
