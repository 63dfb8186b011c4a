"""Means count tokens, errors count talks, and guessing has to be beaten."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import test_generate
from hypothesis import given
from hypothesis import strategies as st

from moshi_ttt_mlx.evaluate.nll import Evaluation, Score, Settings
from moshi_ttt_mlx.evaluate.report import describe, guessing, mean_and_error, stream_names, verdict
from moshi_ttt_mlx.train.data import Shard

CONFIG = test_generate.build().cfg  # 4 codebooks of 32 codes, 48 text tokens
STREAMS = 2 + 4


def evaluation(scores, frames=(30, 20, 20), edges=(0, 10, 20, 40)):
    """From losses a token by variant and talk, the same in every bucket and stream."""
    talks = [
        Shard(Path(f"{i}.safetensors"), 9, n, {"source": f"{i}.wav"}) for i, n in enumerate(frames)
    ]
    made = {}
    for name, means in scores.items():
        made[name] = [Score(sums(m, t, edges), True) for m, t in zip(means, talks, strict=True)]
    return Evaluation(Settings(10), list(edges), made, {}, talks, [*talks[1:], talks[0]])


def sums(mean, talk, edges):
    counts = np.clip(talk.frames - np.array(edges[:-1]), 0, np.diff(edges)).astype(float)
    counts = np.broadcast_to(counts[:, None], (len(counts), STREAMS))
    return np.stack([mean * counts, counts], axis=1)


def test_mean_and_error_by_hand():
    mean, error = mean_and_error(np.array([10.0, 60.0]), np.array([10.0, 20.0]))
    assert mean == pytest.approx(70 / 30)
    # Residuals 10 - 23.33 and 60 - 46.67; n/(n-1) = 2.
    assert error == pytest.approx(math.sqrt(2 * 2 * (40 / 3) ** 2) / 30)


def test_equally_long_talks_have_the_usual_standard_error():
    means = np.array([1.0, 2.0, 4.0, 4.5])
    mean, error = mean_and_error(7 * means, np.full(4, 7.0))
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / 2)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 50)), min_size=1, max_size=6))
def test_means_pool_all_tokens(talks):
    losses = np.array([loss for loss, _ in talks])
    counts = np.array([count for _, count in talks], float)
    mean, error = mean_and_error(losses * counts, counts)
    told = counts > 0
    assert (mean is None) == (not told.any())
    assert (error is None) == (told.sum() < 2)
    if mean is not None:
        pooled = np.repeat(losses, counts.astype(int))
        assert mean == pytest.approx(pooled.mean(), abs=1e-9)


def test_the_error_is_as_wide_as_means_really_spread():
    """Talks drawn anew a thousand times; talks of 50 lengths, harder where they are longer."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 100, (1000, 50)).astype(float)
    losses = 2 + counts / 100 + rng.standard_normal(counts.shape)
    found = np.array([mean_and_error(n * x, n) for n, x in zip(counts, losses, strict=True)])
    # 1000 spreads are known to 2.2 %; the estimate itself is 2 % low for 50 talks.
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.08)


def test_streams_and_positions():
    document = describe(evaluation({"exact": [1, 2, 3], "on": [1, 1, 1]}), CONFIG)
    assert document["streams"] == stream_names(CONFIG)
    assert stream_names(CONFIG) == [
        "text",
        "words",
        "codebooks",
        *(f"codebook {k}" for k in "1234"),
    ]
    assert document["positions"] == {"0-1W": [0, 10], "1-2W": [10, 20], "2-4W": [20, 40]}
    exact = document["variants"]["exact"]
    assert exact["by_position"]["0-1W"]["text"]["nll"] == pytest.approx(2)
    assert exact["by_position"]["0-1W"]["text"]["tokens"] == 30
    assert exact["by_position"]["2-4W"]["codebook 4"] == {
        "nll": pytest.approx(1), "se": None, "tokens": 10, "talks": 1
    }  # fmt: skip
    assert exact["all"]["words"]["nll"] == pytest.approx((30 + 40 + 60) / 70)
    assert exact["all"]["codebooks"]["tokens"] == 4 * 70
    assert exact["all"]["codebooks"]["nll"] == exact["all"]["codebook 2"]["nll"]
    assert [t["donor"] for t in document["talks"]] == ["1.wav", "2.wav", "0.wav"]
    json.dumps(document, allow_nan=False)


def test_differences_are_taken_talk_by_talk():
    # Talks differ by nats, the memory's help is the same in each.
    document = describe(evaluation({"exact": [1, 5, 9], "on": [0.9, 4.9, 8.9]}), CONFIG)
    entry = document["variants"]["on"]["by_position"]["0-1W"]["words"]
    assert entry["se"] > 2
    assert entry["minus_exact"] == pytest.approx(-0.1)
    assert entry["minus_exact_se"] == pytest.approx(0, abs=1e-9)
    assert "minus_exact" not in document["variants"]["exact"]["all"]["words"]


def test_a_position_that_no_talk_reaches_is_left_out():
    document = describe(evaluation({"exact": [1, 1]}, frames=(20, 8)), CONFIG)
    assert list(document["positions"]) == ["0-1W", "1-2W"]


def test_guessing_is_the_logarithm_of_the_vocabulary():
    assert guessing(CONFIG) == {
        "text": math.log(48), **{f"codebook {k}": math.log(32) for k in range(1, 5)}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "beaten"),
    [
        ([3.0, 3.0, 3.0], True),  # ln 32 is 3.466
        ([3.466, 3.466, 3.466], False),
        ([4.0, 4.0, 4.0], False),
        ([3.9, 2.0, 4.0], False),  # below on average, but not beyond doubt
    ],
)
def test_guessing_has_to_be_beaten(losses, beaten):
    document = describe(evaluation({"exact": losses, "on": [0, 0, 0]}), CONFIG)
    streams = document["baseline"]["streams"]
    assert document["baseline"]["beaten"] is beaten
    assert [streams[f"codebook {k}"]["beaten"] for k in range(1, 5)] == [beaten] * 4
    line = verdict(document)
    assert line.startswith("baseline: the model" if beaten else "NO BETTER THAN GUESSING")
    assert ("codebook 3" in line) is not beaten


def test_a_stream_without_a_token_has_beaten_nothing():
    found = evaluation({"exact": [1.0, 1.0, 1.0]})
    for score in found.scores["exact"]:
        score.sums[:, :, 3] = 0
    document = describe(found, CONFIG)
    assert document["variants"]["exact"]["all"]["codebook 2"]["nll"] is None
    assert not document["baseline"]["beaten"]
    assert "codebook 2 - of 3.466" in verdict(document)
