"""Inner learners: a small network per head whose weights are the memory and learn while it talks.

What lives here: the inner network, its gradients written out, its state, and one rule that takes
any number of tokens at any offset. What does not: where q, k, v and the learned rate come from
(`memory.py`), and a fused kernel of the step (`ttt_kernels.py`).

The maths is TTT-Linear and TTT-MLP of Sun et al. 2024 (arXiv 2407.04620). With rows `k <= t` of the
running mini-batch (their layer inputs `x`, gradients `g` and rates `lr`), layer `i` of token `t` is

    z = x W_i + b_i - tau_t * sum_k lr_k (1 + x . x_k) g_k

so the weights themselves change once every `C` tokens, when the rows are folded into them. One
token at a time and many at once are the same function, cut differently: nothing is ever padded.
Where a call holds whole mini-batches, only what must wait for a fold is done one after the other:
the keys. The queries of many mini-batches are answered at once, each by the weights of its own.

The layer norm makes the loss blind to the scale of the last layer, so gradients shrink as weights
grow and ordinary input stays in bounds by itself. Input without variance (silence, a constant) is
divided by almost nothing: one fold can then outgrow all that was learned, and weights that large
hardly learn again. Hence two limits, both exact no-ops inside: `max_step` on what one fold may do,
`bound` on how far the weights may ever get.

Everything is computed and kept in float32, whatever the model's dtype (float64 stays float64).

Example:
    learner = TTTMLP(heads=2, head_dim=32, hidden=128)
    state = learner.init_state(batch=1)
    out, state = learner(q, k, v, lr, state)      # q, k, v [1, 2, T, 32], lr [1, 2, T]
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
from mlx import nn

from moshi_ttt_mlx import ttt_kernels
from moshi_ttt_mlx.errors import UserError

Arrays = dict[str, mx.array]
# Of one layer with its bias: |w|^2, |w - w0|^2 and |w0|^2, [B, H, 1, 1] each.
Norms = tuple[mx.array, mx.array, mx.array]

# Mini-batches between two sums of the weights' squares; float32 loses some 1e-7 of them at a fold.
_RUN = 32
# What the weights of mini-batches whose queries are answered at once may take together.
_STACK_BYTES = 16 << 20
# Tokens from which on a call is worth compiling: on CPU that takes seconds, once per machine.
_LONG_CALL = 256


@dataclass(frozen=True)
class Rules:
    """How an inner learner of a given shape learns.

    The defaults are the language model of the paper, with limits; the other values make older
    PyTorch checkpoints compute what they were trained to.

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
        max_step: one fold moves a layer (with its bias) by at most `max_step` times its norm, its
            running norm or its initial one, whichever is larger; `math.inf` for older checkpoints.
        bound: a layer (with its bias) never gets further from its initial values than `bound` root
            mean square per entry; `math.inf` for older checkpoints.
    """

    mini_batch: int = 16
    causal: bool = True
    tau: Literal["learned", "mean"] = "learned"
    target: Literal["plain", "standardized"] = "plain"
    ln_eps: float = 1e-6
    target_eps: float = 1e-8
    read_gain: int = 1
    forget: Literal["init", "zero"] | None = None
    max_step: float = 1.0
    bound: float = 16.0


@dataclass(frozen=True)
class TTTState:
    """All that changes in one inner learner: one copy per batch row, owned by a session.

    The same tokens give the same state however they were cut into calls: rows not yet filled are
    zero. Rows are kept at full length so that every step has the same shapes.

    Args:
        weights: `W{i} [B, H, n_in, n_out]`, `b{i} [B, H, 1, n_out]`, as of the last fold.
        rows: tokens of the unfinished mini-batch: `x{i} [B, H, C, n_in]` (`x1` is the key),
            `g{i} [B, H, C, n_out]`, `lr [B, H, C, 1]`, and `decay [B, H, C, 1]` where it forgets.
        step: `||update|| / ||weights||` of the last fold, `[B, H, layers]`.
        tokens: tokens learned from so far.
        updates: folds so far; always `tokens // C`.
    """

    weights: Arrays
    rows: Arrays
    step: mx.array
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
        if strays := sorted(wanted.keys() ^ arrays.keys()):
            what = "missing" if strays[0] in wanted else "not part of this memory"
            raise UserError(
                f"memory state: tensor {strays[0]!r} is {what}; use the adapter it was saved with"
            )
        for name, like in wanted.items():
            _check_like(name, arrays[name], like)
        counters = {name: int(meta[name]) for name in ("tokens", "updates")}
        return replace(self.with_arrays(arrays), **counters)

    def with_arrays(self, arrays: Arrays) -> "TTTState":
        """This state on other arrays, named as by `arrays()`; unchecked, for every frame."""
        return replace(
            self,
            weights={name: arrays[f"weights.{name}"] for name in self.weights},
            rows={name: arrays[f"rows.{name}"] for name in self.rows},
            step=arrays["step"],
        )


def _check_like(name: str, found: mx.array, like: mx.array) -> None:
    if found.shape != like.shape or found.dtype != like.dtype:
        raise UserError(
            f"memory state: tensor {name!r} should be {like.dtype} {like.shape}, found "
            f"{found.dtype} {found.shape}; use the adapter and batch size it was saved with"
        )


def wide(x: mx.array) -> mx.array:
    """To float32; float64 stays."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def _swap(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


# tanh form of GELU: gelu(z) = z/2 (1 + tanh(A (z + B z^3))).
_GELU_A = math.sqrt(2 / math.pi)
_GELU_B = 0.044715


def _gelu(z: mx.array) -> mx.array:
    return 0.5 * z * (1 + mx.tanh(_GELU_A * (z + _GELU_B * z * z * z)))


def _gelu_and_slope(z: mx.array) -> tuple[mx.array, mx.array]:
    bend = _GELU_B * z * z
    t = mx.tanh(_GELU_A * (z + bend * z))
    slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _GELU_A * (1 + 3 * bend)
    return 0.5 * z * (1 + t), slope


def _standardize(z: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Return `(z - mean) / s` and `s = sqrt(var + eps)` over the last axis."""
    away = z - mx.mean(z, axis=-1, keepdims=True)
    s = mx.sqrt(mx.mean(away * away, axis=-1, keepdims=True) + eps)
    return away / s, s


def _loss_gradient(
    z: mx.array, r: mx.array, gamma: mx.array, beta: mx.array, eps: float
) -> mx.array:
    """Gradient at `z` of `sum 1/2 ||LN(z; gamma, beta, eps) - r||^2`, in z's shape."""
    f = z.shape[-1]
    xh, s = _standardize(z, eps)
    gx = (gamma * xh + beta - r) * gamma
    along = xh * mx.sum(gx * xh, axis=-1, keepdims=True)
    return (f * gx - mx.sum(gx, axis=-1, keepdims=True) - along) / (f * s)


def _total(x: mx.array) -> mx.array:
    return mx.sum(x, axis=(-2, -1), keepdims=True)


def _squares(w: mx.array, b: mx.array) -> mx.array:
    """Squared norm of one layer, `[B, H, 1, 1]`."""
    return _total(w * w) + _total(b * b)


def _shrink(squares: mx.array, share: float, of: mx.array | int) -> mx.array | int:
    """The factor that brings a squared norm down to `share^2` of another; exactly 1 if within."""
    if math.isinf(share):
        return 1  # infinity times a gradient of zero is no number
    limit = share * share * of
    over = squares > limit
    # The branch not taken is a ratio of ones, so that its gradient is finite too.
    return mx.sqrt(mx.where(over, limit, 1) / mx.where(over, squares, 1))


def _layer(weights: Arrays, i: int) -> tuple[mx.array, mx.array]:
    return weights[f"W{i}"], weights[f"b{i}"]


def _norms(params: Arrays, weights: Arrays) -> list[Norms]:
    made = []
    for i in range(1, _depth(weights) + 1):
        (w, b), (w0, b0) = _layer(weights, i), _layer(params, i)
        made.append((_squares(w, b), _squares(w - w0, b - b0), _squares(w0, b0)))
    return made


def _depth(weights: Arrays) -> int:
    return len(weights) // 2


def _target(rules: Rules, params: Arrays, k: mx.array, v: mx.array) -> mx.array:
    r = v - k
    if rules.target == "plain":
        return r
    std = mx.sqrt(mx.var(r, axis=-1, keepdims=True, ddof=1)) + rules.target_eps
    return params["gamma"] * (r - mx.mean(r, axis=-1, keepdims=True)) / std + params["beta"]


def _learn(
    rules: Rules, params: Arrays, weights: Arrays, k: mx.array, r: mx.array
) -> tuple[Arrays, Arrays]:
    """The rows of keys with the target `r`: what each layer saw, and the gradient of the loss at its
    output; beside them these outputs, `z{i}`."""
    depth, x, rows, outputs, slopes = _depth(weights), k, {}, {}, {}
    for i in range(1, depth + 1):
        rows[f"x{i}"] = x
        z = outputs[f"z{i}"] = x @ weights[f"W{i}"] + weights[f"b{i}"]
        if i < depth:
            x, slopes[i] = _gelu_and_slope(z)
    g = rows[f"g{depth}"] = _loss_gradient(z, r, params["gamma"], params["beta"], rules.ln_eps)
    for i in range(depth - 1, 0, -1):
        g = rows[f"g{i}"] = (g @ _swap(weights[f"W{i + 1}"])) * slopes[i]
    return rows, outputs


def _tau(rules: Rules, params: Arrays) -> mx.array:
    """The share of its mini-batch's gradient that token `t` is answered with, `[C]`."""
    c, dtype = rules.mini_batch, params["gamma"].dtype
    if rules.tau == "mean":
        return mx.full((c,), 1 / c, dtype=dtype)
    return mx.maximum(1 / mx.arange(1, c + 1).astype(dtype) + params["token_idx"], 0)


def _coefficients(
    rules: Rules, params: Arrays, lr: mx.array, start: int | mx.array, size: int
) -> mx.array:
    """`tau_t lr_k` of `size` tokens from `start` on with every row: `[B, H, size, C]`."""
    t = (start + mx.arange(size))[:, None]
    tau = rules.read_gain * _tau(rules, params)[t]
    if rules.causal:
        tau = mx.where(mx.arange(rules.mini_batch) <= t, tau, 0)
    return tau * _swap(lr)


def _answer(
    rules: Rules, params: Arrays, weights: Arrays, rows: Arrays, q: mx.array, coefficients: mx.array
) -> mx.array:
    """Run `q` through the weights with the rows' pending update applied to every layer."""
    depth, x = _depth(weights), q
    for i in range(1, depth + 1):
        pending = (coefficients * (1 + x @ _swap(rows[f"x{i}"]))) @ rows[f"g{i}"]
        z = x @ weights[f"W{i}"] + weights[f"b{i}"] - pending
        x = _gelu(z) if i < depth else z
    return q + params["gamma"] * _standardize(x, rules.ln_eps)[0] + params["beta"]


def _piece(
    rules: Rules,
    params: Arrays,
    weights: Arrays,
    rows: Arrays,
    tokens: Arrays,
    start: int | mx.array,
) -> tuple[mx.array, Arrays]:
    """Answer tokens that lie within one mini-batch, from place `start` on, and add their rows."""
    size, at = tokens["q"].shape[2], mx.array(start).reshape(1)
    r = _target(rules, params, tokens["k"], tokens["v"])
    new = _learn(rules, params, weights, tokens["k"], r)[0]
    new |= {name: tokens[name] for name in ("lr", "decay") if name in tokens}
    rows = {name: mx.slice_update(rows[name], new[name], at, axes=(2,)) for name in new}
    coefficients = _coefficients(rules, params, rows["lr"], start, size)
    return _answer(rules, params, weights, rows, tokens["q"], coefficients), rows


def _read(
    rules: Rules, params: Arrays, weights: Arrays, rows: Arrays, q: mx.array, position: int
) -> mx.array:
    """Answer `q` as the last learned token would be answered: nothing is added."""
    tau = rules.read_gain * _tau(rules, params)[max(position - 1, 0)]
    return _answer(rules, params, weights, rows, q, tau * _swap(rows["lr"]))


def _forget(rules: Rules, w: mx.array, w0: mx.array, keep: mx.array | None) -> mx.array:
    if keep is None:
        return w
    return keep * w if rules.forget == "zero" else w0 + keep * (w - w0)


def _forget_norms(rules: Rules, norms: Norms, w_dw, away_dw, keep: mx.array | None) -> tuple:
    """What `_forget` makes of a layer's norms and of its products with an update."""
    if keep is None:
        return norms, w_dw, away_dw
    now, away, start = norms
    # Of w0 with w - w0 and with the update.
    origin, start_dw = (now - start - away) / 2, w_dw - away_dw
    away = keep * keep * away
    if rules.forget == "init":
        now = start + 2 * keep * origin + away
        return (now, away, start), start_dw + keep * away_dw, keep * away_dw
    # keep * w - w0 is keep * (w - w0) with (1 - keep) * w0 taken off.
    lost = 1 - keep
    away = away - 2 * keep * lost * origin + lost * lost * start
    return (keep * keep * now, away, start), keep * w_dw, keep * away_dw - lost * start_dw


def _beside(params: Arrays, rows: Arrays, layers: Sequence[int]) -> Arrays:
    """What a fold needs to know of a layer's rows that no weights of now have a part in.

    `first{i}`: what the initial weights make of each input. `near{i}`: `1 + x . x'` of each two.
    """
    made = {}
    for i in layers:
        x = rows[f"x{i}"]
        made[f"first{i}"] = x @ params[f"W{i}"] + params[f"b{i}"]
        made[f"near{i}"] = 1 + x @ _swap(x)
    return made


def _fold_layer(
    rules: Rules, layers: tuple, x: mx.array, g: mx.array, known: tuple, norms: Norms, keep
) -> tuple[tuple, Norms, tuple]:
    """Move one layer by `-x^T g`, within the limits.

    Both limits ask for norms of what is still to be made. They follow from the norms before and
    three products of the update, and these from the rows: `w . dw` is the sum of `(x w + b) . g`.
    So `w` is read once for its update and not for its limits, which change no bit inside.

    Args:
        layers: `(w, b)` of now and `(w0, b0)`.
        known: `z`, `first`, `near` of the rows, see `_learn` and `_beside`.
        keep: the decay of the whole mini-batch, `[B, H, 1, 1]`, or None.

    Returns:
        `(w, b)`, its norms, and the step as three arrays for `_relative`.
    """
    (w, b), (w0, b0) = layers
    z, first, near = known
    update, w_dw, away_dw = _total(near * (g @ _swap(g))), _total(z * g), _total((z - first) * g)
    most = mx.maximum(norms[0], norms[2])
    scale = _shrink(update, rules.max_step, most)
    (now, away, start), w_dw, away_dw = _forget_norms(rules, norms, w_dw, away_dw, keep)
    moved = scale * scale * update
    now = now - 2 * scale * w_dw + moved
    away = away - 2 * scale * away_dw + moved
    back = 1 - _shrink(away, rules.bound, (w.shape[-2] + 1) * w.shape[-1])
    made = []
    for old, initial, change in ((w, w0, _swap(x) @ g), (b, b0, mx.sum(g, axis=2, keepdims=True))):
        new = _forget(rules, old, initial, keep) - scale * change
        made.append(new - back * (new - initial))
    # w' = w - back (w - w0), and 2 w . (w - w0) = |w|^2 + |w - w0|^2 - |w0|^2.
    norms = (
        now - back * (now + away - start - back * away),
        (1 - back) * (1 - back) * away,
        start,
    )
    return tuple(made), norms, (scale, update, most)


def _relative(steps: list[tuple]) -> mx.array:
    """`||update|| / ||weights||` of each layer, `[B, H, layers]`."""
    # The sum of products may round to less than nothing.
    sizes = [scale * mx.sqrt(mx.maximum(update, 0) / most) for scale, update, most in steps]
    return mx.concatenate(sizes, axis=-1)[:, :, 0]


def _fold_layers(
    rules: Rules, params: Arrays, weights: Arrays, rows: Arrays, known: Arrays, norms: list[Norms]
) -> tuple[Arrays, list[Norms], list[tuple]]:
    """`_fold` where something is known already: the norms, and `z`, `first`, `near`, `eta`."""
    keep = mx.prod(rows["decay"], axis=2, keepdims=True) if rules.forget else None
    folded, after, steps = {}, [], []
    for i, before in enumerate(norms, 1):
        layers = _layer(weights, i), _layer(params, i)
        mine = tuple(known[f"{name}{i}"] for name in ("z", "first", "near"))
        g = known["eta"] * rows[f"g{i}"]
        made, left, step = _fold_layer(rules, layers, rows[f"x{i}"], g, mine, before, keep)
        folded[f"W{i}"], folded[f"b{i}"] = made
        after.append(left)
        steps.append(step)
    return folded, after, steps


def _fold(rules: Rules, params: Arrays, weights: Arrays, rows: Arrays) -> tuple[Arrays, mx.array]:
    """Write a full mini-batch of rows into the weights; also return each layer's relative step."""
    layers = range(1, _depth(weights) + 1)
    known = {f"z{i}": rows[f"x{i}"] @ weights[f"W{i}"] + weights[f"b{i}"] for i in layers}
    known |= _beside(params, rows, layers) | {"eta": _tau(rules, params)[-1] * rows["lr"]}
    norms = _norms(params, weights)
    folded, _, steps = _fold_layers(rules, params, weights, rows, known, norms)
    return folded, _relative(steps)


# -- whole mini-batches ---------------------------------------------------------------------------


def _apart(a: mx.array, count: int) -> mx.array:
    """`[B, H, N * n, m]` -> `[B, H, N, n, m]`."""
    return a.reshape(*a.shape[:2], count, -1, a.shape[-1])


def _each(a: mx.array, count: int) -> list[mx.array]:
    """`[B, H, N, n, m]` -> `N` of `[B, H, n, m]`."""
    return mx.split(a.reshape(*a.shape[:2], -1, a.shape[-1]), count, axis=2)


def _stack(parts: list[mx.array]) -> mx.array:
    """The way back from `_each`."""
    return _apart(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2), len(parts))


def _mini_batch(
    rules: Rules, params: Arrays, weights: Arrays, norms: list[Norms], tokens: Arrays
) -> tuple[Arrays, Arrays, list[Norms], list[tuple]]:
    """Learn one mini-batch from its first key to its fold; its queries are left for `_answer_each`."""
    new, outputs = _learn(rules, params, weights, tokens["x1"], tokens["r"])
    known = tokens | outputs | _beside(params, new, range(2, len(norms) + 1))
    folded = _fold_layers(rules, params, weights, tokens | new, known, norms)
    del new["x1"]
    return new, *folded


def _beside_mini_batches(params: Arrays) -> Arrays:
    """Parameters shaped to broadcast over `[B, H, N, C, .]`."""
    return {name: a[:, None] if a.ndim > 1 else a for name, a in params.items()}


def _feed(rules: Rules, params: Arrays, tokens: Arrays, count: int) -> list[Arrays]:
    """For each mini-batch what `_mini_batch` takes; what the weights have no part in is made here."""
    fed = _beside(params, {"x1": tokens["k"]}, [1]) | {"x1": tokens["k"]}
    fed["r"] = _target(rules, params, tokens["k"], tokens["v"])
    fed["eta"] = _tau(rules, params)[-1] * tokens["lr"]
    if rules.forget:
        fed["decay"] = tokens["decay"]
    parts = {name: _each(a, count) for name, a in fed.items()}
    return [{name: each[i] for name, each in parts.items()} for i in range(count)]


def _answer_each(
    rules: Rules, params: Arrays, tokens: Arrays, weights: list[Arrays], rows: list[Arrays]
) -> mx.array:
    """The queries `[B, H, N, C, f]` of mini-batches, each by the weights and rows of its own."""
    weights, rows = ({name: _stack([g[name] for g in x]) for name in x[0]} for x in (weights, rows))
    rows["x1"] = tokens["k"]
    coefficients = _coefficients(rules, params, tokens["lr"], 0, rules.mini_batch)
    return _answer(rules, params, weights, rows, tokens["q"], coefficients)


def _whole(
    rules: Rules, params: Arrays, weights: Arrays, tokens: Arrays, learn: Callable
) -> tuple[mx.array, Arrays, mx.array]:
    """Answer and learn `N` mini-batches: `q`, `k`, `v`, `lr`, `decay` are `[B, H, N * C, .]`.

    Args:
        learn: `_mini_batch` of these rules, compiled or not.

    Returns:
        The answers `[B, H, N * C, f]`, the weights and the relative step after the last fold.
    """
    shape, count = tokens["q"].shape, tokens["q"].shape[2] // rules.mini_batch
    tokens = {name: _apart(a, count) for name, a in tokens.items()}
    beside = _beside_mini_batches(params)
    fed, norms = _feed(rules, beside, tokens, count), _norms(params, weights)
    at_once = max(1, _STACK_BYTES // sum(a.nbytes for a in weights.values()))
    outs = []
    for first in range(0, count, at_once):
        used, rows = [], []
        for part in fed[first : first + at_once]:
            used.append(weights)
            new, weights, norms, steps = learn(params, weights, norms, part)
            rows.append(new)
        asked = {name: tokens[name][:, :, first : first + at_once] for name in ("q", "k", "lr")}
        outs.append(_answer_each(rules, beside, asked, used, rows))
    return mx.concatenate(outs, axis=2).reshape(shape), weights, _relative(steps)


@functools.lru_cache
def _compiled_piece(rules: Rules, depth: int) -> Callable:
    """`_piece` as one graph: on CPU up to 3 times faster for small heads, no slower for large ones.

    The fold is left as it is: compiled, it was slower on CPU at the 7B shape. Parameters are
    arguments too, so training never meets a stale constant. The depth is part of the key because
    mlx 0.26 remembers a single output structure per compiled function and crashes on a second.
    """
    return mx.compile(functools.partial(_piece, rules))


@functools.lru_cache
def _compiled_mini_batch(rules: Rules, depth: int) -> Callable:
    """`_mini_batch` as one graph; see `_compiled_piece`."""
    return mx.compile(functools.partial(_mini_batch, rules))


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
        """How it learns."""
        return self._rules

    @property
    def depth(self) -> int:
        """Number of affine layers."""
        return len(self._sizes) - 1

    def init_state(self, batch: int) -> TTTState:
        """The state before the first token, a copy of the learned initial weights per batch row.

        In training call it inside the loss: the initial weights get their gradient through it.
        """
        widths = {f"x{i}": n for i, n in enumerate(self._sizes[:-1], 1)}
        widths |= {f"g{i}": n for i, n in enumerate(self._sizes[1:], 1)}
        widths |= {"lr": 1, "decay": 1} if self.rules.forget else {"lr": 1}
        lead, dtype = (batch, self.gamma.shape[0]), wide(self.gamma).dtype
        c = self.rules.mini_batch
        rows = {n: mx.zeros((*lead, c, width), dtype=dtype) for n, width in widths.items()}
        names = [f"{kind}{i}" for i in range(1, self.depth + 1) for kind in "Wb"]
        weights = {n: mx.repeat(wide(self[n])[None], batch, axis=0) for n in names}
        return TTTState(weights, rows, mx.zeros((*lead, self.depth), dtype=dtype))

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        lr: mx.array,
        state: TTTState,
        decay: mx.array | None = None,
    ) -> tuple[mx.array, TTTState]:
        """Answer `q` and learn from `(k, v)`, token by token; `read` answers without learning.

        Args:
            q, k, v: `[B, H, T, f]`, any float dtype, any `T >= 1`.
            lr: learned rate of each token, `[B, H, T]`.
            state: from `init_state` or an earlier call; left unchanged.
            decay: what a token leaves of the weights, in [0, 1]; `[B, H, T]`, or `[H]` for all
                tokens alike. A fold keeps the product over its `C` tokens. Needs `rules.forget`.

        Returns:
            The answers `[B, H, T, f]` in the state's dtype, and the state after the last token.

        Raises:
            ValueError: decay given and not used by the rules, or the reverse.
        """
        params = self._params()
        tokens = self._tokens(q, k, v, lr, decay)
        outs, done, total = [], 0, q.shape[2]
        while done < total:
            end = done + self._next(state, total - done)
            part = {n: a[:, :, done:end] for n, a in tokens.items()}
            whole = (end - done) % self.rules.mini_batch == 0 and total > 1
            take = self._take_whole if whole else self._advance
            out, state = take(params, part, state)
            outs.append(out)
            done = end
        return mx.concatenate(outs, axis=2), state

    def _next(self, state: TTTState, tokens: int) -> int:
        """How many of the tokens to take at once: to the next fold, or whole mini-batches."""
        c = self.rules.mini_batch
        if state.tokens % c or tokens < c:
            return min(tokens, c - state.tokens % c)
        return c * min(tokens // c, _RUN)

    def read(self, q: mx.array, state: TTTState) -> mx.array:
        """Answer `q [B, H, n, f]` and learn nothing.

        Every token reads the weights as they were for the last learned token: the folded weights and
        that token's share of the cached rows.
        """
        place = state.tokens % self.rules.mini_batch
        return _read(self.rules, self._params(), state.weights, state.rows, wide(q), place)

    def trace(
        self, q, k, v, lr, state: TTTState, place: mx.array, decay=None
    ) -> tuple[mx.array, TTTState]:
        """One token (`T = 1`) at an array place of its mini-batch, for use inside `mx.compile`.

        Counters stay as they are and nothing is folded: call `advance` on the state afterwards.
        The two are for talking and have no gradient on a Mac, where they may be Metal kernels.
        """
        tokens = self._tokens(q, k, v, lr, decay)
        known = self._params(), state.weights, state.rows
        out, rows = ttt_kernels.step(_piece, self.rules, *known, tokens, place)
        return out, replace(state, rows=rows)

    def advance(self, state: TTTState) -> TTTState:
        """Count the token that `trace` added, and fold its mini-batch if that is full."""
        state = replace(state, tokens=state.tokens + 1)
        if state.tokens % self.rules.mini_batch:
            return state
        return self._folded(self._params(), state, functools.partial(ttt_kernels.fold, _fold))

    def norms(self, state: TTTState) -> Arrays:
        """The monitor: `step` and `drift`, relative norms `[B, H, layers]`, not read by the host.

        `step` is `||update|| / ||weights||` at the last fold, against the running or the initial
        weights, whichever are larger; `drift` is `||weights - initial|| / ||initial||` now.
        """
        params, drift = self._params(), []
        for i in range(1, self.depth + 1):
            w, b, w0, b0 = (g[f"{kind}{i}"] for g in (state.weights, params) for kind in "Wb")
            drift.append(mx.sqrt(_squares(w - w0, b - b0) / _squares(w0, b0)))
        return {"step": state.step, "drift": mx.concatenate(drift, axis=-1)[:, :, 0]}

    def _params(self) -> Arrays:
        """The parameters in the state's dtype, shaped to broadcast over batch rows and tokens."""
        params = {name: wide(value) for name, value in self.parameters().items()}
        return params | {name: params[name][:, None] for name in ("gamma", "beta")}

    def _tokens(self, q, k, v, lr, decay) -> Arrays:
        if (decay is None) != (self.rules.forget is None):
            given = "none" if decay is None else "one"
            raise ValueError(f"[InnerLearner] forget={self.rules.forget!r}, decay given: {given}")
        tokens = {"q": wide(q), "k": wide(k), "v": wide(v), "lr": wide(lr)[..., None]}
        if decay is not None:
            decay = decay[:, None] if decay.ndim == 1 else decay
            tokens["decay"] = mx.broadcast_to(wide(decay), lr.shape)[..., None]
        return tokens

    def _advance(
        self, params: Arrays, tokens: Arrays, state: TTTState
    ) -> tuple[mx.array, TTTState]:
        """Take tokens that lie within one mini-batch, and fold it if it is full."""
        start, size = state.tokens % self.rules.mini_batch, tokens["q"].shape[2]
        if size == 1:
            # The place is an array: one graph serves all of the mini-batch.
            piece, place = _compiled_piece(self.rules, self.depth), mx.array(start)
        else:
            piece, place = functools.partial(_piece, self.rules), start
        out, rows = piece(params, state.weights, state.rows, tokens, place)
        state = replace(state, rows=rows, tokens=state.tokens + size)
        return out, self._folded(params, state) if start + size == self.rules.mini_batch else state

    def _take_whole(
        self, params: Arrays, tokens: Arrays, state: TTTState
    ) -> tuple[mx.array, TTTState]:
        """Take whole mini-batches."""
        size = tokens["q"].shape[2]
        count = size // self.rules.mini_batch
        learn = functools.partial(_mini_batch, self.rules)
        if size >= _LONG_CALL:
            learn = _compiled_mini_batch(self.rules, self.depth)
        out, weights, step = _whole(self.rules, params, state.weights, tokens, learn)
        state = replace(
            state, tokens=state.tokens + size, updates=state.updates + count, weights=weights
        )
        return out, replace(state, step=step)

    def _folded(self, params: Arrays, state: TTTState, fold: Callable = _fold) -> TTTState:
        weights, step = fold(self.rules, params, state.weights, state.rows)
        rows = {name: mx.zeros_like(a) for name, a in state.rows.items()}
        return replace(state, weights=weights, rows=rows, step=step, updates=state.updates + 1)


class TTTLinear(InnerLearner):
    """The inner learner with one affine layer, `W1 [H, f, f]`."""

    def __init__(self, heads: int, head_dim: int, rules: Rules = Rules()):
        super().__init__(heads, (head_dim, head_dim), rules)


class TTTMLP(InnerLearner):
    """The inner learner with two affine layers, `W1 [H, f, F]`, `W2 [H, F, f]`."""

    def __init__(self, heads: int, head_dim: int, hidden: int, rules: Rules = Rules()):
        super().__init__(heads, (head_dim, hidden, head_dim), rules)
