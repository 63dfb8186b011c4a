"""The losses are those of the frame loop, and count what they should."""

import mlx.core as mx
import numpy as np
import pytest
import test_generate
import test_memory
from test_generate import greedy
from test_memory import KINDS, kinds, to_float64

from moshi_ttt_mlx import generate
from moshi_ttt_mlx.generate import FrameGenerator
from moshi_ttt_mlx.layers import make_memory_cache
from moshi_ttt_mlx.train import data, loss
from moshi_ttt_mlx.train.data import NOTHING

FRAMES = 26
# In float64, of losses up to 30 nats; the largest difference seen is 1.8e-14.
CLOSE = 1e-12


def build(**overrides):
    """A tiny Moshi in float64."""
    lm = test_generate.build(**overrides)
    to_float64(lm)
    return lm


def with_memory(kind):
    """The same with a memory that is in use."""
    lm, adapter = test_memory.with_memory(kind)
    to_float64(lm, adapter)
    return lm, adapter


def talk(cfg, frames=FRAMES, batch=1, seed=0):
    """Undelayed codes `[B, S, T]`; a third of the text is padding."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, cfg.audio_vocab_size - 1, (batch, 1 + cfg.audio_codebooks, frames))
    text = rng.integers(4, cfg.text_out_vocab_size, (batch, frames))
    codes[:, 0] = np.where(rng.random((batch, frames)) < 0.3, 3, text)
    return codes.astype(np.int32)


def losses(lm, codes, pieces, **kwargs):
    """`token_losses` of whole talks, cut into pieces of so many frames."""
    line = loss.delayed(codes, lm.cfg)
    caches = make_memory_cache(lm.transformer, batch=len(codes), **kwargs)
    out, start = [], 0
    for n in pieces:
        out.append(loss.token_losses(lm, *loss.cut(line, lm.cfg, start, start + n), caches))
        mx.eval(out[-1], [c.self_attn.state for c in caches])
        start += n
    assert start == codes.shape[2]
    return np.array(mx.concatenate(out, axis=2))


def streamed(lm, codes, monkeypatch, **kwargs):
    """The same losses from the frame loop, forced to the talk's tokens: `[B, 1 + K, T]`."""
    seen = []
    draw = generate.draw
    monkeypatch.setattr(
        generate, "draw", lambda s, logits, key: (seen.append(logits), draw(s, logits, key))[1]
    )
    talking = FrameGenerator(lm, **greedy(), batch_size=len(codes), compile=False, **kwargs)
    made, delays = lm.cfg.generated_codebooks, [0, *lm.cfg.audio_delays]
    result = np.zeros((len(codes), 1 + made, codes.shape[2]))
    for t in range(codes.shape[2]):
        # What a frame emits: of each codebook the code of `delay` frames ago.
        due = [t - delays[k] for k in range(1 + made)]
        tokens = np.stack(
            [
                codes[:, k, at] if at >= 0 else np.full(len(codes), lm.cfg.audio_padding_token)
                for k, at in enumerate(due)
            ],
            axis=1,
        )
        seen.clear()
        audio = {"audio": tokens[:, 1:]} if made else {}
        talking.step(codes[:, 1 + made :, t], text=tokens[:, :1], **audio)
        for k, logits in enumerate(seen):
            nll = mx.logsumexp(logits[:, 0], axis=-1)
            if due[k] >= 0:
                chosen = np.array(logits[:, 0])[np.arange(len(codes)), tokens[:, k]]
                result[:, k, t] = np.array(nll) - chosen
    return result


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"delays": [0, 0, 2, 2, 2, 0, 2, 2, 2]},  # hibiki's
        {"dep_q": 0, "n_q": 4, "delays": [0] * 5},  # stt's
        {"depformer_low_rank_embeddings": 8},
        {"context": 7},
    ],
)
def test_losses_are_the_frame_loops(overrides, monkeypatch):
    lm = build(**overrides)
    codes = talk(lm.cfg, batch=2)
    want = streamed(lm, codes, monkeypatch)
    got = losses(lm, codes, [FRAMES])
    assert want.std() > 0.5
    np.testing.assert_allclose(got, want, atol=CLOSE, rtol=0)


@kinds
@pytest.mark.parametrize("pieces", [[FRAMES], [1] * FRAMES, [7, 13, 6]])
def test_with_a_memory_too_however_the_talk_is_cut(kind, pieces, monkeypatch):
    lm, _ = with_memory(kind)
    codes = talk(lm.cfg)
    want = streamed(lm, codes, monkeypatch)
    np.testing.assert_allclose(losses(lm, codes, pieces), want, atol=CLOSE, rtol=0)
    off = losses(lm, codes, pieces, mode="off")
    assert np.abs(off - want).max() > 0.01  # the memory matters here


@pytest.mark.parametrize("stream", range(1, 9))
@pytest.mark.parametrize("by", [-1, 1])
def test_a_delay_off_by_one_is_seen(stream, by, monkeypatch):
    lm = build()
    codes = talk(lm.cfg)
    want = streamed(lm, codes, monkeypatch)
    wrong = list(lm.cfg.audio_delays)
    wrong[stream - 1] = max(0, wrong[stream - 1] + by)
    if wrong == lm.cfg.audio_delays:
        pytest.skip("no delay below 0")
    lm.cfg.audio_delays = wrong
    assert np.abs(losses(lm, codes, [FRAMES]) - want).max() > 0.01


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_an_unlearned_token_is_read_as_any_other_and_has_no_loss(share):
    lm, _ = with_memory("query")
    codes = talk(lm.cfg, batch=2)
    masked = np.random.default_rng(1).random(codes.shape) < share
    want = losses(lm, codes, [9, 17])
    got = losses(lm, np.where(masked, data.unlearned(codes), codes), [9, 17])
    delays = [0, *lm.cfg.audio_delays]
    for stream in range(want.shape[1]):
        left_out = np.roll(masked[:, stream], delays[stream], axis=1)
        assert (got[:, stream] == np.where(left_out, 0, want[:, stream])).all()


def test_what_is_no_token_counts_for_nothing():
    lm = build()
    codes = talk(lm.cfg, batch=2)
    codes[1, :, 20:] = NOTHING
    line = loss.delayed(codes, lm.cfg)
    _, targets = loss.cut(line, lm.cfg, 0, FRAMES)
    told = np.array(loss.counts(targets, lm.cfg))
    assert not told[:, 2:, 0].any()  # delayed codebooks have said nothing yet
    assert told[:, :2, 0].all()
    assert told[0, :, 1:].all()
    assert not told[1, :2, 20:].any()
    assert told[1, 2:, 20].all()  # the delayed last codes of the shorter talk
    assert not told[1, :, 21:].any()
    got = losses(lm, codes, [FRAMES])
    np.testing.assert_array_equal(got[~told], 0)
    # The other talk does not notice.
    np.testing.assert_allclose(got[:1], losses(lm, codes[:1], [FRAMES]), atol=CLOSE, rtol=0)


def test_weights_of_padding_and_of_the_first_codebook():
    lm = build()
    codes = talk(lm.cfg)
    codes[0, 0, :4] = [0, 3, 1, 17]
    _, targets = loss.cut(loss.delayed(codes, lm.cfg), lm.cfg, 0, FRAMES)
    weights = loss.LossWeights(text_padding=0.25, first_codebook=10)
    found = np.array(loss.target_weights(targets, lm.cfg, weights))
    np.testing.assert_array_equal(found[0, 0, :4], [0.25, 0.25, 1, 1])
    np.testing.assert_array_equal(found[0, 1], np.full(FRAMES, 10))
    np.testing.assert_array_equal(found[0, 2:, 1:], 1)
    np.testing.assert_array_equal(found[0, 2:, 0], 0)


def test_the_loss_is_two_weighted_means():
    lm = build()
    codes = talk(lm.cfg)
    _, targets = loss.cut(loss.delayed(codes, lm.cfg), lm.cfg, 0, FRAMES)
    nll = losses(lm, codes, [FRAMES])
    weights = loss.target_weights(targets, lm.cfg, loss.LossWeights())
    got = loss.weighted_loss(mx.array(nll), weights, loss.totals(weights)).item()
    padding = np.where(codes[0, 0] == 3, 0.5, 1.0)
    text = (nll[0, 0] * padding).sum() / padding.sum()
    audio = 100 * nll[0, 1].sum() + nll[0, 2:].sum()
    audio /= 100 * FRAMES + 3 * (FRAMES - 1)
    assert got == pytest.approx(text + audio, rel=1e-5)


def test_pieces_with_one_total_sum_to_the_loss_of_the_whole():
    lm = build()
    codes = talk(lm.cfg)
    line, nll = loss.delayed(codes, lm.cfg), mx.array(losses(lm, codes, [FRAMES]))
    weights = loss.target_weights(loss.cut(line, lm.cfg, 0, FRAMES)[1], lm.cfg, loss.LossWeights())
    total = loss.totals(weights)
    whole = loss.weighted_loss(nll, weights, total).item()
    parts = [slice(0, 9), slice(9, FRAMES)]
    pieces = sum(loss.weighted_loss(nll[:, :, p], weights[:, :, p], total).item() for p in parts)
    assert pieces == pytest.approx(whole, rel=1e-6)


def test_report_by_stream():
    lm = build()
    codes = talk(lm.cfg)
    _, targets = loss.cut(loss.delayed(codes, lm.cfg), lm.cfg, 0, FRAMES)
    nll = losses(lm, codes, [FRAMES])
    sums, numbers = np.array(loss.stream_sums(mx.array(nll), targets, lm.cfg))
    said = codes[0, 0] != 3
    np.testing.assert_array_equal(numbers, [FRAMES, said.sum(), FRAMES, *[FRAMES - 1] * 3])
    np.testing.assert_allclose(sums[1], nll[0, 0][said].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums[2:], nll[0, 1:].sum(axis=1), rtol=1e-5)


def test_kinds_cover_every_placement():
    assert {k.placement for k in KINDS.values()} == {"cache", "after", "replace"}
