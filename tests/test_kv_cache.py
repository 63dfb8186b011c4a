"""The window is exact: any split of a sequence gives the numbers of masked full attention."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn

from moshi_ttt_mlx import kv_cache
from moshi_ttt_mlx.kv_cache import WindowKVCache
from moshi_ttt_mlx.memory import Virtual

B, H, D = 2, 2, 16  # 1 / sqrt(16) is exact: mlx 0.26 rounds Python scalars to float32


def written_out(q, k, v, window, sinks, virtual_k=None, virtual_v=None, gate=None, base=10_000.0):
    """Plain float64 reference: every query loops over what it may see. Inputs are not rotated.

    Virtual keys `[B, H, T, n, D]` are at distance 0 and weigh `|gate|` times as much as they would.
    """
    freq = base ** (-np.arange(D // 2) / (D // 2))

    def turn(x, position):
        c, s = np.cos(position * freq), np.sin(position * freq)
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
        out[..., 1::2] = x[..., 0::2] * s + x[..., 1::2] * c
        return out

    out = np.zeros_like(q)
    for p in range(q.shape[2]):
        recent = range(max(sinks, p - (window - sinks) + 1), p + 1)
        kept = [(i, max(i, p - (window - 1) + i)) for i in range(min(sinks, p + 1))]
        seen = kept + [(j, j) for j in recent]
        keys = np.stack([turn(k[:, :, j], at) for j, at in seen], axis=2)
        scores = np.einsum("bhd,bhnd->bhn", turn(q[:, :, p], p), keys) / np.sqrt(D)
        weights, values = np.exp(scores), v[:, :, [j for j, _ in seen]]
        signs = np.ones_like(weights)
        if gate is not None:
            logits = np.einsum("bhd,bhnd->bhn", q[:, :, p], virtual_k[:, :, p]) / np.sqrt(D)
            weights = np.concatenate([weights, np.abs(gate) * np.exp(logits)], axis=-1)
            signs = np.concatenate([signs, np.sign(gate) * np.ones_like(logits)], axis=-1)
            values = np.concatenate([values, virtual_v[:, :, p]], axis=2)
        weights = signs * weights / weights.sum(-1, keepdims=True)
        out[:, :, p] = np.einsum("bhn,bhnd->bhd", weights, values)
    return out


# MLX's float64 `exp`, `cos` and `sin` are float32-accurate on CPU (2.6e-7 measured), so the library
# calls the cache makes are replaced by exact ones: what is tested is which keys are read, and where.


def turn(x, positions, base=10_000.0):
    angle = np.asarray(positions)[:, None] * base ** (-np.arange(D // 2) / (D // 2))
    c, s = np.cos(angle), np.sin(angle)
    a, b = np.array(x)[..., 0::2], np.array(x)[..., 1::2]
    return mx.array(np.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape), dtype=mx.float64)


class ExactRope(nn.RoPE):
    def __call__(self, x, offset=0):
        return turn(x, np.arange(x.shape[2]) + offset)


def exact_rope():
    return ExactRope(D, traditional=True, base=10_000.0)


def softmax(scores, axis=-1, precise=True):
    x = np.array(scores)
    e = np.exp(x - x.max(axis, keepdims=True))
    return mx.array(e / e.sum(axis, keepdims=True), dtype=mx.float64)


def logsumexp(scores, axis=-1, keepdims=True):
    x = np.array(scores)
    top = x.max(axis, keepdims=keepdims)
    return mx.array(top + np.log(np.exp(x - top).sum(axis, keepdims=keepdims)), dtype=mx.float64)


def attention(q, k, v, *, scale, mask=None):
    scores = np.array(q) @ np.array(k).swapaxes(2, 3) * scale
    if mask is not None:
        scores = np.where(np.array(mask), scores, -np.inf)
    return softmax(scores) @ v


def fast_rope(x, dims, *, traditional, base, scale, offset):
    assert dims == D and traditional
    return turn(x, (np.arange(x.shape[2]) + offset) * scale, base)


@pytest.fixture(autouse=True)
def _exact_library(monkeypatch):
    monkeypatch.setattr(mx, "softmax", softmax)
    monkeypatch.setattr(mx, "logsumexp", logsumexp)
    monkeypatch.setattr(mx, "exp", lambda x: mx.array(np.exp(np.array(x)), dtype=mx.float64))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(mx.fast, "rope", fast_rope)


def run(cache, q, k, v, pieces, virtual=None):
    """Feed a sequence in pieces, as a layer would: rotate at the cache's offset, then attend."""
    outs, start = [], 0
    for t in pieces:
        part = slice(start, start + t)
        beside = virtual and (virtual.part(part), q[:, :, part])
        qr = cache.rope(q[:, :, part], offset=cache.offset)
        kr = cache.rope(k[:, :, part], offset=cache.offset)
        outs.append(cache.attend(qr, kr, v[:, :, part], 1 / D**0.5, beside))
        mx.eval(outs[-1], cache.state)
        start += t
    return np.array(mx.concatenate(outs, axis=2))


def sequence(total, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(B, H, total, D)) for _ in range(3)]
    return arrays, [mx.array(a, dtype=mx.float64) for a in arrays]


def split(total, cuts):
    edges = sorted({0, total, *(c % total for c in cuts)})
    return [b - a for a, b in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(2, 9),
    sinks=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 39), max_size=12),
)
def test_any_split_equals_full_attention_in_float64(window, sinks, cuts):
    sinks = min(sinks, window - 1)
    arrays, (q, k, v) = sequence(40)  # at least 3 wraps of the widest window
    got = run(WindowKVCache(window, sinks, exact_rope()), q, k, v, split(40, cuts))
    np.testing.assert_allclose(got, written_out(*arrays, window, sinks), rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(2, 9),
    sinks=st.integers(0, 3),
    own=st.booleans(),
    cuts=st.lists(st.integers(0, 39), max_size=12),
)
def test_virtual_keys_sinks_and_window_are_one_softmax(window, sinks, own, cuts):
    sinks = min(sinks, window - 1)
    arrays, (q, k, v) = sequence(40)
    rng = np.random.default_rng(3)
    gate = rng.normal(size=(1, H, 1))
    if own:  # one virtual token for each token
        keys, values = rng.normal(size=(2, B, H, 40, 1, D))
        parts = [(40, *(mx.array(a[:, :, :, 0], dtype=mx.float64) for a in (keys, values)))]
    else:  # three, shared by all tokens from one fold to the next
        folds = [5, 16, 16, 3]
        few = rng.normal(size=(2, len(folds), B, H, 3, D))
        keys, values = (
            np.concatenate([np.repeat(x[i][:, :, None], n, axis=2) for i, n in enumerate(folds)], 2)
            for x in few
        )
        pairs = zip(folds, *few, strict=True)
        parts = [(n, *(mx.array(a, dtype=mx.float64) for a in pair)) for n, *pair in pairs]
    ok = mx.ones((B, 1, 1, 1), mx.bool_)
    virtual = Virtual(parts, mx.array(gate[0, :, :, None], dtype=mx.float64), ok, own)
    got = run(WindowKVCache(window, sinks, exact_rope()), q, k, v, split(40, cuts), virtual)
    want = written_out(*arrays, window, sinks, keys, values, gate)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sinks", [0, 2])
def test_single_steps_past_many_wraps(sinks):
    arrays, (q, k, v) = sequence(60)
    got = run(WindowKVCache(8, sinks, exact_rope()), q, k, v, [1] * 60)
    np.testing.assert_allclose(got, written_out(*arrays, 8, sinks), rtol=0, atol=1e-13)


def test_window_larger_than_a_block_of_slots():
    arrays, (q, k, v) = sequence(620)
    got = run(WindowKVCache(300, 4, exact_rope()), q, k, v, [1] * 250 + [30] + [1] * 40 + [300])
    want = written_out(*arrays, 300, 4)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("pieces", [[1] * 90, [7] * 12 + [6]])
def test_positions_start_over_without_a_trace(monkeypatch, sinks, pieces):
    """Keys are turned back past MAX_POSITION; only distances matter, so nothing may change."""
    monkeypatch.setattr(kv_cache, "MAX_POSITION", 20)
    arrays, (q, k, v) = sequence(90)
    cache = WindowKVCache(8, sinks, exact_rope())
    got = run(cache, q, k, v, pieces)
    assert cache.length == 90 and cache.offset <= 20 + max(pieces)
    np.testing.assert_allclose(got, written_out(*arrays, 8, sinks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [0, 3])
def test_resume_at_any_step_is_bit_equal(sinks):
    _, (q, k, v) = sequence(30)
    whole = run(WindowKVCache(8, sinks, exact_rope()), q, k, v, [1] * 30)
    for at in (1, 2, 7, 8, 9, 25):
        first = WindowKVCache(8, sinks, exact_rope())
        head = run(first, q, k, v, [1] * at)
        second = WindowKVCache(8, sinks, exact_rope())
        second.load_state(first.state, first.meta_state)
        tail = run(second, q[:, :, at:], k[:, :, at:], v[:, :, at:], [1] * (30 - at))
        np.testing.assert_array_equal(np.concatenate([head, tail], axis=2), whole)


def test_reset_equals_fresh():
    _, (q, k, v) = sequence(20)
    used = WindowKVCache(6, 2, exact_rope())
    run(used, q, k, v, [1] * 11 + [9])
    used.reset()
    fresh = run(WindowKVCache(6, 2, exact_rope()), q, k, v, [1] * 20)
    np.testing.assert_array_equal(run(used, q, k, v, [1] * 20), fresh)


def test_a_snapshot_does_not_change_when_the_talk_goes_on():
    _, (q, k, v) = sequence(20)
    cache = WindowKVCache(6, 2, exact_rope())
    run(cache, q, k, v, [1] * 10)
    snapshot = cache.state
    before = {name: np.array(a) for name, a in snapshot.items()}
    run(cache, q, k, v, [1] * 10)
    for name, a in snapshot.items():
        np.testing.assert_array_equal(np.array(a), before[name])


def test_memory_is_bounded_by_the_window():
    _, (q, k, v) = sequence(50)
    cache = WindowKVCache(6, 0, exact_rope())
    run(cache, q, k, v, [1] * 30 + [20])
    assert cache.keys.shape == (B, H, 6, D)


def test_several_tokens_through_the_stock_interface_are_refused():
    _, (_, k, v) = sequence(2)
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        WindowKVCache(4).update_and_fetch(k, v)


@pytest.mark.parametrize("sinks", [-1, 4])
def test_sinks_must_leave_room_for_the_query(sinks):
    with pytest.raises(ValueError, match="sinks must be in"):
        WindowKVCache(4, sinks)
