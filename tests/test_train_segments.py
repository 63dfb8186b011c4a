"""Gradients: right, the same with and without recomputing, and only where something is to learn."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import test_generate
import test_memory
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from test_memory import KINDS, kinds, to_float64
from test_train_loss import talk

from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.layers import make_memory_cache
from moshi_ttt_mlx.legacy import LegacyConfig
from moshi_ttt_mlx.surgery import add_memory
from moshi_ttt_mlx.train import loss
from moshi_ttt_mlx.train.segments import Attention, Learner
from moshi_ttt_mlx.weights import quantize

FRAMES = 20
ATTENTION = Attention(window=9)


def flat(tree):
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def learner(kind="query", phase="memory", double=False, **kwargs):
    lm, adapter = test_memory.with_memory(kind)
    if double:
        to_float64(lm, adapter)
    return Learner(lm, adapter, phase, kwargs.pop("attention", ATTENTION), **kwargs)


def batch(lm, frames=FRAMES, rows=2, seed=0):
    return loss.delayed(talk(lm.cfg, frames, rows, seed), lm.cfg)


def walk(learner, line, pieces, params=None):
    """Loss and summed gradient over a talk cut into pieces, and what is carried out of it."""
    params = learner.parameters() if params is None else params
    cuts = np.cumsum([0, *pieces])
    parts = [loss.cut(line, learner.lm.cfg, a, b) for a, b in pairwise(cuts)]
    total = sum(learner.total(targets) for _, targets in parts)
    carried, value, grads = None, 0.0, None
    for inputs, targets in parts:
        segment, new = learner.gradients(params, carried, inputs, targets, total)
        carried, value = segment.carried, value + segment.loss.item()
        grads = new if grads is None else tree_map(mx.add, grads, new)
        mx.eval(grads, carried.arrays)
    return value, flat(grads), carried


@kinds
@pytest.mark.parametrize("phase", ["memory", "all"])
def test_recomputing_changes_no_gradient(kind, phase):
    one, other = (learner(kind, phase, recompute=on) for on in (True, False))
    line = batch(one.lm)
    for pieces in ([FRAMES], [8, 12]):
        value, grads, carried = walk(one, line, pieces)
        want_value, want, want_carried = walk(other, line, pieces)
        assert value == want_value
        assert grads.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(grads[name], want[name], name)
        for ours, theirs in zip(carried.arrays, want_carried.arrays, strict=True):
            for name in theirs:
                np.testing.assert_array_equal(np.array(ours[name]), np.array(theirs[name]))
        assert carried.meta == want_carried.meta


def test_recomputing_a_segment_that_the_learner_compiles():
    line = batch(learner().lm, frames=300, rows=1)
    found = [walk(learner(recompute=on), line, [300])[:2] for on in (True, False)]
    assert found[0][0] == found[1][0]
    for name, want in found[1][1].items():
        np.testing.assert_array_equal(found[0][1][name], want, name)


@kinds
def test_everything_in_the_adapter_has_a_gradient(kind):
    _, grads, _ = walk(learner(kind), batch(learner(kind).lm), [FRAMES])
    assert all(np.isfinite(g).all() for g in grads.values())
    assert not [name for name, g in grads.items() if not np.abs(g).max() > 0]


def test_all_of_the_base_has_a_gradient_in_phase_all():
    one = learner(phase="all")
    _, grads, _ = walk(one, batch(one.lm), [FRAMES])
    base = {name for name, _ in tree_flatten(one.lm.parameters())}
    assert {name.removeprefix("base.") for name in grads if name.startswith("base.")} == base
    assert not [name for name, g in grads.items() if not np.abs(g).max() > 0]


def test_a_shut_gate_opens_first():
    lm = test_generate.build()
    adapter = add_memory(lm, KINDS["query"])
    _, grads, _ = walk(Learner(lm, adapter), batch(lm), [FRAMES])
    moving = {name.rpartition(".")[2] for name, g in grads.items() if np.abs(g).max() > 0}
    assert moving == {"gate"}


@kinds
def test_gradients_are_differences_of_the_loss(kind):
    # In float64; but MLX's exp, tanh and cos are accurate to float32 in it (2.6e-7), which leaves
    # 1e-3 of a difference over 1e-3 of losses of a few nats. Larger steps meet the limits' kinks.
    one = learner(kind, "all", double=True)
    trained(one.adapter)
    line, params = batch(one.lm, rows=1), one.parameters()
    _, grads, _ = walk(one, line, [FRAMES], params)
    names = [name for name in grads if name.startswith("memory.")]
    names += ["base.text_emb.weight", "base.transformer.layers.0.self_attn.in_proj.weight"]
    names += ["base.depformer.slices.1.linear_in.weight"]
    rng = np.random.default_rng(0)
    for name in names:
        # Uphill, where the difference is large, and somewhere else as well.
        direction = unit(unit(grads[name]) + unit(rng.standard_normal(grads[name].shape)))

        def at(step, name=name, direction=direction):
            moved = dict(tree_flatten(params))
            moved[name] = moved[name] + step * mx.array(direction, dtype=mx.float64)
            return forward(one, line, tree_unflatten(list(moved.items())))

        h = 1e-3
        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        slope = float((grads[name] * direction).sum())
        assert difference == pytest.approx(slope, rel=5e-3, abs=3e-3), name


def unit(a):
    return a / np.linalg.norm(a)


def trained(adapter):
    """Inner weights of a size at which a step of a thousandth is small."""
    mx.random.seed(5)
    for memory in adapter.memories.values():
        for name in set(memory.learner) & {"W2", "b1", "b2"}:
            shape = memory.learner[name].shape
            memory.learner[name] = (0.5 * mx.random.normal(shape)).astype(mx.float64)


def forward(learner, line, params):
    inputs, targets = loss.cut(line, learner.lm.cfg, 0, line.shape[2] - 1)
    return learner.forward(params, None, inputs, targets, learner.total(targets)).loss.item()


@kinds
def test_segments_carry_on_as_one_stream(kind):
    one = learner(kind, double=True)
    line, params = batch(one.lm), one.parameters()
    whole, *_ = walk(one, line, [FRAMES], params)
    cut, _, carried = walk(one, line, [1, 6, 9, 4], params)
    assert cut == pytest.approx(whole, abs=1e-12)
    # And as the loss of loss.py, which runs moshi_mlx's own loop over the layers.
    inputs, targets = loss.cut(line, one.lm.cfg, 0, FRAMES)
    caches = make_memory_cache(one.lm.transformer, 9, batch=2, closed_too=True)
    nll = loss.token_losses(one.lm, inputs, targets, caches)
    weights = loss.target_weights(targets, one.lm.cfg, one.weights)
    want = loss.weighted_loss(nll, weights, loss.totals(weights)).item()
    assert whole == pytest.approx(want, abs=1e-12)
    assert carried.meta[1]["tokens"] == FRAMES


def test_no_gradient_crosses_a_cut():
    """The second segment's gradient is that of a talk which begins with the carried numbers."""
    one = learner(double=True)
    line, params = batch(one.lm), one.parameters()
    first, second = loss.cut(line, one.lm.cfg, 0, 10), loss.cut(line, one.lm.cfg, 10, 20)
    carried = one.forward(params, None, *first, one.total(first[1])).carried
    plain = [
        {n: mx.array(np.array(a), dtype=a.dtype) for n, a in arrays.items()}
        for arrays in carried.arrays
    ]
    total = one.total(second[1])
    _, grads = one.gradients(params, carried, *second, total)
    _, again = one.gradients(params, carried._replace(arrays=plain), *second, total)
    for name, g in flat(grads).items():
        np.testing.assert_array_equal(g, flat(again)[name])
    # The initial weights are where a talk begins, not where its second segment does: what is left
    # of their gradient comes from the limits around them, which are not reached here.
    assert np.abs(flat(grads)["memory.layer_1.learner.W1"]).max() == 0


def test_rows_of_a_batch_are_pieces_of_one_loss():
    one = learner(double=True)
    line, params = batch(one.lm, rows=3), one.parameters()
    value, grads, _ = walk(one, line, [FRAMES], params)
    total = one.total(loss.cut(line, one.lm.cfg, 0, FRAMES)[1])
    pieces = [
        one.gradients(params, None, *loss.cut(line[rows], one.lm.cfg, 0, FRAMES), total)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert sum(p[0].loss.item() for p in pieces) == pytest.approx(value, abs=1e-12)
    summed = flat(tree_map(mx.add, pieces[0][1], pieces[1][1]))
    for name, g in grads.items():
        np.testing.assert_allclose(summed[name], g, atol=1e-12, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_frozen_base_stays_bit_for_bit_and_lets_gradients_through(bits):
    lm = test_generate.build(dim=128, depformer_dim=64)
    if bits:
        quantize(lm, bits)
    before = flat(lm.parameters())
    mx.random.seed(1)
    adapter = add_memory(lm, KINDS["query"])
    for memory in adapter.memories.values():
        memory.gate = mx.random.normal(memory.gate.shape)
    one = Learner(lm, adapter, attention=ATTENTION)
    assert not flat(lm.trainable_parameters())  # or its gradients would be taken and thrown away
    _, grads, _ = walk(one, batch(lm), [FRAMES])
    assert all(name.startswith("memory.") for name in grads)
    assert not [name for name, g in grads.items() if not np.abs(g).max() > 0]
    for name, array in flat(lm.parameters()).items():
        np.testing.assert_array_equal(array, before[name], name)


def test_quantized_gradients_are_those_of_the_same_numbers_unquantized():
    quantized = test_generate.build(dim=128, depformer_dim=64)
    quantize(quantized, 8)
    plain = test_generate.build(dim=128, depformer_dim=64)
    held = dict(quantized.named_modules())
    for name, module in plain.named_modules():
        if (other := held[name]) is not None and hasattr(other, "bits"):
            module.weight = mx.dequantize(other.weight, other.scales, other.biases, 64, 8)
    found = []
    for lm in (quantized, plain):
        mx.random.seed(1)
        adapter = add_memory(lm, KINDS["query"])
        for memory in adapter.memories.values():
            memory.gate = mx.random.normal(memory.gate.shape)
        found.append(walk(Learner(lm, adapter, attention=ATTENTION), batch(lm), [FRAMES])[1])
    for name, want in found[1].items():
        # float32 sums in another order, through two layers and 20 steps of the inner learner.
        np.testing.assert_allclose(found[0][name], want, atol=1e-4 * np.abs(want).max() + 1e-7)


def test_phase_all_refuses_a_quantized_base():
    lm = test_generate.build(dim=128, depformer_dim=64)
    quantize(lm, 4)
    with pytest.raises(UserError, match="quantized to 4 bits"):
        Learner(lm, add_memory(lm, KINDS["query"]), "all")


def test_a_model_with_cross_attention_is_refused():
    lm = test_generate.build(cross_attention=True)
    with pytest.raises(UserError, match="cross-attention"):
        Learner(lm, add_memory(lm, KINDS["query"]))


def test_a_memory_that_looks_ahead_is_refused():
    config = LegacyConfig(layers=(1,), heads=2, head_dim=16, base_lr=1.0, sizes=(16, 32, 16))
    lm = test_generate.build()
    with pytest.raises(UserError, match="again with --causal"):
        Learner(lm, add_memory(lm, config))
    lm = test_generate.build()
    Learner(lm, add_memory(lm, replace(config, causal=True)))


def test_mixed_precision_keeps_memory_and_state_in_float32():
    lm, adapter = test_memory.with_memory("query")
    lm.set_dtype(mx.bfloat16)
    one = Learner(lm, adapter, "all", ATTENTION)
    params = one.parameters()
    assert {a.dtype for _, a in tree_flatten(params)} == {mx.float32}
    inputs, targets = loss.cut(batch(lm), lm.cfg, 0, FRAMES)
    segment, grads = one.gradients(params, None, inputs, targets, one.total(targets))
    assert {a.dtype for _, a in tree_flatten(grads)} == {mx.float32}
    assert segment.loss.dtype == mx.float32
    arrays = segment.carried.arrays[1]
    memory = {name: a.dtype for name, a in arrays.items() if name.startswith("memory.")}
    assert set(memory.values()) == {mx.float32}
    assert arrays["keys"].dtype == mx.bfloat16
    assert lm.text_linear.weight.dtype == mx.bfloat16


def test_modules_hold_numbers_again_after_a_gradient():
    one = learner(phase="all")
    params = one.parameters()
    inputs, targets = loss.cut(batch(one.lm), one.lm.cfg, 0, FRAMES)
    one.gradients(params, None, inputs, targets, one.total(targets))
    for name, array in flat(one.parameters()).items():
        np.testing.assert_array_equal(array, flat(params)[name])
