"""The second loss: which words were said last, and that only what lies below learns from it."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import test_generate
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from test_train_run import SETTINGS, assert_same, make_trainer, shards, weights  # noqa: F401
from test_train_segments import FRAMES, batch, to_float64, walk

from moshi_ttt_mlx.memory import MemoryConfig
from moshi_ttt_mlx.model import NOT_PRINTED
from moshi_ttt_mlx.surgery import Adapter
from moshi_ttt_mlx.train.lately import Lately, last_said
from moshi_ttt_mlx.train.loss import LossWeights, cut
from moshi_ttt_mlx.train.run import Run
from moshi_ttt_mlx.train.segments import Attention, Learner

VOCABULARY = 9
BASE = replace(SETTINGS, phase="base", base_rate=1e-3, lately=0.5)


@given(st.lists(st.integers(-1, VOCABULARY + 1), min_size=1, max_size=30), st.integers(1, 4))
def test_the_last_words_are_those_of_a_plain_loop(text, words):
    found = np.array(last_said(mx.array([text, text[::-1]]), words, VOCABULARY))
    for row, line in zip(found, (text, text[::-1]), strict=True):
        said = []
        for frame, token in enumerate(line):
            if 0 <= token < VOCABULARY and token not in NOT_PRINTED:
                said.append(token)
            want = [*reversed(said[-words:])]
            assert row[frame].tolist() == want + [-1] * (words - len(want))


def test_the_loss_is_the_mean_over_the_words_there_were():
    mx.random.seed(3)
    head, xs = Lately(8, VOCABULARY), mx.random.normal((1, 4, 8))
    text = mx.array([[3, 5, 3, 7]])  # nothing, one word, one word, two words
    logits = np.array(head(xs), np.float64)[0]
    nll = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    want = [0, nll[1, 0, 5], nll[2, 0, 5], (nll[3, 0, 7] + nll[3, 1, 5]) / 2]
    np.testing.assert_allclose(np.array(head.losses(xs, text))[0], want, rtol=1e-5)


def base_learner(lately):
    lm = test_generate.build(num_layers=3)
    mx.random.seed(2)
    nothing = Adapter(MemoryConfig(layers=(1,)), {})
    return Learner(lm, nothing, "base", Attention(9), LossWeights(lately=lately))


def gradients(lately):
    learner = base_learner(lately)
    to_float64(learner.lm, *([learner.lately] if lately else []))
    return walk(learner, batch(learner.lm), [FRAMES])[1]


def test_only_the_lower_half_learns_from_it():
    plain, with_it = gradients(0.0), gradients(0.5)
    moved = {n for n in plain if not np.allclose(plain[n], with_it[n], rtol=1e-9, atol=1e-12)}
    # Of three layers the first is the lower half; what is above has no part in it.
    below = [n for n in plain if "transformer.layers.0." in n and "depformer" not in n]
    assert set(below) <= moved
    assert not [n for n in moved if "depformer" in n or "layers.1." in n or "layers.2." in n]
    assert np.abs(with_it["lately.head.weight"]).max() > 0 and "lately.head.weight" not in plain


def test_passes_over_some_rows_add_up_to_all_rows():
    learner = base_learner(0.5)
    to_float64(learner.lm, learner.lately)
    line = batch(learner.lm, rows=4)
    value, grads, _ = walk(learner, line, [FRAMES])
    params, parts = learner.parameters(), []
    total = learner.total(cut(line, learner.lm.cfg, 0, FRAMES)[1])
    for rows in (line[:1], line[1:]):
        some = cut(rows, learner.lm.cfg, 0, FRAMES)
        parts.append(learner.gradients(params, None, *some, total))
    # In float64, but MLX's exp is accurate to float32 in it (2.6e-7).
    assert sum(part.loss.item() for part, _ in parts) == pytest.approx(value, rel=1e-6)
    for name, want in grads.items():
        some = [dict(tree_flatten(part))[name] for _, part in parts]
        # Below the head attention has sums in float32 whatever its input: 8e-6 of the largest entry with
        # OpenBLAS, and as much without this loss.
        scale = 5e-5 * np.abs(want).max() if name.startswith("base.") else 0
        np.testing.assert_allclose(
            np.array(some[0] + some[1]), want, rtol=1e-5, atol=max(scale, 1e-6), err_msg=name
        )


def test_a_base_resumes_with_the_same_bits_and_leaves_the_head_behind(tmp_path, shards):  # noqa: F811
    def trainer():
        return make_trainer(shards, BASE)

    whole = Run(tmp_path / "whole", trainer())
    list(whole.train())
    first = Run(tmp_path / "cut", trainer(), save_every=3)
    list(first.train(stop=lambda: first.trainer.step == 5))
    second = Run(tmp_path / "cut", trainer())
    assert second.trainer.step == 5
    list(second.train())
    assert_same(weights(second.trainer), weights(whole.trainer))
    saved = mx.load(str(tmp_path / "cut" / "last" / "model.safetensors"))
    assert {name for name in saved if "lately" in name} == set()
    assert not np.array_equal(
        weights(whole.trainer)["lately.head.weight"],
        weights(trainer())["lately.head.weight"],
    )
