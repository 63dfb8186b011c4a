"""Inner learners against a reference written from the equations, against autodiff, and for life.

Arithmetic is checked in float64, where equal functions differ by rounding only: at most 6e-14 was
seen, 1e-12 leaves room for other BLAS libraries, and a mistake in a formula is far larger. Each
bug of the project's list has a check here, and a planted version of it that this check must refuse.
"""

import itertools
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn

from moshi_ttt_mlx import ttt
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.ttt import TTTMLP, InnerLearner, Rules, TTTLinear, TTTState, _learn

mx.set_default_device(mx.cpu)

EXACT = 1e-12
# mlx 0.26 rounds Python scalars to float32, even beside float64 arrays; the reference follows it.
SCALARS = np.float32 if np.array(mx.array(0.1, dtype=mx.float64)) != 0.1 else np.float64
KINDS = ("linear", "mlp", "deep")


def finite(state):
    """Which batch rows of a state are finite throughout."""
    flat = [mx.isfinite(a).reshape(a.shape[0], -1).all(axis=1) for a in state.arrays().values()]
    return mx.stack(flat).all(axis=0)


def make(kind, heads=2, f=6, seed=0, dtype=mx.float64, **rules):
    """A learner with weights of ordinary size in every parameter, none at a special value."""
    rules = Rules(**rules)
    learner = {
        "linear": lambda: TTTLinear(heads, f, rules),
        "mlp": lambda: TTTMLP(heads, f, 9, rules),
        "deep": lambda: InnerLearner(heads, (f, 7, 5, f), rules),
    }[kind]()
    rng = np.random.default_rng(seed)
    size = {"W": 0.4, "b": 0.1, "g": 0.2, "t": 0.03}
    for name, value in learner.parameters().items():
        drawn = size[name[0]] * rng.standard_normal(value.shape) + (name == "gamma")
        learner[name] = mx.array(drawn, dtype=dtype)
    return learner


def draw(batch, tokens, heads=2, f=6, seed=1, dtype=mx.float64):
    """`q, k, v, lr` of ordinary size; the rate is large enough for a fold to matter."""
    rng = np.random.default_rng(seed)
    qkv = [mx.array(rng.standard_normal((batch, heads, tokens, f)), dtype=dtype) for _ in range(3)]
    return [*qkv, mx.array(rng.uniform(0.02, 0.2, (batch, heads, tokens)), dtype=dtype)]


def draw_decay(batch, tokens, heads=2, seed=2):
    drawn = np.random.default_rng(seed).uniform(0.9, 1, (batch, heads, tokens))
    return mx.array(drawn, dtype=mx.float64)


def run(learner, inputs, pieces, state=None, decay=None):
    """Feed the tokens cut into pieces of these lengths; return all answers and the last state."""
    state = state or learner.init_state(inputs[0].shape[0])
    outs, at = [], 0
    for length in pieces:
        part = [a[:, :, at : at + length] for a in inputs]
        kept = decay[:, :, at : at + length] if decay is not None else None
        out, state = learner(*part, state, decay=kept)
        outs.append(out)
        at += length
    return mx.concatenate(outs, axis=2), state


def widest(a, b):
    return float(np.max(np.abs(np.array(a) - np.array(b)), initial=0))


def widest_state(a, b):
    assert a.meta() == b.meta()
    return max(widest(x, b.arrays()[name]) for name, x in a.arrays().items())


def constant(x):
    return float(SCALARS(x))


# --- The reference: one head, one batch row, one token at a time, in numpy, from the equations.


def np_gelu(z):
    return 0.5 * z * (1 + np.tanh(constant(np.sqrt(2 / np.pi)) * (z + constant(0.044715) * z**3)))


def np_gelu_slope(z, h=1e-20):
    # Complex step: exact to rounding, and nothing of the closed form is repeated here.
    return np_gelu(z + 1j * h).imag / h


def np_norm(z, gamma, beta, eps):
    return gamma * (z - z.mean()) / np.sqrt(z.var() + constant(eps)) + beta


def np_size(W, b):
    return np.sqrt((W**2).sum() + (b**2).sum())


class Reference:
    """One head of one row, as on a blackboard: layers are lists, tokens come one by one."""

    def __init__(self, learner, head):
        p = {n: np.array(a) for n, a in learner.parameters().items()}
        self.r = learner.rules
        self.W = [p[f"W{i + 1}"][head] for i in range(learner.depth)]
        self.b = [p[f"b{i + 1}"][head][0] for i in range(learner.depth)]
        self.W0, self.b0 = list(self.W), list(self.b)
        self.gamma, self.beta = p["gamma"][head], p["beta"][head]
        c = self.r.mini_batch
        learned = (
            [max(1 / (t + 1) + p["token_idx"][t], 0) for t in range(c)] if "token_idx" in p else 0
        )
        self.tau = learned or [constant(1 / c)] * c
        self.seen = []

    def target(self, k, v):
        if self.r.target == "plain":
            return v - k
        d = v - k
        scaled = (d - d.mean()) / (d.std(ddof=1) + constant(self.r.target_eps))
        return self.gamma * scaled + self.beta

    def row(self, k, v, lr, decay):
        xs, zs = [k], []
        for W, b in zip(self.W, self.b, strict=True):
            zs.append(xs[-1] @ W + b)
            xs.append(np_gelu(zs[-1]))
        z, f, g = zs[-1], len(k), self.gamma
        s = np.sqrt(z.var() + constant(self.r.ln_eps))
        xh = (z - z.mean()) / s
        gx = (g * xh + self.beta - self.target(k, v)) * g
        gs = [(f * gx - gx.sum() - xh * (gx * xh).sum()) / (f * s)]
        for W, z in zip(self.W[:0:-1], zs[-2::-1], strict=True):
            gs.insert(0, (W @ gs[0]) * np_gelu_slope(z))
        return xs[:-1], gs, lr, decay

    def answer(self, q, rows, tau):
        x = q
        for i, (W, b) in enumerate(zip(self.W, self.b, strict=True)):
            z = x @ W + b
            for xs, gs, lr, _ in rows:
                z = z - self.r.read_gain * tau * lr * (1 + x @ xs[i]) * gs[i]
            x = np_gelu(z)
        return q + np_norm(z, self.gamma, self.beta, self.r.ln_eps)

    def token(self, q, k, v, lr, decay=1.0):
        self.seen.append(self.row(k, v, lr, decay))
        out = self.answer(q, self.seen, self.tau[len(self.seen) - 1])
        if len(self.seen) == self.r.mini_batch:
            self.fold()
        return out

    def fold(self):
        keep = math.prod(row[3] for row in self.seen)
        for i, (W, b, W0, b0) in enumerate(zip(self.W, self.b, self.W0, self.b0, strict=True)):
            dW = sum(self.tau[-1] * lr * np.outer(xs[i], gs[i]) for xs, gs, lr, _ in self.seen)
            db = sum(self.tau[-1] * lr * gs[i] for xs, gs, lr, _ in self.seen)
            most = self.r.max_step * max(np_size(W, b), np_size(W0, b0))
            cap = min(1.0, most / np_size(dW, db))
            goal, bias_goal = (0 * W0, 0 * b0) if self.r.forget == "zero" else (W0, b0)
            W = goal + keep * (W - goal) - cap * dW
            b = bias_goal + keep * (b - bias_goal) - cap * db
            far = np_size(W - W0, b - b0)
            ball = self.r.bound * np.sqrt(W.size + b.size)
            back = min(1.0, ball / far)
            self.W[i], self.b[i] = W0 + back * (W - W0), b0 + back * (b - b0)
        self.seen = []


def assert_matches_reference(learner, inputs, decay=None):
    tokens = inputs[0].shape[2]
    out, state = run(learner, inputs, [tokens], decay=decay)
    q, k, v, lr = (np.array(a) for a in inputs)
    kept = np.ones_like(lr) if decay is None else np.array(decay)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        ref = Reference(learner, h)
        wanted = [ref.token(*(a[b, h, t] for a in (q, k, v, lr, kept))) for t in range(tokens)]
        assert widest(out[b, h], np.stack(wanted)) < EXACT
        for i in range(learner.depth):
            assert widest(state.weights[f"W{i + 1}"][b, h], ref.W[i]) < EXACT
            assert widest(state.weights[f"b{i + 1}"][b, h, 0], ref.b[i]) < EXACT


# --- The maths.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"tau": "mean"},
        {"target": "standardized", "target_eps": 1e-5, "ln_eps": 1e-8},
        {"max_step": 1 / 64},
        {"bound": 1 / 32},
        {"read_gain": 2},
    ],
    ids=str,
)
def test_equals_the_blackboard(kind, rules):
    assert_matches_reference(make(kind, mini_batch=5, **rules), draw(2, 23))


def test_a_negative_share_is_cut_at_zero():
    learner = make("mlp", mini_batch=5)
    learner.token_idx = mx.array(np.array([0, 0, -0.5, 0, 0.0]), dtype=mx.float64)
    assert_matches_reference(learner, draw(2, 13))


@pytest.mark.parametrize("limits", [{}, {"max_step": 1 / 64}, {"bound": 1 / 32}], ids=str)
@pytest.mark.parametrize("forget", ["init", "zero"])
def test_forgetting_equals_the_blackboard(forget, limits):
    learner = make("mlp", mini_batch=5, forget=forget, **limits)
    assert_matches_reference(learner, draw(2, 23), draw_decay(2, 23))


def test_one_decay_per_head_is_the_same_decay_at_every_token():
    learner, inputs = make("mlp", mini_batch=5, forget="init"), draw(2, 12)
    decay = mx.array([0.9, 0.99], dtype=mx.float64)
    out, state = learner(*inputs, learner.init_state(2), decay=decay)
    spread = mx.broadcast_to(decay[:, None], (2, 2, 12))
    wanted, wanted_state = learner(*inputs, learner.init_state(2), decay=spread)
    assert widest(out, wanted) == 0 and widest_state(state, wanted_state) == 0


def test_a_decay_and_a_rule_that_forgets_belong_together():
    inputs, decay = draw(1, 3), draw_decay(1, 3)
    with pytest.raises(ValueError, match="forget=None"):
        make("mlp")(*inputs, make("mlp").init_state(1), decay=decay)
    learner = make("mlp", forget="zero")
    with pytest.raises(ValueError, match="decay given: none"):
        learner(*inputs, learner.init_state(1))


def written_loss(learner, weights, k, v):
    x = k
    for i in range(1, learner.depth + 1):
        z = x @ weights[f"W{i}"] + weights[f"b{i}"]
        x = 0.5 * z * (1 + mx.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    mean, var = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
    gamma, beta = learner.gamma[:, None], learner.beta[:, None]
    normed = gamma * (z - mean) / mx.sqrt(var + learner.rules.ln_eps) + beta
    return 0.5 * ((normed - (v - k)) ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_loss(kind):
    learner = make(kind)
    _, k, v, _ = draw(2, 7)
    weights = learner.init_state(2).weights
    wanted = mx.grad(lambda w: written_loss(learner, w, k, v))(weights)
    rows, _ = _learn(learner.rules, learner._params(), weights, k, v - k)
    for i in range(1, learner.depth + 1):
        x, g = rows[f"x{i}"], rows[f"g{i}"]
        assert widest(x.swapaxes(-1, -2) @ g, wanted[f"W{i}"]) < EXACT
        assert widest(g.sum(axis=2, keepdims=True), wanted[f"b{i}"]) < EXACT


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 21), min_size=1, max_size=7),
    c=st.sampled_from([1, 4, 16]),
    batch=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
    forget=st.sampled_from([None, "init", "zero"]),
)
def test_streaming_equals_chunked_for_every_split(pieces, c, batch, kind, forget):
    learner, total = make(kind, mini_batch=c, forget=forget), sum(pieces)
    inputs, decay = draw(batch, total), draw_decay(batch, total) if forget else None
    # As much learning per token whatever C: at a full rate for C = 1, 80 folds made of a rounding
    # error of 1e-16 one of 5e-11. Seen like this: 2.4e-13.
    inputs[3] = inputs[3] * c / 16
    whole, state = run(learner, inputs, [total], decay=decay)
    for cut in (pieces, [1] * total):
        out, cut_state = run(learner, inputs, cut, decay=decay)
        assert widest(out, whole) < EXACT
        assert widest_state(cut_state, state) < EXACT
    assert state.updates == total // c


def test_a_token_traced_inside_a_larger_graph_is_the_same_token():
    learner, inputs = make("mlp", mini_batch=4), draw(2, 10)
    state, outs = learner.init_state(2), []

    @mx.compile
    def traced(part, weights, rows, place):
        before = replace(learner.init_state(2), weights=weights, rows=rows)
        out, after = learner.trace(*part, before, place)
        return out, after.rows

    for t in range(10):
        part = [a[:, :, t : t + 1] for a in inputs]
        out, rows = traced(part, state.weights, state.rows, mx.array(t % 4))
        outs.append(out)
        state = learner.advance(replace(state, rows=rows))
    wanted, wanted_state = run(learner, inputs, [10])
    assert widest(mx.concatenate(outs, axis=2), wanted) < EXACT
    assert widest_state(state, wanted_state) < EXACT


@pytest.mark.parametrize("limits", [{}, {"max_step": 1 / 64, "bound": 1 / 32}], ids=str)
@pytest.mark.parametrize("forget", [None, "init", "zero"])
def test_a_fold_knows_the_norms_of_what_it_made(forget, limits):
    """Norms are carried from fold to fold; summed up anew from the weights they are the same."""
    learner, inputs = make("deep", mini_batch=5, forget=forget, **limits), draw(2, 40)
    params, state = learner._params(), learner.init_state(2)
    tokens = learner._tokens(*inputs, draw_decay(2, 40) if forget else None)
    weights, norms = state.weights, ttt._norms(params, state.weights)
    parts = {name: ttt._apart(a, 8) for name, a in tokens.items()}
    for part in ttt._feed(learner.rules, ttt._beside_mini_batches(params), parts, 8):
        _, weights, norms, _ = ttt._mini_batch(learner.rules, params, weights, norms, part)
        for carried, summed in zip(norms, ttt._norms(params, weights), strict=True):
            assert max(widest(a, b) for a, b in zip(carried, summed, strict=True)) < EXACT


def test_a_long_call_is_compiled_and_says_the_same(monkeypatch):
    """From 256 tokens on; float32 rounds a fused operation differently, by 2e-6 here."""
    learner, inputs = make("mlp", f=6, dtype=mx.float32), draw(2, 301, dtype=mx.float32)
    out, state = run(learner, inputs, [301])
    monkeypatch.setattr(ttt, "_compiled_mini_batch", None)  # who calls it now fails
    wanted, wanted_state = run(learner, inputs, [255, 46])
    assert widest(out, wanted) < 2e-5 and widest_state(state, wanted_state) < 2e-5
    with pytest.raises(TypeError):
        run(learner, inputs, [301])


def test_queries_of_one_or_of_many_mini_batches_at_once(monkeypatch):
    learner, inputs = make("mlp", mini_batch=4), draw(2, 30)
    wanted, _ = run(learner, inputs, [30])
    for mini_batches in (1, 3):
        size = sum(a.nbytes for a in learner.init_state(2).weights.values())
        monkeypatch.setattr(ttt, "_STACK_BYTES", mini_batches * size)
        assert widest(run(learner, inputs, [30])[0], wanted) < EXACT


def peak_bytes(learner, tokens):
    inputs = draw(1, tokens, f=16, dtype=mx.float32)
    mx.eval(inputs, learner.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out, state = run(learner, inputs, [tokens])
    mx.eval(out, state.arrays())
    return mx.get_peak_memory() - before


def test_memory_grows_no_faster_than_tokens():
    """16 times the tokens, so that what stays the same leaves room for the allocator's moods.

    One length's peak varies by 1.8 times, with how soon MLX's thread lets go of what it has used.
    """
    learner = TTTMLP(2, 16, 64)
    peak_bytes(learner, 512)  # what is built once
    assert peak_bytes(learner, 16 * 512) < 16 * peak_bytes(learner, 512)


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 3), f=st.integers(2, 9), hidden=st.integers(1, 11))
def test_any_heads_width_and_inner_size(heads, f, hidden):
    learner, inputs = TTTMLP(heads, f, hidden, Rules(4)), draw(2, 10, heads, f, dtype=mx.float32)
    out, state = run(learner, inputs, [10])
    assert out.shape == (2, heads, 10, f) and out.dtype == mx.float32
    assert state.weights["W1"].shape == (2, heads, f, hidden)
    assert mx.all(finite(state)).item()


def test_sizes_must_return_to_the_head_width():
    with pytest.raises(ValueError, match="InnerLearner"):
        InnerLearner(1, (4, 8, 5))


# --- Older checkpoints: the chunked form of section 2 with every row visible.


@pytest.mark.parametrize("kind, gain", [("linear", 1), ("mlp", 1), ("deep", 2)])
def test_not_causal_equals_the_old_chunked_form(kind, gain):
    c = 5
    learner = make(
        kind,
        mini_batch=c,
        causal=False,
        tau="mean",
        target="standardized",
        ln_eps=1e-8,
        read_gain=gain,
        max_step=math.inf,
        bound=math.inf,
    )
    inputs = draw(1, 3 * c)
    out, _ = run(learner, inputs, [3 * c])
    for h in range(2):
        ref = Reference(learner, h)
        q, k, v, lr = (np.array(a)[0, h] for a in inputs)
        for t in range(0, 3 * c, c):
            rows = [ref.row(k[j], v[j], lr[j], 1.0) for j in range(t, t + c)]
            wanted = np.stack([ref.answer(q[j], rows, ref.tau[-1]) for j in range(t, t + c)])
            assert widest(out[0, h, t : t + c], wanted) < EXACT
            ref.seen = rows
            ref.fold()


# --- Training.


def outer_loss(learner, inputs, decay=None):
    out, _ = run(learner, inputs, [inputs[0].shape[2]], decay=decay)
    return mx.sum(out * out * mx.tanh(out))  # mx.sin is float32 inside, even on float64


def along(tree, other):
    """The inner product of two trees of arrays."""
    pairs = zip(nn.utils.tree_flatten(tree), nn.utils.tree_flatten(other), strict=True)
    return sum(float(np.sum(np.array(a) * np.array(b))) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["parameters", "inputs", "decay"])
@pytest.mark.parametrize(
    "rules", [{}, {"max_step": 1 / 64, "bound": 1 / 32}, {"target": "standardized"}], ids=str
)
def test_outer_gradients_are_those_of_finite_differences(rules, which):
    """Through 16 mini-batches, limits active or not."""
    learner = make("mlp", mini_batch=3, forget="init", **rules)
    point = [learner.parameters(), draw(1, 48), draw_decay(1, 48)]

    def loss(params, inputs, decay):
        learner.update(params)
        return outer_loss(learner, inputs, decay)

    grads = mx.grad(loss, argnums=which)(*point)
    rng = np.random.default_rng(3)
    way = nn.utils.tree_map(
        lambda a: mx.array(rng.standard_normal(a.shape), dtype=mx.float64), point[which]
    )

    def moved(by):
        place = list(point)
        place[which] = nn.utils.tree_map(
            lambda a, d: a + mx.array(np.array(by), dtype=mx.float64) * d, point[which], way
        )
        return float(np.array(loss(*place)))

    # Seen: 9e-6 at a step of 1e-5 (curvature), 1.2e-7 at 1e-6, 1.5e-7 at 1e-7 (rounding).
    assert (moved(1e-6) - moved(-1e-6)) / 2e-6 == pytest.approx(along(grads, way), rel=1e-6)


# --- The list of bugs seen in earlier attempts. Each check takes the way of doing it as an argument:
# --- the honest one passes, the planted one must not.


def honest(learner, inputs, pieces):
    return run(learner, inputs, pieces)


def padded_to_a_mini_batch(learner, inputs, pieces):
    """Bug 1: each piece is filled up with zero tokens, whose normalized keys are unit vectors."""
    c, f = learner.rules.mini_batch, inputs[0].shape[-1]
    state, outs, at = learner.init_state(inputs[0].shape[0]), [], 0
    for length in pieces:
        part = [a[:, :, at : at + length] for a in inputs]
        lead = (*part[0].shape[:2], -length % c)
        unit = mx.full((*lead, f), f**-0.5, dtype=mx.float64)
        fill = [unit, unit, mx.zeros_like(unit), mx.full(lead, 0.1, dtype=mx.float64)]
        whole = [mx.concatenate(pair, axis=2) for pair in zip(part, fill, strict=True)]
        out, state = learner(*whole, state)
        outs.append(out[:, :, :length])
        at += length
    return mx.concatenate(outs, axis=2), state


def rounded_to_bfloat16(learner, inputs, pieces):
    """Bug 2: the state passes through bfloat16 between calls."""
    state, outs, at = learner.init_state(inputs[0].shape[0]), [], 0
    for length in pieces:
        out, state = learner(*(a[:, :, at : at + length] for a in inputs), state)
        low = {n: a.astype(mx.bfloat16).astype(a.dtype) for n, a in state.arrays().items()}
        state, at = state.load(low, state.meta()), at + length
        outs.append(out)
    return mx.concatenate(outs, axis=2), state


def first_row_for_all(learner, inputs, pieces):
    """Bug 5: every batch row reads the state of row 0."""
    state, outs, at = learner.init_state(inputs[0].shape[0]), [], 0
    for length in pieces:
        out, state = learner(*(a[:, :, at : at + length] for a in inputs), state)
        same = {n: mx.broadcast_to(a[:1], a.shape) for n, a in state.arrays().items()}
        state, at = state.load(same, state.meta()), at + length
        outs.append(out)
    return mx.concatenate(outs, axis=2), state


class NeverFolds(TTTMLP):
    """Bug 3: rows are dropped at the end of a mini-batch, the weights stay."""

    def _take_whole(self, params, tokens, state):
        out, after = super()._take_whole(params, tokens, state)
        return out, replace(after, weights=state.weights, step=state.step)

    def _folded(self, params, state):
        folded = super()._folded(params, state)
        return TTTState(state.weights, folded.rows, state.step, folded.tokens, folded.updates)


class LosesItsState(TTTMLP):
    """Bug 3: the new state is computed and not returned."""

    def __call__(self, q, k, v, lr, state, decay=None):
        return super().__call__(q, k, v, lr, state, decay)[0], state


def check_pieces_agree(play):
    learner, inputs = make("mlp", mini_batch=4), draw(1, 13)
    out, state = play(learner, inputs, [1] * 13)
    whole, whole_state = run(learner, inputs, [13])
    assert widest(out, whole) < EXACT
    assert widest_state(state, whole_state) < EXACT


def check_small_steps_arrive(play):
    """At a rate of 0.001 every weight still moves, and every array is float32."""
    learner = make("mlp", mini_batch=4, dtype=mx.float32)
    learner.set_dtype(mx.bfloat16)
    q, k, v, _ = draw(1, 32, dtype=mx.bfloat16)
    start = learner.init_state(1)
    _, state = play(learner, [q, k, v, mx.full((1, 2, 32), 1e-3)], [4] * 8)
    assert {a.dtype for a in state.arrays().values()} == {mx.float32}
    for name in ("W1", "W2"):
        assert mx.mean(state.weights[name] != start.weights[name]).item() > 0.99


def check_it_learns(kind):
    learner = kind(2, 6, 9, Rules(4))
    start = learner.init_state(1)
    _, state = run(learner, draw(1, 30, dtype=mx.float32), [5, 1, 24], start)
    assert state.tokens == 30 and state.updates == 30 // 4
    assert mx.all(learner.norms(state)["step"] > 0).item()
    assert mx.all(learner.norms(state)["drift"] > 0).item()


def check_no_future(learner):
    inputs = draw(1, 9)
    out, _ = run(learner, inputs, [9])
    for t in range(8):
        later = mx.arange(9)[:, None] > t
        moved = [mx.where(later, a + 1, a) for a in inputs[:3]]
        changed, _ = run(learner, [*moved, inputs[3]], [9])
        assert widest(changed[:, :, : t + 1], out[:, :, : t + 1]) == 0


def check_rows_are_strangers(play):
    learner, inputs = make("mlp", mini_batch=4), draw(3, 11)
    out, _ = play(learner, inputs, [3, 8])
    for b in range(3):
        alone, _ = run(learner, [a[b : b + 1] for a in inputs], [3, 8])
        assert widest(out[b : b + 1], alone) < EXACT


def check_reset_is_fresh(reset):
    learner, inputs = make("mlp", mini_batch=4), draw(2, 11)
    out, _ = run(learner, inputs, [11])
    _, used = run(learner, draw(2, 10, seed=5), [10])
    again, _ = run(learner, inputs, [11], reset(learner, used))
    assert widest(again, out) == 0


def check_every_parameter_gets_a_gradient(learner):
    inputs = draw(1, 12)
    grads = mx.grad(lambda p: outer_loss(learner.update(p), inputs))(learner.parameters())
    silent = [name for name, g in grads.items() if not mx.any(g != 0).item()]
    assert silent == []
    for grad in mx.grad(lambda args: outer_loss(learner, args))(inputs):
        assert mx.all(mx.any(grad != 0, axis=1)).item()


def test_bug_1_nothing_is_padded():
    check_pieces_agree(honest)
    with pytest.raises(AssertionError):
        check_pieces_agree(padded_to_a_mini_batch)


def test_bug_2_the_state_stays_float32():
    check_small_steps_arrive(honest)
    with pytest.raises(AssertionError):
        check_small_steps_arrive(rounded_to_bfloat16)


@pytest.mark.parametrize("planted", [NeverFolds, LosesItsState])
def test_bug_3_the_state_is_updated(planted):
    check_it_learns(TTTMLP)
    with pytest.raises(AssertionError):
        check_it_learns(planted)


def test_bug_4_the_future_is_not_seen():
    check_no_future(make("mlp", mini_batch=4))
    check_no_future(make("mlp", mini_batch=4, tau="mean"))
    with pytest.raises(AssertionError):
        check_no_future(make("mlp", mini_batch=4, causal=False))


def test_bug_5_batch_rows_are_independent():
    check_rows_are_strangers(honest)
    with pytest.raises(AssertionError):
        check_rows_are_strangers(first_row_for_all)


def test_bug_6_reset_is_a_fresh_state():
    check_reset_is_fresh(lambda learner, used: learner.init_state(2))
    with pytest.raises(AssertionError):
        check_reset_is_fresh(lambda learner, used: make("mlp", seed=7, mini_batch=4).init_state(2))
    with pytest.raises(AssertionError):
        check_reset_is_fresh(lambda learner, used: used)


@pytest.mark.parametrize("kind", KINDS)
def test_bug_8_every_parameter_gets_a_gradient(kind):
    check_every_parameter_gets_a_gradient(make(kind, mini_batch=4))
    zero_product = make("mlp", mini_batch=4)
    for name in ("W1", "b1", "W2"):
        zero_product[name] = mx.zeros_like(zero_product[name])
    with pytest.raises(AssertionError):
        check_every_parameter_gets_a_gradient(zero_product)


# --- Save, resume, freeze.


@pytest.mark.parametrize("forget", [None, "init"])
def test_resume_in_mid_mini_batch_is_bit_equal(forget, tmp_path):
    learner = make("mlp", mini_batch=5, dtype=mx.float32, forget=forget)
    inputs = draw(2, 21, dtype=mx.float32)
    decay = draw_decay(2, 21).astype(mx.float32) if forget else None
    _, state = run(learner, [a[:, :, :8] for a in inputs], [8], decay=decay)
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, state.arrays(), state.meta())
    resumed = learner.init_state(2).load(*mx.load(path, return_metadata=True))

    rest = [a[:, :, 8:] for a in inputs]
    later = decay[:, :, 8:] if forget else None
    out, end = run(learner, rest, [1] * 13, state, later)
    again, again_end = run(learner, rest, [1] * 13, resumed, later)
    assert state.tokens % 5 != 0
    assert widest(out, again) == 0 and widest_state(end, again_end) == 0


def without(name):
    return lambda arrays: {n: a for n, a in arrays.items() if n != name}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without("rows.g2"), "'rows.g2' is missing"),
        (lambda arrays: arrays | {"weights.W3": arrays["step"]}, "'weights.W3' is not part"),
        (lambda arrays: {n: a[:1] for n, a in arrays.items()}, r"should be .* \(2, 2"),
        (lambda arrays: {n: a.astype(mx.bfloat16) for n, a in arrays.items()}, "found .*bfloat16"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(spoil, message):
    state = make("mlp", dtype=mx.float32).init_state(2)
    with pytest.raises(UserError, match=message):
        state.load(spoil(state.arrays()), state.meta())


@pytest.mark.parametrize("tokens", [0, 3, 4, 6])
def test_frozen_reads_as_the_last_token_did_and_changes_nothing(tokens):
    learner, inputs = make("mlp", mini_batch=4), draw(2, 7)
    state, out = learner.init_state(2), None
    if tokens:
        out, state = run(learner, [a[:, :, :tokens] for a in inputs], [tokens])
    q = mx.concatenate([inputs[0][:, :, max(tokens - 1, 0)][:, :, None], inputs[0]], axis=2)
    before = {name: np.array(array) for name, array in state.arrays().items()}
    read = learner.read(q, state)
    assert read.shape == q.shape
    for name, array in state.arrays().items():
        np.testing.assert_array_equal(np.array(array), before[name])
    if tokens % 4:
        assert widest(read[:, :, :1], out[:, :, -1:]) < EXACT
    else:
        x = q @ state.weights["W1"] + state.weights["b1"]
        x = np_gelu_layer(x) @ np.array(state.weights["W2"]) + np.array(state.weights["b2"])
        gamma, beta = np.array(learner.gamma)[:, None], np.array(learner.beta)[:, None]
        s = np.sqrt(x.var(-1, keepdims=True) + constant(learner.rules.ln_eps))
        wanted = np.array(q) + gamma * (x - x.mean(-1, keepdims=True)) / s + beta
        assert widest(read, wanted) < EXACT


def np_gelu_layer(x):
    return np_gelu(np.array(x))


# --- Stability.


def constant_row(seed, tokens, f):
    return np.broadcast_to(np.random.default_rng(seed).standard_normal(f), (tokens, f))


def adversaries(seed, tokens, f):
    """`q, k, v [5, 1, T, f]`: silence, a constant, noise, maximal amplitude, one token repeated."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((3, tokens, f))
    loud = 1e3 * np.sign(rng.standard_normal((3, tokens, f)))
    token = np.stack([constant_row(i, tokens, f) for i in range(3)])
    kinds = [np.zeros_like(noise), np.ones_like(noise), noise, loud, token]
    return [mx.array(np.stack([kind[i] for kind in kinds])[:, None], mx.float32) for i in range(3)]


def check_survives(learner, tokens, f=8, block=2000):
    """Run the adversaries at 20 times the largest published rate; look at every block, never beyond."""
    state, rules = learner.init_state(5), learner.rules
    lr = mx.full((5, 1, block), 20 / f)
    for start in range(0, tokens, block):
        out, state = learner(*adversaries(start, block, f), lr, state)
        assert mx.all(mx.isfinite(out)).item() and mx.all(finite(state)).item()
    assert state.updates == tokens // rules.mini_batch
    for name, w in state.weights.items():
        if name[0] == "W":
            away = mx.sqrt(mx.mean((w - learner[name]) ** 2, axis=(1, 2, 3)))
            # One row more (the bias) shares the layer's bound.
            assert mx.max(away).item() < 16 * math.sqrt(1 + 1 / w.shape[-2]) * 1.0001


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_100_000_adversarial_tokens_stay_finite_and_in_bounds(kind):
    learner = make(kind, heads=1, f=8, mini_batch=16, dtype=mx.float32)
    check_survives(learner, 100_000)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_without_the_bound_the_weights_leave(kind):
    learner = make(kind, heads=1, f=8, mini_batch=16, dtype=mx.float32, bound=math.inf)
    with pytest.raises(AssertionError):
        check_survives(learner, 20_000)


def test_limits_change_no_bit_of_ordinary_learning():
    inputs = draw(1, 200, dtype=mx.float32)
    limited = make("mlp", mini_batch=16, dtype=mx.float32)
    free = make("mlp", mini_batch=16, dtype=mx.float32, max_step=math.inf, bound=math.inf)
    out, state = run(limited, inputs, [200])
    wanted, free_state = run(free, inputs, [200])
    assert widest(out, wanted) == 0 and widest_state(state, free_state) == 0


def loss_after_silence(max_step):
    """Mean squared answer error on 2,000 tokens of a linear map, after 2,000 tokens of silence.

    Weights start as small as new ones do, so that silence finds nothing to hold on to. The answer to
    guess has variance 1 in every entry: an error of 2 is a guess at random, 1 the best constant.
    """
    mx.random.seed(0)
    f, length = 16, 2000
    learner = TTTMLP(1, f, 32, Rules(max_step=max_step))
    learner.beta = 0.1 * mx.random.normal(learner.beta.shape)
    state, lr = learner.init_state(1), mx.full((1, 1, length), 0.5 / f)
    quiet = mx.zeros((1, 1, length, f))
    _, state = learner(quiet, quiet, quiet, lr, state)
    k = mx.random.normal((1, 1, length, f))
    r = k @ mx.random.normal((f, f))
    r = (r - r.mean(-1, keepdims=True)) / mx.sqrt(r.var(-1, keepdims=True))
    out, _ = learner(k, k, k + r, lr, state)
    return mx.mean((out - k - r)[:, :, length // 2 :] ** 2).item()


def test_silence_does_not_stop_it_from_learning():
    assert loss_after_silence(max_step=1.0) < 0.5
    assert loss_after_silence(max_step=math.inf) > 1


def test_limits_leave_gradients_finite_at_rest():
    """A rate of zero moves nothing: every norm that the limits divide by is zero."""
    learner, inputs = make("mlp", mini_batch=4), draw(1, 9)
    inputs[3] = mx.zeros_like(inputs[3])
    grads = mx.grad(lambda p: outer_loss(learner.update(p), inputs))(learner.parameters())
    assert all(mx.all(mx.isfinite(g)).item() for g in grads.values())


def test_no_limits_leave_gradients_finite():
    """Infinity as a limit is no factor: its product with a gradient of zero would be no number."""
    learner, inputs = make("mlp", mini_batch=4, max_step=math.inf, bound=math.inf), draw(1, 13)
    grads = mx.grad(lambda p: outer_loss(learner.update(p), inputs))(learner.parameters())
    assert all(mx.all(mx.isfinite(g)).item() for g in grads.values())


def test_finite_speaks_for_each_row():
    learner = make("mlp", dtype=mx.float32)
    inputs = draw(3, 5, dtype=mx.float32)
    inputs[2][1, 0, 2, 0] = math.inf
    _, state = run(learner, inputs, [5])
    assert finite(state).tolist() == [True, False, True]


def test_the_monitor_reads_relative_norms():
    learner, inputs = make("mlp", mini_batch=5), draw(2, 5)
    _, state = run(learner, inputs, [5])
    for h, b in itertools.product(range(2), range(2)):
        ref = Reference(learner, h)
        for t in range(5):
            ref.token(*(np.array(a)[b, h, t] for a in inputs))
        for i in range(2):
            step = np_size(ref.W[i] - ref.W0[i], ref.b[i] - ref.b0[i]) / np_size(
                ref.W0[i], ref.b0[i]
            )
            norms = learner.norms(state)
            assert np.array(norms["step"])[b, h, i] == pytest.approx(step, abs=EXACT)
            assert np.array(norms["drift"])[b, h, i] == pytest.approx(step, abs=EXACT)
