"""Key/value caches for one attention layer of one session: an exact ring, with optional sinks.

What lives here: which keys a query may see, where they are stored, and how they are read. What does
not: projections and RoPE of the current tokens (`layers.py`), memory (`memory.py`).

`moshi_mlx.modules.kv_cache.RotatingKVCache` keeps 4096 slots for a context of 3000, and `Attention`
then trims the last slots *in ring order*: past step 4096 the query misses its own key. Here the ring
has exactly as many slots as the window, so ring order does not matter for a single step, and several
steps at once are read in time order under a causal + window mask.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
from mlx import nn

from .trees import under
from .ttt import wide

if TYPE_CHECKING:
    from .memory import MemoryCache, Virtual

# Slots are allocated in blocks as the talk goes on: a short talk never pays for the whole window.
_BLOCK = 256
# RoPE angles are float32: past this position an angle is off by more than 0.004 rad, so stored keys
# are turned back to small positions. Only differences of positions matter.
MAX_POSITION = 1 << 16
_MEMORY = "memory."  # in front of the names of a memory's arrays


def _split(xs: mx.array, at: int) -> tuple[mx.array, mx.array]:
    return xs[..., :at, :], xs[..., at:, :]


def rotate(rope: nn.RoPE | None, xs: mx.array, delta: int | mx.array) -> mx.array:
    """Turn every row of already rotated keys by the same number of positions.

    Args:
        rope: the layer's RoPE, or None where the model has no positions (then nothing is done).
        xs: keys, `[B, H, N, D]`.
        delta: positions to add; may be negative.
    """
    if rope is None:
        return xs
    b, h, n, d = xs.shape
    return rope(xs.reshape(b, h * n, 1, d), offset=delta).reshape(b, h, n, d)


def read(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | None = None,
    virtual: "tuple[Virtual, mx.array] | None" = None,
) -> mx.array:
    """Softmax attention over real keys and, where there is a memory, virtual ones beside them.

    Args:
        q, k, v: `[B, H, T, D]`, `[B, H, N, D]` twice.
        scale: factor on the logits.
        mask: bool, True where a key may be seen; broadcasts to `[B, H, T, N]`.
        virtual: virtual keys and values, and the queries before rotation: virtual keys are at
            distance 0.
    """
    own = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    if virtual is None:
        return own
    scores = wide(q @ k.swapaxes(2, 3)) * scale
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return mix(own, scores, *virtual, scale)


def mix(
    own: mx.array, scores: mx.array, virtual: "Virtual", plain_q: mx.array, scale: float
) -> mx.array:
    """Put virtual tokens into a softmax that has been taken over real ones.

    A virtual token of logit `s`, value `u` and gate `a` takes part with the weight `|a| exp(s)` and
    the value `sign(a) u`: with gates of 1 that is one softmax over all keys. Written as a
    correction of `own`, so that `a = 0` gives `own` bit for bit and still has a gradient.

    Args:
        own: attention over the real keys, `[B, H, T, D]`.
        scores: their logits, `[B, H, T, N]`.
        virtual: the virtual tokens.
        plain_q: queries before rotation, `[B, H, T, D]`.
        scale: factor on virtual logits.
    """
    total = mx.logsumexp(scores, axis=-1, keepdims=True)
    logits = virtual.logits(plain_q, scale)
    top = mx.stop_gradient(mx.maximum(total, mx.max(logits, axis=-1, keepdims=True)))
    weights = mx.exp(logits - top)
    signed, size = virtual.gate * weights, mx.abs(virtual.gate) * weights
    size = mx.sum(size, axis=-1, keepdims=True)
    change = virtual.mix(signed) - size * own.astype(scores.dtype)
    change = change / (mx.exp(total - top) + size)
    return (own.astype(scores.dtype) + change).astype(own.dtype)


class WindowKVCache:
    """The exact window: a query sees its own key and the latest before it, `window` keys in all.

    With `sinks = N` the first `N` tokens of the talk stay visible for ever, and the window holds the
    `window - N` latest beside them. When a sink would fall out of the window it is turned, on read,
    to stay at the window's far edge (Xiao et al. 2023, arXiv 2309.17453), so that no distance ever
    exceeds what the model was trained on.

    It has moshi_mlx's cache interface (`offset`, `update_and_fetch`, `reset`, `state`), so stock
    layers run on it one token at a time; `attend` takes any number of tokens.

    Args:
        window (int): keys a query sees, itself included.
        sinks (int): how many of them are the talk's first tokens. Default: 0.
        rope (nn.RoPE, optional): how keys were rotated; None for models without positions.

    Shape: keys and values `[B, H, T, D]`, any float dtype, stored as they come.
    """

    def __init__(self, window: int, sinks: int = 0, rope: nn.RoPE | None = None):
        if not 0 <= sinks < window:
            raise ValueError(
                f"[WindowKVCache] sinks must be in 0..window-1, got {sinks} of {window}"
            )
        self.window, self.sinks, self.rope = window, sinks, rope
        self.reset()

    def reset(self) -> None:
        """Forget everything; equal to a fresh object."""
        self.keys = self.values = self.sink_keys = None
        self.length = 0
        self.offset = 0

    # -- where things are ---------------------------------------------------------------------

    @property
    def ring(self) -> int:
        """Slots for the latest tokens; they follow the sinks' rows."""
        return self.window - self.sinks

    def _slot(self, token: int) -> int:
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.ring

    @property
    def _sink_turn(self) -> int:
        """Positions by which sinks are moved for the query that was stored last."""
        return max(0, self.offset - self.window) if self.sinks else 0

    # -- storing ------------------------------------------------------------------------------

    def _reserve(self, tokens: int, like: mx.array) -> None:
        have = 0 if self.keys is None else self.keys.shape[2]
        need = min(self.length + tokens, self.window)
        if need <= have:
            return
        b, h, _, d = like.shape
        # Doubling: few reallocations, and few shapes to trace.
        more = min(max(-(-need // _BLOCK) * _BLOCK, 2 * have), self.window) - have
        empty = mx.zeros((b, h, more, d), like.dtype)
        if have == 0:
            self.keys, self.values = empty, empty
            self.sink_keys = mx.zeros((b, h, self.sinks, d), like.dtype)
        else:
            self.keys = mx.concatenate([self.keys, empty], axis=2)
            self.values = mx.concatenate([self.values, empty], axis=2)

    def _write(self, slot: int, keys: mx.array, values: mx.array) -> None:
        # Out of place on purpose: a snapshot of `state` must not change under its owner's hands.
        start = mx.array([slot])
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))

    def _store(self, keys: mx.array, values: mx.array) -> None:
        """Write `T` new tokens: sinks first, then around the ring. `T <= ring` is the caller's duty."""
        tokens = keys.shape[2]
        self._reserve(tokens, keys)
        first = max(0, min(self.sinks - self.length, tokens))
        if first:
            self._store_sinks(keys[..., :first, :], values[..., :first, :])
        if first < tokens:
            self._store_ring(keys[..., first:, :], values[..., first:, :], self.length + first)
        self.length += tokens
        self.offset += tokens

    def _store_sinks(self, keys: mx.array, values: mx.array) -> None:
        self.sink_keys = mx.slice_update(self.sink_keys, keys, mx.array([self.length]), axes=(2,))
        self._write(self.length, keys, values)

    def _store_ring(self, keys: mx.array, values: mx.array, token: int) -> None:
        slot = self._slot(token)
        room = self.window - slot
        if keys.shape[2] <= room:
            return self._write(slot, keys, values)
        (k0, k1), (v0, v1) = _split(keys, room), _split(values, room)
        self._write(slot, k0, v0)
        self._write(self.sinks, k1, v1)

    def _rebase(self) -> None:
        """Turn stored keys back so that the next token's position is `window` again.

        Only between calls: the tokens of one call were rotated by its caller.
        """
        if self.offset <= MAX_POSITION:
            return
        shift = self.offset - self.window
        self.keys = rotate(self.rope, self.keys, -shift)
        self.offset = self.window

    # -- reading ------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store one token and return all that it may see (moshi_mlx's cache interface).

        Args:
            keys: `[B, H, 1, D]`, rotated to position `offset`.
            values: `[B, H, 1, D]`.

        Returns:
            Keys and values `[B, H, N, D]`, `N = min(tokens so far, window)`, in ring order.

        Raises:
            ValueError: for `T > 1`, where ring order would need a mask that stock layers do not
                build; use `attend` (`layers.WindowAttention`).
        """
        if keys.shape[2] != 1:
            raise ValueError(
                f"[WindowKVCache] update_and_fetch takes one token at a time, got {keys.shape[2]}: "
                "use layers.use_window_attention(transformer) for more"
            )
        self._store(keys, values)
        if self._sink_turn:
            turned = rotate(self.rope, self.sink_keys, self._sink_turn)
            self.keys = mx.slice_update(self.keys, turned, mx.array([0]), axes=(2,))
        seen = min(self.length, self.window)
        fetched = self.keys[..., :seen, :], self.values[..., :seen, :]
        self._rebase()
        return fetched

    def attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        virtual: "tuple[Virtual, mx.array] | None" = None,
    ) -> mx.array:
        """Store `T` tokens and return what each of them reads.

        Args:
            q, k: `[B, H, T, D]`, rotated to positions `offset .. offset + T - 1`.
            v: `[B, H, T, D]`.
            scale: factor on the logits.
            virtual: a memory's tokens and the unrotated queries; see `read`.

        Returns:
            `[B, H, T, D]`. The same numbers for any split of a sequence into calls.
        """
        tokens = q.shape[2]
        if tokens == 1:
            k, v = self.update_and_fetch(k, v)
            return read(q, k, v, scale, virtual=virtual)
        # In pieces no longer than the ring: memory stays linear in T and a piece wraps at most once.
        outs = []
        for start in range(0, tokens, self.ring):
            part = slice(start, start + self.ring)
            some = virtual and (virtual[0].part(part), virtual[1][:, :, part])
            piece = q[:, :, part], k[:, :, part], v[:, :, part]
            outs.append(self._attend_piece(*piece, scale, some))
        self._rebase()
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)

    def _attend_piece(self, q, k, v, scale, virtual) -> mx.array:
        before, position = self.length, self.offset
        self._reserve(k.shape[2], k)
        old_k, old_v = self._latest(self.ring - 1)
        self._store(k, v)
        new = max(0, min(self.sinks - before, k.shape[2]))
        k = mx.concatenate([old_k, k[..., new:, :]], axis=2)
        v = mx.concatenate([old_v, v[..., new:, :]], axis=2)
        query = mx.arange(before, self.length)[:, None]
        token = mx.arange(self.length - k.shape[2], self.length)[None]
        mask = (token <= query) & (token > query - self.ring)
        if not self.sinks:
            return read(q, k, v, scale, mask, virtual)
        return self._read_with_sinks(q, k, v, scale, mask, query, position, virtual)

    def _read_with_sinks(self, q, k, v, scale, mask, query, position, virtual) -> mx.array:
        seen = min(self.sinks, self.length)
        sink_scores = self._turn_queries(q, position) @ self.sink_keys[..., :seen, :].swapaxes(2, 3)
        scores = wide(mx.concatenate([sink_scores, q @ k.swapaxes(2, 3)], axis=3))
        mask = mx.concatenate([mx.arange(seen)[None] <= query, mask], axis=1)
        scores = mx.where(mask, scores * scale, -mx.inf)
        v = mx.concatenate([self.values[..., :seen, :], v], axis=2)
        own = mx.softmax(scores, axis=-1, precise=True).astype(v.dtype) @ v
        return own if virtual is None else mix(own, scores, *virtual, scale)

    def _turn_queries(self, q: mx.array, position: int) -> mx.array:
        """Turn each query back as far as its sinks are turned forward: the logits are the same."""
        still = max(0, min(self.window - 1 - position, q.shape[2]))
        if self.rope is None or still == q.shape[2]:
            return q
        first, rest = _split(q, still)
        turned = mx.fast.rope(
            rest,
            self.rope.dims,
            traditional=self.rope.traditional,
            base=self.rope.base,
            scale=-1.0,
            offset=position + still - (self.window - 1),
        )
        return mx.concatenate([first, turned], axis=2)

    def _latest(self, most: int) -> tuple[mx.array, mx.array]:
        """The latest keys and values of the ring in time order, at most `most` of them."""
        count = min(max(self.length - self.sinks, 0), most)
        if count == 0:
            return self.keys[..., :0, :], self.values[..., :0, :]
        first = self._slot(self.length - count)
        last = self._slot(self.length - 1)
        if first <= last:
            return self.keys[..., first : last + 1, :], self.values[..., first : last + 1, :]
        ends = slice(first, self.window), slice(self.sinks, last + 1)
        keys = mx.concatenate([self.keys[..., end, :] for end in ends], axis=2)
        values = mx.concatenate([self.values[..., end, :] for end in ends], axis=2)
        return keys, values

    # -- one traced step ----------------------------------------------------------------------

    def begin_step(self) -> bool:
        """Make room for one token; True where `traced_step` may take it (sinks are complete)."""
        if self.keys is None or self.length < self.sinks:
            return False
        self._reserve(1, self.keys)
        return True

    @property
    def step_numbers(self) -> tuple[int, ...]:
        """For the token to come: its position, its slot, the turn of the sinks, rows it may see,
        and its place in the memory's mini-batch (0 without one)."""
        turn = max(0, self.offset + 1 - self.window) if self.sinks else 0
        return self.offset, self._slot(self.length), turn, min(self.length + 1, self.window), 0

    @property
    def step_shape(self) -> tuple:
        """Layers of equal shape share their step numbers."""
        return self.window, self.sinks, None

    def end_step(self, arrays: dict[str, mx.array]) -> None:
        """Take over what a `TracedStep` left behind."""
        self.keys, self.values = arrays["keys"], arrays["values"]
        self.length += 1
        self.offset += 1
        self._rebase()

    # -- state --------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, mx.array]:
        """Arrays that change while talking: `keys`, `values` and, with sinks, `sink_keys`."""
        if self.keys is None:
            return {}
        arrays = {"keys": self.keys, "values": self.values}
        return arrays | ({"sink_keys": self.sink_keys} if self.sinks else {})

    @property
    def meta_state(self) -> dict[str, int]:
        """Python numbers that change while talking."""
        return {"length": self.length, "offset": self.offset}

    def load_state(self, arrays: dict[str, mx.array], meta: dict[str, int]) -> None:
        """Continue from `state` and `meta_state` of an equal cache, bit for bit."""
        self.reset()
        self.keys, self.values = arrays.get("keys"), arrays.get("values")
        if self.keys is not None:
            b, h, _, d = self.keys.shape
            empty = mx.zeros((b, h, 0, d), self.keys.dtype)
            self.sink_keys = arrays["sink_keys"] if self.sinks else empty
        self.length, self.offset = int(meta["length"]), int(meta["offset"])


class HybridKVCache(WindowKVCache):
    """A window with a memory beside it: what has left the window can still be answered from it.

    Args:
        window, sinks, rope: see `WindowKVCache`; the window may be much smaller than the context.
        new_memory: makes the memory's state before the first token.
    """

    def __init__(
        self,
        window: int,
        sinks: int,
        rope: nn.RoPE | None,
        new_memory: "Callable[[], MemoryCache]",
    ):
        self._new_memory = new_memory
        super().__init__(window, sinks, rope)

    def reset(self) -> None:
        super().reset()
        self.memory = self._new_memory()

    @property
    def step_numbers(self) -> tuple[int, ...]:
        return *super().step_numbers[:4], self.memory.position

    @property
    def step_shape(self) -> tuple:
        return self.window, self.sinks, self.memory.position

    def end_step(self, arrays: dict[str, mx.array]) -> None:
        super().end_step(arrays)
        self.memory.take(under(_MEMORY, arrays))

    @property
    def state(self) -> dict[str, mx.array]:
        memory = {f"{_MEMORY}{name}": array for name, array in self.memory.state.items()}
        return super().state | memory

    @property
    def meta_state(self) -> dict[str, int]:
        return super().meta_state | self.memory.meta_state

    def load_state(self, arrays: dict[str, mx.array], meta: dict[str, int]) -> None:
        super().load_state(arrays, meta)
        self.memory.load_state(under(_MEMORY, arrays), meta)


class StepAt(NamedTuple):
    """The Python numbers of one step as arrays, shared by all layers (int32 `[]` unless stated)."""

    offset: mx.array
    slot: mx.array  # [1]
    turn: mx.array
    mask: mx.array | None  # bool [1, 1, 1, N]; None once every row may be seen
    place: mx.array

    @classmethod
    def of(cls, numbers: mx.array, rows: int, full: bool) -> "StepAt":
        """From `WindowKVCache.step_numbers` as an int32 array `[5]`."""
        mask = None if full else (mx.arange(rows) < numbers[3])[None, None, None]
        return cls(numbers[0], numbers[1:2], numbers[2], mask, numbers[4])


class TracedStep:
    """`WindowKVCache` for one token without a Python number inside, so that `mx.compile` can trace it.

    Arrays come in, arrays go out (`state`); rows that hold nothing yet are masked, not sliced off.
    """

    def __init__(self, cache: WindowKVCache, arrays: dict[str, mx.array], at: StepAt):
        self.rope, self.sinks, self.at = cache.rope, cache.sinks, at
        self._own = {n: a for n, a in arrays.items() if not n.startswith(_MEMORY)}
        memory = under(_MEMORY, arrays)
        self.memory = cache.memory.traced(memory, at.place) if memory else None

    @property
    def offset(self) -> mx.array:
        return self.at.offset

    @property
    def state(self) -> dict[str, mx.array]:
        """As `WindowKVCache.state`."""
        memory = self.memory.state if self.memory is not None else {}
        return self._own | {f"{_MEMORY}{name}": array for name, array in memory.items()}

    def attend(self, q, k, v, scale: float, virtual=None) -> mx.array:
        """As `WindowKVCache.attend` for `T = 1`."""
        keys = mx.slice_update(self._own["keys"], k, self.at.slot, axes=(2,))
        if self.sinks:
            turned = rotate(self.rope, self._own["sink_keys"], self.at.turn)
            keys = mx.slice_update(keys, turned, mx.array([0]), axes=(2,))
        values = mx.slice_update(self._own["values"], v, self.at.slot, axes=(2,))
        self._own["keys"], self._own["values"] = keys, values
        return read(q, keys, values, scale, self.at.mask, virtual)
