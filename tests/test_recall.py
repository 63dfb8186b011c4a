"""Facts past the window: the talks ask what they say they ask, and right answers are counted right."""

import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import build

from moshi_ttt_mlx.evaluate.recall import Mix, World, answers, decks, probe, talks
from moshi_ttt_mlx.layers import make_memory_cache
from moshi_ttt_mlx.memory import MemoryConfig
from moshi_ttt_mlx.surgery import add_memory

WORLD = World(keys=6, values=5, fillers=3)
KEYS = range(4, 10)
VALUES = range(10, 15)
MIX = Mix(near=(2, 9), far=(12, 20), p_near=0.5, p_fact=0.5)
seeds = st.integers(0, 10_000)


def told_last(row, place):
    """Value token last told for the key at `place`, and how far back, by looking."""
    for back in range(place - 2, -1, -1):
        if row[back] == row[place] and row[back + 1] in VALUES:
            return row[back + 1], place - back - 1
    return None


def questions(some):
    return [(b, t) for b, t in zip(*np.nonzero(some.targets >= 0), strict=True)]


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["talks", "decks", "plain", "overwritten", "noise"]))
def test_the_answer_is_the_value_told_last(seed, kind):
    rng = random.Random(seed)
    if kind == "talks":
        some = talks(rng, WORLD, 3, 60, MIX)
    elif kind == "decks":
        some = decks(rng, World(keys=9, values=5, fillers=3), 3, 60)
        return check_decks(some)
    else:
        some = probe(rng, WORLD, 3, 40, kind, facts=4)
    for b, t in questions(some):
        row = some.inputs[b]
        assert row[t] in KEYS
        assert row[t - 1] == WORLD.ask
        assert told_last(row, t) == (some.targets[b, t], some.distances[b, t])
        assert row[t + 1] == some.targets[b, t]  # the talk goes on with the right answer


def check_decks(some):
    keys, values = range(4, 13), range(13, 18)
    for b, t in questions(some):
        row, back = some.inputs[b], t - some.distances[b, t]
        assert row[t] in keys
        assert row[back - 1] == row[t]
        assert row[t + 1] == row[back] == some.targets[b, t]
        assert some.targets[b, t] in values
        assert row[t] not in row[back : t - 1]  # not told in between


def test_the_second_round_of_a_deck_is_in_another_order():
    some = decks(random.Random(0), World(), 4, 64)
    # In the same order there would be one distance for each size of a deck, 3 to 7.
    assert len(set(some.distances[some.targets >= 0])) > 5


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_talks_ask_at_the_distances_of_their_mix(seed):
    some = talks(random.Random(seed), WORLD, 2, 200, MIX)
    distances = some.distances[some.targets >= 0]
    near = (distances >= 2) & (distances <= 9)
    # A question may have to wait for the end of the one before it.
    far = (distances >= 12) & (distances <= 20 + 3 * WORLD.keys)
    late = (distances >= 2) & (distances <= 9 + 3 * WORLD.keys)
    assert (near | far | late).all()
    assert near.any()
    assert not some.far.any()


@pytest.mark.parametrize("variant", ["plain", "overwritten", "noise"])
@pytest.mark.parametrize("distance", [40, 100])
def test_a_probe_asks_each_fact_once_at_its_distance(variant, distance):
    some = probe(random.Random(3), WORLD, 5, distance, variant, facts=4)
    assert some.inputs.shape[1] % 16 == 0
    for b in range(5):
        places = np.nonzero(some.far[b])[0]
        keys = some.inputs[b, places]
        assert len(set(keys)) == len(places) == 4
        assert (some.distances[b, places] == distance).all()
        first = places.min()
        assert some.told <= first
        for place in places:
            told = place - distance
            assert told < some.told
            key = some.inputs[b, place]
            between = some.inputs[b, told + 1 : place]
            assert key not in between
            before = some.inputs[b, : told - 1]
            assert (key in before) == (variant == "overwritten")
        if variant == "noise":
            fillers = set(some.inputs[b, some.told : first - 1])
            assert fillers <= {15, 16, 17}
        asked_near = (some.targets[b] >= 0) & ~some.far[b]
        assert asked_near.any() == (variant != "noise")


def test_the_same_seed_writes_the_same_talks():
    first, again, other = (
        probe(random.Random(seed), WORLD, 2, 40, facts=4).inputs for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_facts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="12 facts do not fit into"):
        probe(random.Random(0), World(), 1, 40)


# -- counting --------------------------------------------------------------------------------------


def model(gate=1.0):
    lm = build(n_q=0, dep_q=0, delays=[0], model_type="helium", text_card=32)
    mx.random.seed(4)
    config = MemoryConfig(layers=(1,), heads=2, head_dim=8, hidden=16, mini_batch=4)
    for memory in add_memory(lm, config).memories.values():
        memory.gate = gate * mx.ones_like(memory.gate)
        memory.learner.beta = 2 * mx.random.normal(memory.learner.beta.shape)
    return lm


def said(lm, inputs, window, mode):
    caches = make_memory_cache(lm.transformer, window, batch=len(inputs), mode=mode)
    xs = lm.transformer(lm.text_emb(mx.array(inputs)), cache=caches)
    return np.array(mx.argmax(lm.text_linear(lm.out_norm(xs)), axis=-1)).astype(np.int32)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_an_answer_is_right_where_the_likeliest_next_token_is_the_value(mode, monkeypatch):
    monkeypatch.setattr("moshi_ttt_mlx.evaluate.recall.PIECE", 7)
    lm, some = model(), probe(random.Random(0), WORLD, 3, 40, facts=4)
    likeliest = said(lm, some.inputs, 20, mode)
    some = some._replace(targets=np.where(some.targets >= 0, likeliest, -1))
    some.targets[0] = np.where(some.targets[0] >= 0, (likeliest[0] + 1) % 32, -1)
    right = answers(lm, some, 20, mode)
    assert not right[0].any()
    np.testing.assert_array_equal(right[1:], some.targets[1:] >= 0)


def test_shuffled_rows_go_on_with_their_neighbours_memory():
    """Row 1 of two gets the memory of row 0: as if row 0's facts had been its own."""
    lm, some = model(gate=30.0), probe(random.Random(0), WORLD, 2, 100, facts=4)
    own, told = some.inputs.copy(), some.told
    # Attention and convolution of the second half see nothing of the first (window 1, and no tail).
    changed = own.copy()
    changed[:, :told] = own[::-1, :told]
    likeliest = said(lm, changed, 1, "on")
    asked = np.arange(own.shape[1]) >= told + 4
    some = some._replace(targets=np.where(asked, likeliest, -1))
    assert answers(lm, some, 1, shuffle=True)[:, asked].all()
    assert not answers(lm, some, 1)[:, asked].all()


def test_a_shut_gate_is_the_memory_off():
    some = probe(random.Random(0), WORLD, 3, 40, facts=4)
    shut, off = answers(model(gate=0.0), some, 20), answers(model(), some, 20, mode="off")
    np.testing.assert_array_equal(shut, off)


def test_chance_is_one_in_all_values():
    assert replace(WORLD, values=8).chance == 0.125
