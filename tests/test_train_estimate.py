"""The estimate beside what the same training takes on this machine."""

import mlx.core as mx
import pytest
import test_generate
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig
from test_train_loss import talk

from moshi_ttt_mlx.memory import MemoryConfig
from moshi_ttt_mlx.surgery import add_memory
from moshi_ttt_mlx.train import loss
from moshi_ttt_mlx.train.estimate import base_bytes, estimate, of_model
from moshi_ttt_mlx.train.segments import Attention, Learner
from moshi_ttt_mlx.train.trainer import Settings
from moshi_ttt_mlx.weights import quantize


def build(**overrides):
    """An `Lm` of tiny Moshi's kind with a longer context."""
    config = test_generate.config(dim=256, num_heads=4, num_layers=4, context=2000)
    lm = Lm(LmConfig.from_config_dict(config | overrides))
    mx.eval(lm.parameters())
    return lm


def nbytes(tree):
    return sum(array.nbytes for _, array in tree_flatten(tree))


def measured(lm, adapter, settings):
    """Bytes that one update's gradients take beside weights, moments and the state before."""
    learner = Learner(lm, adapter, "memory", Attention(settings.window), recompute=True)
    frames, params = settings.segment, learner.parameters()
    line = loss.delayed(talk(lm.cfg, 2 * frames, settings.batch), lm.cfg)
    first, second = loss.cut(line, lm.cfg, 0, frames), loss.cut(line, lm.cfg, frames, 2 * frames)
    carried = learner.forward(params, None, *first, learner.total(first[1])).carried
    total = learner.total(second[1])
    mx.eval(carried.arrays, second, total)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    segment, grads = learner.gradients(params, carried, *second, total)
    mx.eval(segment.loss, segment.carried.arrays, grads)
    return mx.get_peak_memory() - before, carried


SHAPES = {
    "usual": ({}, {}),
    "long": ({}, {"segment": 160}),
    "wide": ({"dim": 512}, {}),
    "window": ({}, {"window": 200, "segment": 128}),
    "batch": ({}, {"batch": 2}),
    "bfloat16": ({}, {"segment": 96}),
    "heads": ({"num_heads": 8}, {"segment": 96, "window": 48}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_within_30_percent_of_what_is_taken(name):
    overrides, changes = SHAPES[name]
    settings = Settings(**{"segment": 64, "window": 64} | changes)
    lm = build(**overrides)
    if name == "bfloat16":
        lm.set_dtype(mx.bfloat16)
    memory = MemoryConfig(layers="top:2")
    adapter = add_memory(lm, memory)
    mx.eval(adapter.parameters())
    parts = estimate(*of_model(lm, memory, settings))
    taken, carried = measured(lm, adapter, settings)
    weights, state = nbytes(adapter.parameters()), nbytes(carried.arrays)
    # Weights and two moments are there before the update, and so is the state that it begins with.
    foreseen = sum(parts.values()) - parts["base"] - 3 * weights - state
    assert parts["base"] == nbytes(lm.parameters())
    assert parts["memory, its gradients and moments"] == 4 * weights
    assert foreseen == pytest.approx(taken, rel=0.3)


def test_what_is_carried_is_exact():
    settings = Settings(segment=64, window=64)
    lm = build()
    memory = MemoryConfig(layers="top:2", window=48)
    adapter = add_memory(lm, memory)
    _, carried = measured(lm, adapter, settings)
    parts = estimate(*of_model(lm, memory, settings))
    # Its own state and the one that replaces it.
    assert parts["keys and values, memory's state"] == 2 * nbytes(carried.arrays)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_bytes_of_a_base_are_exact(bits):
    lm = build()
    lm.set_dtype(mx.bfloat16)
    foreseen = base_bytes(lm, bits, 2)
    if bits:
        quantize(lm, bits)
    assert foreseen == nbytes(lm.parameters())


def test_what_costs_more_is_foreseen_to_cost_more():
    cfg, memory = build().cfg, MemoryConfig(layers="top:2")
    usual = Settings(segment=64, window=64, batch=2)

    def all_of(memory=memory, **changes):
        return sum(estimate(cfg, memory, Settings(**vars(usual) | changes)).values())

    assert all_of() < all_of(segment=128)
    assert all_of() < all_of(window=128)
    assert all_of() < all_of(MemoryConfig(layers="top:4"))
    assert all_of() < all_of(recompute=False)
    assert all_of() < all_of(phase="all")
    assert all_of() > all_of(micro_batch=1)
