"""Phrases kept for testing: their last words are no rivals just where the others were said."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_train_lately import BASE, VOCABULARY, base_learner
from test_train_run import make_trainer, shards  # noqa: F401
from test_train_segments import FRAMES, batch, to_float64, walk

from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.model import NOT_PRINTED
from moshi_ttt_mlx.train.kept import encode, left_out
from moshi_ttt_mlx.train.loss import cut, text_losses
from moshi_ttt_mlx.train.run import Run

WORDS = st.integers(4, VOCABULARY - 1)
PHRASES = st.lists(st.lists(WORDS, min_size=2, max_size=4).map(tuple), min_size=1, max_size=4)


@example([5], [(5, 4)])  # killed mlx 0.26 by a division by zero
@given(st.lists(st.integers(-1, VOCABULARY), min_size=1, max_size=30), PHRASES)
def test_what_is_left_out_is_what_a_plain_loop_finds(text, phrases):
    found = np.array(left_out(mx.array([text]), tuple(phrases), VOCABULARY))[0]
    said = []
    for frame, token in enumerate(text):
        if 0 <= token < VOCABULARY and token not in NOT_PRINTED:
            said.append(token)
        want = {p[-1] for p in phrases if tuple(said[-len(p) + 1 :]) == p[:-1]}
        assert set(np.flatnonzero(found[frame]).tolist()) == want


def test_what_is_left_out_is_not_pushed_down_and_the_target_never_is_left_out():
    lm = base_learner(0.0).lm
    to_float64(lm)
    hidden = mx.random.normal((1, 3, lm.cfg.transformer.d_model)).astype(mx.float64)
    targets = mx.full((1, 9, 3), 5)
    out = np.zeros((1, 3, lm.cfg.text_out_vocab_size), bool)
    out[0, 1, [6, 7]] = True
    out[0, 2, 5] = True
    plain, given = (text_losses(lm, hidden, targets, m) for m in (None, mx.array(out)))
    logits = np.array(lm.text_linear(hidden))[0]
    rest = np.delete(logits[1], [6, 7])
    assert given[0, 0, 1].item() == pytest.approx(np.log(np.exp(rest).sum()) - logits[1, 5])
    assert (np.array(plain)[0, 0, ::2] == np.array(given)[0, 0, ::2]).all()

    def loss(weight):
        lm.text_linear.weight = weight
        return text_losses(lm, hidden[:, 1:2], targets[:, :, 1:2], mx.array(out[:, 1:2])).sum()

    grad = np.abs(np.array(mx.grad(loss)(lm.text_linear.weight))).max(axis=1)
    assert (grad[[6, 7]] == 0).all() and (np.delete(grad, [6, 7]) > 0).all()


def test_a_learner_leaves_them_out_of_its_loss_and_only_of_text():
    learner = base_learner(0.0)
    to_float64(learner.lm)
    line = batch(learner.lm)
    _, targets = cut(line, learner.lm.cfg, 0, FRAMES)
    text = np.array(targets[0, 0])
    words = [t for t in text.tolist() if t not in NOT_PRINTED]
    # Behind its first three words any word but the right one is kept for testing.
    vocabulary = learner.lm.cfg.text_out_vocab_size
    phrases = tuple((*words[:3], last) for last in range(4, vocabulary) if last != words[3])
    plain = walk(learner, line, [FRAMES])[0]
    learner.weights = replace(learner.weights, kept=phrases)
    kept = walk(learner, line, [FRAMES])[0]
    assert kept < plain - 1e-3
    learner.weights = replace(learner.weights, kept=tuple((*p[:3], words[3]) for p in phrases))
    assert walk(learner, line, [FRAMES])[0] == pytest.approx(plain, abs=1e-12)


def test_phrases_are_words_and_what_comes_last_of_them_is_one_piece():
    pieces = {"my cat": [7, 8], "is": [9], "Bella": [10, 11]}
    assert encode(["my cat Bella", "my cat is"], pieces.get) == ((7, 8, 10), (7, 8, 9))
    with pytest.raises(UserError, match="two words or more, not 'Bella'"):
        encode(["Bella"], pieces.get)


def test_a_run_with_other_phrases_is_another_run(tmp_path, shards):  # noqa: F811
    kept = replace(BASE, kept=("my cat is Bella",), steps=1)
    list(Run(tmp_path / "run", make_trainer(shards, kept)).train())
    with pytest.raises(UserError, match="another kept"):
        Run(tmp_path / "run", make_trainer(shards, replace(kept, kept=())))
