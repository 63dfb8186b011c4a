"""The chunked section of the bench: what it times is the learner, at both cuts."""

import mlx.core as mx
import pytest

from moshi_ttt_mlx import bench_chunked
from moshi_ttt_mlx.bench import tiny_lm
from moshi_ttt_mlx.bench_chunked import Case, learner_case, measure, model_case, training_case
from moshi_ttt_mlx.bench_memory import add_open_memory
from moshi_ttt_mlx.ttt import TTTMLP, Rules, TTTLinear


def small_model():
    lm = tiny_lm(layers=2, dim=32, codebooks=2, depformer_layers=1, context=20)
    add_open_memory(lm)
    return lm


def test_one_call_and_many_calls_compute_the_same():
    case = learner_case("x", TTTMLP(2, 8, 16, Rules(4)), 22)
    (whole, state), (*parts, end) = case.run(22), case.run(1)
    # float32, another order of sums; weights and answers are of size 1.
    assert mx.max(mx.abs(mx.concatenate(parts, axis=2) - whole)) < 2e-5
    assert all(mx.max(mx.abs(end[name] - a)) < 2e-5 for name, a in state.items())


def test_training_has_a_gradient_for_every_parameter():
    case = training_case("x", TTTLinear(2, 8, Rules(4)), 9)
    losses, grads = zip(*(case.run(size) for size in (1, 9)), strict=True)
    assert all(mx.any(grads[1][name] != 0) for name in ("W1", "b1", "gamma", "token_idx"))
    one, many = ({n: mx.max(mx.abs(a)).item() for n, a in g.items()} for g in grads)
    # The losses differ: a mean of means over calls. Their gradients are there in both.
    assert one.keys() == many.keys() and losses[0].shape == ()


def test_a_model_ends_where_it_would_frame_by_frame():
    case = model_case("x", small_model(), 24)
    assert mx.max(mx.abs(case.run(24)[:, -1] - case.run(1)[:, -1])) < 2e-5


@pytest.mark.parametrize("slow", [1, 24])
def test_the_ratio_is_that_of_the_two_cuts(monkeypatch, slow):
    monkeypatch.setattr(bench_chunked, "_seconds", lambda run, size: 3.0 if size == slow else 1.0)
    row = measure(Case("x", lambda size: mx.zeros(1000 * size), 24), turns=2)
    assert (row.streaming, row.chunked) == ((8, 24) if slow == 1 else (24, 8))
    assert row.ratio == row.chunked / row.streaming
    assert row.chunked_peak >= 4 * 24_000 and 4000 <= row.streaming_peak < 5000
