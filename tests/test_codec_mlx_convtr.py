"""Mimi's transposed convolutions as products and an overlap-add: moshi_mlx's own layer's numbers.

Small integers make every order of summing exact, so there the two must be equal bit for bit.
"""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mimi_checkpoints import checkpoint
from mlx.utils import tree_flatten
from moshi_mlx.models.mimi import Mimi
from moshi_mlx.modules.conv import ConvTranspose1d, StreamableConvTranspose1d

from moshi_ttt_mlx.codec import small_mimi
from moshi_ttt_mlx.mimi_weights import load_mimi_weights
from moshi_ttt_mlx.mlx_codec import _ConvTranspose, _Model

RATIOS = (8, 6, 5, 4, 2)
ROUNDING = 2.0**-24
whole_numbers = np.random.default_rng(0).integers
fractions = np.random.default_rng(1).standard_normal


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    mx.set_default_device(mx.cpu)


def floats(values) -> mx.array:
    return mx.array(values, dtype=mx.float32)


def small_integers(shape) -> mx.array:
    return floats(whole_numbers(-8, 9, shape))


def fill(layer, numbers) -> None:
    """Other weights, and bias where there is one, after the layer was made."""
    layer.update({name: numbers(value.shape) for name, value in layer.parameters().items()})


def pair(ratio, bias, groups=1, kernels=2, numbers=small_integers):
    """moshi_mlx's layer and its twin, with the same weights given after they were made."""
    channels = (12, 12) if groups > 1 else (12, 7)
    theirs = ConvTranspose1d(*channels, kernels * ratio, ratio, groups=groups, bias=bias)
    ours = _ConvTranspose(theirs)
    fill(theirs, numbers)
    ours.update(theirs.parameters())
    return ours, theirs


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups, kernels", [(1, 2), (12, 2), (1, 1), (1, 3), (12, 3)])
def test_the_same_bits_where_no_sum_rounds(ratio, bias, groups, kernels):
    ours, theirs = pair(ratio, bias, groups, kernels)
    for batch, length in ((1, 1), (1, 2), (2, 9)):
        xs = small_integers((batch, 12, length))
        expected = theirs(xs)
        assert np.abs(expected).max() > 8
        assert np.array_equal(ours(xs), expected)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("groups", [1, 12])
def test_fractions_differ_by_rounding(ratio, groups):
    """An output sums 2 * 12 products and a bias, each step off by half a unit of the sum of sizes
    at most; two orders of summing are off twice that."""
    ours, theirs = pair(ratio, True, groups, numbers=lambda shape: floats(fractions(shape)))
    sizes = pair(ratio, True, groups)[1]
    sizes.update({name: mx.abs(value) for name, value in theirs.parameters().items()})
    xs = floats(fractions((1, 12, 9)))
    bound = 2 * (2 * 12 + 1) * ROUNDING * np.array(sizes(mx.abs(xs)))
    assert (np.abs(np.array(ours(xs)) - np.array(theirs(xs))) <= bound).all()


@st.composite
def cuts(draw, total=9):
    inner = draw(st.sets(st.integers(1, total - 1)))
    edges = [0, *sorted(inner), total]
    return list(pairwise(edges))


def streamable(ratio, bias, groups):
    channels = (12, 12) if groups > 1 else (12, 7)
    return StreamableConvTranspose1d(*channels, 2 * ratio, ratio, groups, bias, causal=True)


@settings(max_examples=40, deadline=None)
@given(cuts(), st.sampled_from(RATIOS), st.booleans(), st.sampled_from([1, 12]))
def test_any_chunking_streams_what_moshi_mlx_streams(pieces, ratio, bias, groups):
    """Samples and the tail that is kept (the state of a stream), bit for bit, at every step."""
    ours, theirs = streamable(ratio, bias, groups), streamable(ratio, bias, groups)
    ours.convtr.convtr, theirs.convtr.convtr = pair(ratio, bias, groups)
    xs, outs = small_integers((1, 12, 9)), []
    for start, end in pieces:
        outs.append(ours.step(xs[..., start:end]))
        assert np.array_equal(outs[-1], theirs.step(xs[..., start:end]))
        assert np.array_equal(ours._prev_ys, theirs._prev_ys)
    assert np.array_equal(mx.concatenate(outs, axis=-1), theirs(xs))


def test_mimi_has_no_other_and_the_same_parameters():
    ours, plain = _Model(small_mimi()).mimi, Mimi(small_mimi())
    assert not [m for m in ours.modules() if isinstance(m, ConvTranspose1d)]
    assert sum(isinstance(m, _ConvTranspose) for m in ours.modules()) == 5  # four ratios, upsample
    shapes = [{n: v.shape for n, v in tree_flatten(mimi.parameters())} for mimi in (ours, plain)]
    assert shapes[0] == shapes[1]


def test_loaded_weights_are_the_ones_used():
    """The decoder of a checkpoint: sound of at most 1, rounded in another order."""
    ours, plain = _Model(small_mimi()).mimi, Mimi(small_mimi())
    for mimi in (ours, plain):
        load_mimi_weights(mimi, checkpoint("small"))
    latents = floats(fractions((1, small_mimi().seanet.dimension, 6)))
    sounds = [np.array(mimi.decoder.step(mimi.upsample.step(latents))) for mimi in (ours, plain)]
    assert np.abs(sounds[1]).max() > 0.05
    np.testing.assert_allclose(*sounds, atol=1e-5 * np.abs(sounds[1]).max(), rtol=0)
