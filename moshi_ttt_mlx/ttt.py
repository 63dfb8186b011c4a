"""Inner learners: a small network per head whose weights are the memory and learn while it talks.

What lives here: the inner network, its gradients written out, its state, and one rule that takes any
number of tokens at any offset. What does not: where q, k, v and the learned rate come from
(`memory.py`), and a fused kernel of the step (`ttt_kernels.py`).

The maths is TTT-Linear and TTT-MLP of Sun et al. 2024 (arXiv 2407.04620). With rows `k <= t` of the
running mini-batch (their layer inputs `x`, gradients `g` and rates `lr`), layer `i` of token `t` is

    z = x W_i + b_i - tau_t * sum_k lr_k (1 + x . x_k) g_k

so the weights themselves change once every `C` tokens, when the rows are folded into them. One token
at a time and many at once are the same function, cut differently: nothing is ever padded.

Everything is computed and kept in float32, whatever the model's dtype (float64 stays float64).

Example:
    learner = TTTMLP(heads=2, head_dim=32, hidden=128)
    state = learner.init_state(batch=1)
    out, state = learner(q, k, v, lr, state)      # q, k, v [1, 2, T, 32], lr [1, 2, T]
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import mlx.core as mx
from mlx import nn

from moshi_ttt_mlx.errors import UserError

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Rules:
    """How an inner learner of a given shape learns. The defaults are ours; the rest loads old files.

    Args:
        mini_batch: `C`, tokens between two changes of the weights.
        causal: a token sees the rows up to its own. False (older PyTorch code): it also sees the
            later rows of the same call that fall in its mini-batch, so pieces no longer agree.
        tau: "learned" is `max(1/(t+1) + token_idx_t, 0)`; "mean" is `1/C` for every token.
        target: "plain" is `v - k`; "standardized" is `gamma * (v - k - mean)/(std + eps) + beta`.
        ln_eps: added to the variance in the inner layer norm.
        target_eps: added to the standard deviation of a standardized target.
        read_gain: how often a token's own step is applied to its output; 2 reproduces the double
            update of older code at depth >= 3. The state takes it once either way.
        forget: what the decay given with each token pulls the weights towards when they are folded:
            "init" the learned initial weights, "zero" nothing at all; None takes no decay.
        bound: the weights of a layer (with its bias) never get further from their initial values
            than `bound` root mean square per entry. Inside that ball nothing is changed by a bit.
    """

    mini_batch: int = 16
    causal: bool = True
    tau: Literal["learned", "mean"] = "learned"
    target: Literal["plain", "standardized"] = "plain"
    ln_eps: float = 1e-6
    target_eps: float = 1e-8
    read_gain: int = 1
    forget: Literal["init", "zero"] | None = None
    bound: float = 16.0


@dataclass(frozen=True)
class TTTState:
    """All that changes in one inner learner: one copy per batch row, owned by a session.

    The same tokens give the same state however they were cut into calls: rows past `position` are
    zero. Rows are kept at full length so that every step has the same shapes.

    Args:
        weights: `W{i} [B, H, n_in, n_out]`, `b{i} [B, H, 1, n_out]`, as of the last fold.
        rows: tokens of the unfinished mini-batch: `x{i} [B, H, C, n_in]` (`x1` is the key),
            `g{i} [B, H, C, n_out]`, `lr [B, H, C, 1]`, and `decay [B, H, C, 1]` where it forgets.
        step: `||update|| / ||weights||` of the last fold, `[B, H, layers]`.
        tokens: tokens learned from so far.
        updates: folds so far; always `tokens // C`.
    """

    weights: Arrays = field(default_factory=dict)
    rows: Arrays = field(default_factory=dict)
    step: mx.array | None = None
    tokens: int = 0
    updates: int = 0

    def arrays(self) -> Arrays:
        """The arrays of this state by flat name, ready for `mx.save_safetensors`."""
        named = {f"weights.{name}": value for name, value in self.weights.items()}
        named |= {f"rows.{name}": value for name, value in self.rows.items()}
        return named | {"step": self.step}

    def meta(self) -> dict[str, str]:
        """The counters of this state as string metadata."""
        return {"tokens": str(self.tokens), "updates": str(self.updates)}

    def load(self, arrays: Arrays, meta: dict[str, str]) -> "TTTState":
        """Return the state that `arrays()` and `meta()` described; `self` gives names and shapes.

        Raises:
            UserError: a tensor is missing, left over, or has another shape or dtype.
        """
        wanted = self.arrays()
        for name in sorted(wanted.keys() ^ arrays.keys()):
            here = "missing" if name in wanted else "not part of this memory"
            raise UserError(
                f"memory state: tensor {name!r} is {here}; use the adapter it was saved with"
            )
        for name, like in wanted.items():
            _check_like(name, arrays[name], like)
        weights, rows = (
            {name: arrays[f"{part}.{name}"] for name in getattr(self, part)}
            for part in ("weights", "rows")
        )
        return TTTState(weights, rows, arrays["step"], int(meta["tokens"]), int(meta["updates"]))


def _check_like(name: str, found: mx.array, like: mx.array) -> None:
    if found.shape != like.shape or found.dtype != like.dtype:
        raise UserError(
            f"memory state: tensor {name!r} should be {like.dtype} {like.shape}, found "
            f"{found.dtype} {found.shape}; use the adapter and batch size it was saved with"
        )


def finite(state: TTTState) -> mx.array:
    """Say which batch rows of a state hold only finite numbers: bool `[B]`, not read by the host."""
    flat = [mx.isfinite(a).reshape(a.shape[0], -1).all(axis=1) for a in state.arrays().values()]
    return mx.stack(flat).all(axis=0)


def _wide(x: mx.array) -> mx.array:
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def _swap(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


# tanh form of GELU: gelu(z) = z/2 (1 + tanh(A (z + B z^3))).
_GELU_A = math.sqrt(2 / math.pi)
_GELU_B = 0.044715


def _gelu(z: mx.array) -> mx.array:
    return 0.5 * z * (1 + mx.tanh(_GELU_A * (z + _GELU_B * z * z * z)))


def _gelu_and_slope(z: mx.array) -> tuple[mx.array, mx.array]:
    t = mx.tanh(_GELU_A * (z + _GELU_B * z * z * z))
    slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _GELU_A * (1 + 3 * _GELU_B * z * z)
    return 0.5 * z * (1 + t), slope


def _standardize(z: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Return `(z - mean) / s` and `s = sqrt(var + eps)` over the last axis."""
    s = mx.sqrt(mx.var(z, axis=-1, keepdims=True) + eps)
    return (z - mx.mean(z, axis=-1, keepdims=True)) / s, s


def _loss_gradient(
    z: mx.array, r: mx.array, gamma: mx.array, beta: mx.array, eps: float
) -> mx.array:
    """Gradient at `z` of `sum 1/2 ||LN(z; gamma, beta, eps) - r||^2`, in z's shape."""
    f = z.shape[-1]
    xh, s = _standardize(z, eps)
    gx = (gamma * xh + beta - r) * gamma
    along = xh * mx.sum(gx * xh, axis=-1, keepdims=True)
    return (f * gx - mx.sum(gx, axis=-1, keepdims=True) - along) / (f * s)


def _squares(w: mx.array, b: mx.array) -> mx.array:
    """Squared norm of one layer, `[B, H, 1, 1]`."""
    return mx.sum(w * w, axis=(-2, -1), keepdims=True) + mx.sum(b * b, axis=(-2, -1), keepdims=True)


def _into_ball(w: mx.array, b: mx.array, w0: mx.array, b0: mx.array, bound: float) -> tuple:
    """Pull a layer back to the ball around its initial values, or leave it bit for bit.

    The inner layer norm makes the loss blind to the scale of the last layer, so gradients shrink as
    weights grow and ordinary input stays far inside. What leaves the ball is input whose outputs have
    no variance (silence, a constant), where the norm divides by almost nothing.
    """
    dw, db = w - w0, b - b0
    squares = _squares(dw, db)
    limit = bound * bound * (w.shape[-2] + 1) * w.shape[-1]
    outside = squares > limit
    # The inner `where` keeps the gradient of the branch not taken finite.
    scale = math.sqrt(limit) * mx.rsqrt(mx.where(outside, squares, limit))
    return mx.where(outside, w0 + scale * dw, w), mx.where(outside, b0 + scale * db, b)


class InnerLearner(nn.Module):
    """A network of affine layers with GELU between, one per head, trained by the tokens it reads.

    Its loss on a token is `1/2 ||LN(net(k)) - (v - k)||^2`; it answers `q + LN(net(q))`. Parameters
    (learned by the outer loop, never changed while talking) are the initial weights `W{i} [H, n_in,
    n_out]` and `b{i} [H, 1, n_out]`, the layer norm's `gamma`, `beta` `[H, f]`, and `token_idx [C]`
    where `rules.tau` is "learned".

    Args:
        heads: `H`.
        sizes: widths from input to output, `(f, ..., f)`.
        rules: how it learns.

    Raises:
        ValueError: the sizes do not begin and end with one head width of at least 2.
    """

    def __init__(self, heads: int, sizes: Sequence[int], rules: Rules = Rules()):
        super().__init__()
        if len(sizes) < 2 or sizes[0] != sizes[-1] or sizes[0] < 2:
            raise ValueError(f"[InnerLearner] sizes must be (f, ..., f) with f >= 2, got {sizes}")
        self._sizes, self._rules = tuple(sizes), rules
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes), 1):
            self[f"W{i}"] = mx.random.normal((heads, n_in, n_out), scale=0.02)
            self[f"b{i}"] = mx.zeros((heads, 1, n_out))
        self.gamma = mx.ones((heads, sizes[0]))
        self.beta = mx.zeros((heads, sizes[0]))
        if rules.tau == "learned":
            self.token_idx = mx.zeros((rules.mini_batch,))

    @property
    def rules(self) -> Rules:
        return self._rules

    @property
    def depth(self) -> int:
        """Number of affine layers."""
        return len(self._sizes) - 1

    def init_state(self, batch: int) -> TTTState:
        """The state before the first token, a copy of the learned initial weights per batch row.

        In training call it inside the loss: the initial weights get their gradient through it.
        """
        weights = {n: mx.repeat(_wide(self[n])[None], batch, axis=0) for n in self._weight_names()}
        widths = {f"x{i}": n for i, n in enumerate(self._sizes[:-1], 1)}
        widths |= {f"g{i}": n for i, n in enumerate(self._sizes[1:], 1)}
        widths |= {"lr": 1, "decay": 1} if self.rules.forget else {"lr": 1}
        lead, dtype = (batch, self.gamma.shape[0]), weights["W1"].dtype
        c = self.rules.mini_batch
        rows = {n: mx.zeros((*lead, c, width), dtype=dtype) for n, width in widths.items()}
        return TTTState(weights, rows, mx.zeros((*lead, self.depth), dtype=dtype))

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        lr: mx.array,
        state: TTTState,
        decay: mx.array | None = None,
        update: bool = True,
    ) -> tuple[mx.array, TTTState]:
        """Answer `q` and learn from `(k, v)`, token by token.

        Frozen (`update=False`), every token reads the weights as they were for the last learned
        token (folded weights plus that token's share of the cached rows), and the state comes back
        as it was: `k`, `v`, `lr` and `decay` are not looked at.

        Args:
            q, k, v: `[B, H, T, f]`, any float dtype, any `T`.
            lr: learned rate of each token, `[B, H, T]`.
            state: from `init_state` or an earlier call; left unchanged.
            decay: what a token leaves of the weights, in [0, 1]; `[B, H, T]`, or `[H]` for all
                tokens alike. A fold keeps the product over its `C` tokens. Only with `rules.forget`.
            update: learn, or only read.

        Returns:
            The answers `[B, H, T, f]` in the state's dtype, and the state after the last token.

        Raises:
            ValueError: decay given and not used by the rules, or the reverse.
        """
        if not update:
            return self._read_frozen(_wide(q), state), state
        tokens = self._tokens(q, k, v, lr, decay)
        outs, done, total = [], 0, q.shape[2]
        while done < total:
            end = min(total, done + self.rules.mini_batch - state.tokens % self.rules.mini_batch)
            out, state = self._piece({n: a[:, :, done:end] for n, a in tokens.items()}, state)
            outs.append(out)
            done = end
        return (mx.concatenate(outs, axis=2) if len(outs) > 1 else outs[0]), state

    def norms(self, state: TTTState) -> Arrays:
        """The monitor: `step` and `drift`, relative norms `[B, H, layers]`, not read by the host.

        `step` is `||update||/||weights||` at the last fold, `drift` is `||weights - initial|| /
        ||initial||` now.
        """
        drift = []
        for w, b, w0, b0 in self._layers(state.weights):
            drift.append(mx.sqrt(_squares(w - w0, b - b0) / _squares(w0[None], b0[None])))
        return {"step": state.step, "drift": mx.concatenate(drift, axis=-1)[:, :, 0]}

    def _weight_names(self) -> list[str]:
        return [f"{kind}{i}" for i in range(1, self.depth + 1) for kind in "Wb"]

    def _layers(self, weights: Arrays) -> list[tuple[mx.array, ...]]:
        """Running and initial values of each layer: `(W, b, W0, b0)`."""
        names = [(f"W{i}", f"b{i}") for i in range(1, self.depth + 1)]
        return [tuple(map(_wide, (weights[w], weights[b], self[w], self[b]))) for w, b in names]

    def _tokens(self, q, k, v, lr, decay) -> Arrays:
        if (decay is None) != (self.rules.forget is None):
            raise ValueError(
                f"[InnerLearner] forget={self.rules.forget!r}, decay given: {decay is not None}"
            )
        tokens = {"q": _wide(q), "k": _wide(k), "v": _wide(v), "lr": _wide(lr)[..., None]}
        if decay is not None:
            decay = decay[:, None] if decay.ndim == 1 else decay
            tokens["decay"] = mx.broadcast_to(_wide(decay), lr.shape)[..., None]
        return tokens

    def _piece(self, tokens: Arrays, state: TTTState) -> tuple[mx.array, TTTState]:
        """Tokens that lie within one mini-batch: make their rows, answer, and fold if it is full."""
        start, size = state.tokens % self.rules.mini_batch, tokens["q"].shape[2]
        new = self._learn(tokens, state.weights)
        if size == self.rules.mini_batch:
            kept = rows = new
        else:
            at = mx.array([start])
            kept = {n: mx.slice_update(state.rows[n], new[n], at, axes=(2,)) for n in new}
            rows = {n: a[:, :, : start + size] for n, a in kept.items()}
        out = self._answer(tokens["q"], state.weights, rows, self._coefficients(rows["lr"], start))
        state = replace(state, tokens=state.tokens + size)
        full = state.tokens % self.rules.mini_batch == 0
        return out, self._fold(state, kept) if full else replace(state, rows=kept)

    def _learn(self, tokens: Arrays, weights: Arrays) -> Arrays:
        """The rows of tokens: what each layer saw, and the gradient of the loss at its output."""
        x, slope = tokens["k"], None
        rows = {n: tokens[n] for n in ("lr", "decay") if n in tokens}
        slopes = []
        for i in range(1, self.depth + 1):
            rows[f"x{i}"] = x
            z = x @ weights[f"W{i}"] + weights[f"b{i}"]
            if i < self.depth:
                x, slope = _gelu_and_slope(z)
                slopes.append(slope)
        gamma, beta = self._norm()
        g = _loss_gradient(z, self._target(tokens), gamma, beta, self.rules.ln_eps)
        rows[f"g{self.depth}"] = g
        for i in range(self.depth - 1, 0, -1):
            g = (g @ _swap(weights[f"W{i + 1}"])) * slopes[i - 1]
            rows[f"g{i}"] = g
        return rows

    def _target(self, tokens: Arrays) -> mx.array:
        r = tokens["v"] - tokens["k"]
        if self.rules.target == "plain":
            return r
        gamma, beta = self._norm()
        std = mx.sqrt(mx.var(r, axis=-1, keepdims=True, ddof=1)) + self.rules.target_eps
        return gamma * (r - mx.mean(r, axis=-1, keepdims=True)) / std + beta

    def _norm(self) -> tuple[mx.array, mx.array]:
        return _wide(self.gamma)[:, None], _wide(self.beta)[:, None]

    def _tau(self) -> mx.array:
        """The share of its mini-batch's gradient that token `t` is answered with, `[C]`."""
        c = self.rules.mini_batch
        if self.rules.tau == "mean":
            return mx.full((c,), 1 / c, dtype=_wide(self.gamma).dtype)
        token_idx = _wide(self.token_idx)
        return mx.maximum(1 / mx.arange(1, c + 1).astype(token_idx.dtype) + token_idx, 0)

    def _coefficients(self, lr: mx.array, start: int) -> mx.array:
        """`tau_t lr_k` for the tokens from `start` on and all rows: `[B, H, tokens, rows]`."""
        rows = lr.shape[2]
        tau = self.rules.read_gain * self._tau()[start:rows, None]
        if self.rules.causal:
            tau = tau * mx.tri(rows - start, rows, k=start, dtype=tau.dtype)
        return tau * _swap(lr)

    def _answer(
        self, q: mx.array, weights: Arrays, rows: Arrays, coefficients: mx.array
    ) -> mx.array:
        """Run `q` through the weights with the rows' pending update applied to every layer."""
        x = q
        for i in range(1, self.depth + 1):
            pending = (coefficients * (1 + x @ _swap(rows[f"x{i}"]))) @ rows[f"g{i}"]
            z = x @ weights[f"W{i}"] + weights[f"b{i}"] - pending
            x = _gelu(z) if i < self.depth else z
        gamma, beta = self._norm()
        return q + gamma * _standardize(x, self.rules.ln_eps)[0] + beta

    def _read_frozen(self, q: mx.array, state: TTTState) -> mx.array:
        count = state.tokens % self.rules.mini_batch
        rows = {n: a[:, :, :count] for n, a in state.rows.items()}
        tau = self._tau()[max(count - 1, 0)] * self.rules.read_gain
        return self._answer(q, state.weights, rows, tau * _swap(rows["lr"]))

    def _fold(self, state: TTTState, rows: Arrays) -> TTTState:
        """Write the rows of a full mini-batch into the weights and clear them."""
        eta = self._tau()[-1] * rows["lr"]
        keep = mx.prod(rows["decay"], axis=2, keepdims=True) if self.rules.forget else None
        weights, steps = {}, []
        for i, (w, b, w0, b0) in enumerate(self._layers(state.weights), 1):
            dw = _swap(eta * rows[f"x{i}"]) @ rows[f"g{i}"]
            db = mx.sum(eta * rows[f"g{i}"], axis=2, keepdims=True)
            steps.append(mx.sqrt(_squares(dw, db) / _squares(w, b)))
            w, b = self._forget(w, w0, keep) - dw, self._forget(b, b0, keep) - db
            weights[f"W{i}"], weights[f"b{i}"] = _into_ball(w, b, w0, b0, self.rules.bound)
        step = mx.concatenate(steps, axis=-1)[:, :, 0]
        cleared = {n: mx.zeros_like(a) for n, a in state.rows.items()}
        return replace(state, weights=weights, rows=cleared, step=step, updates=state.updates + 1)

    def _forget(self, w: mx.array, w0: mx.array, keep: mx.array | None) -> mx.array:
        if keep is None:
            return w
        return keep * w if self.rules.forget == "zero" else w0 + keep * (w - w0)


class TTTLinear(InnerLearner):
    """The inner learner with one affine layer, `W1 [H, f, f]`."""

    def __init__(self, heads: int, head_dim: int, rules: Rules = Rules()):
        super().__init__(heads, (head_dim, head_dim), rules)


class TTTMLP(InnerLearner):
    """The inner learner with two affine layers, `W1 [H, f, F]`, `W2 [H, F, f]`."""

    def __init__(self, heads: int, head_dim: int, hidden: int, rules: Rules = Rules()):
        super().__init__(heads, (head_dim, hidden, head_dim), rules)
