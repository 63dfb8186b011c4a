"""Losses by position: those of training, filed where they belong; every variant is what it says."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import test_generate
from test_memory import KINDS, kinds
from test_train_loss import build, losses, talk, with_memory

from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.evaluate import nll
from moshi_ttt_mlx.evaluate.nll import (
    Reader,
    Score,
    Settings,
    choose_variants,
    evaluate,
    frames_to_read,
    position_edges,
    settings_for,
)
from moshi_ttt_mlx.evaluate.talks import find_paths, usable_talks
from moshi_ttt_mlx.layers import make_memory_cache
from moshi_ttt_mlx.legacy import LegacyConfig
from moshi_ttt_mlx.surgery import add_memory
from moshi_ttt_mlx.train import loss
from moshi_ttt_mlx.train.data import NOTHING, open_shard, write_shard

WINDOW = 9
FRAMES = 40
EDGES = [0, 9, 18, 36, 72]
# Sums of 40 losses of up to 30 nats, in float64 but for MLX's exp and log, which are float32's.
CLOSE = 1e-10


def own_talk(lm, frames=FRAMES, seed=0):
    """Undelayed codes `[S, T]`, a third of the text padding."""
    return talk(lm.cfg, frames, seed=seed)[0]


def expected(lm, codes, edges, **kwargs):
    """`Score.sums`, from the losses of the whole talk at once, the numpy way."""
    found = losses(lm, codes[None], [codes.shape[1]], **kwargs)[0]
    sums = np.zeros((len(edges) - 1, 2, 1 + len(found)))
    for bucket, (low, high) in enumerate(pairwise(edges)):
        for frame in range(low, min(high, codes.shape[1])):
            for stream, delay in enumerate([0, *lm.cfg.audio_delays[: len(found) - 1]]):
                due = codes[stream, frame - delay] if frame >= delay else NOTHING
                if due == NOTHING:
                    continue
                columns = [stream + 1] if stream else [0] if due in (0, 3) else [0, 1]
                for column in columns:
                    sums[bucket, :, column] += found[stream, frame], 1
    return sums


def read(lm, variant, codes, donor=None, segment=7, edges=EDGES, sinks=3):
    return Reader(lm, Settings(WINDOW, sinks, segment)).score(variant, codes, donor, edges).sums


# -- filed where they belong ------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [1, 5, 9, 1000])
@pytest.mark.parametrize("frames", [40, 36, 37, 9, 1])
def test_losses_are_filed_under_their_frames(segment, frames):
    lm = build()
    codes = own_talk(lm, frames)
    want = expected(lm, codes, EDGES, window=WINDOW)
    got = read(lm, "exact", codes, segment=segment)
    np.testing.assert_array_equal(got[:, 1], want[:, 1])
    np.testing.assert_allclose(got[:, 0], want[:, 0], atol=CLOSE, rtol=0)
    assert got[:, 1, 2].sum() == frames  # codebook 1 has no delay: one token a frame


@kinds
def test_with_a_memory_too(kind):
    lm, _ = with_memory(kind)
    codes = own_talk(lm)
    for variant, mode in (("on", "on"), ("frozen", "frozen")):
        want = expected(lm, codes, EDGES, window=WINDOW, mode=mode)
        for segment in (1, 7, 1000):
            got = read(lm, variant, codes, segment=segment)
            np.testing.assert_allclose(got, want, atol=CLOSE, rtol=0)


def test_what_is_no_token_counts_for_nothing():
    lm = build()
    codes = own_talk(lm)
    codes[:, 20:] = NOTHING
    codes[2, 5] = NOTHING
    want = expected(lm, codes, EDGES, window=WINDOW)
    got = read(lm, "exact", codes)
    np.testing.assert_array_equal(got[:, 1], want[:, 1])
    np.testing.assert_allclose(got[:, 0], want[:, 0], atol=CLOSE, rtol=0)
    assert got[:, 1, 0].sum() == 20
    # One frame later than codebook 1, its first frame has no token; it ends one frame later, too.
    assert got[:, 1, 3].sum() == 19


def test_before_the_window_is_full_nothing_is_cut_off():
    """What the first bucket promises, and what the second no longer can."""
    lm = build()
    codes = own_talk(lm)
    wide, narrow = (
        Reader(lm, Settings(window, 0, 7)).score("exact", codes, codes, [0, 9, 10, 64]).sums[:, 0]
        for window in (40, WINDOW)
    )
    np.testing.assert_allclose(narrow[0], wide[0], atol=CLOSE, rtol=0)
    assert np.abs(narrow[1] - wide[1]).max() > 1e-4


def test_edges():
    assert position_edges(10, 1) == [0, 10]
    assert position_edges(10, 10) == [0, 10]
    assert position_edges(10, 11) == [0, 10, 20]
    assert position_edges(10, 81) == [0, 10, 20, 40, 80, 160]


def test_guessing_costs_the_logarithm_of_the_vocabulary():
    lm = build()
    for head in (lm.text_linear, *(s.linear_out for s in lm.depformer.slices)):
        head.weight = mx.zeros_like(head.weight)
    sums = read(lm, "exact", own_talk(lm)).sum(axis=0)
    mean = sums[0] / sums[1]
    # float32's logarithm.
    np.testing.assert_allclose(mean, np.log([48, 48, 32, 32, 32, 32]), rtol=1e-6)


# -- the variants -----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("segment", [1, 7])
def test_off_is_the_window_of_a_model_without_memory_bit_for_bit(kind, segment):
    base = test_generate.build()
    codes = own_talk(base, 22)
    want = read(base, "exact", codes, segment=segment)
    with_sinks = read(base, "sinks", codes, segment=segment)
    lm = test_generate.build()
    mx.random.seed(5)
    for memory in add_memory(lm, KINDS[kind]).memories.values():
        memory.gate = mx.random.normal(memory.gate.shape)
    for variant in ("off", "exact"):
        np.testing.assert_array_equal(read(lm, variant, codes, segment=segment), want)
    np.testing.assert_array_equal(read(lm, "sinks", codes, segment=segment), with_sinks)
    assert np.abs(with_sinks - want).max() > 1e-3
    assert np.abs(read(lm, "on", codes, segment=segment) - want).max() > 1e-3


@kinds
@pytest.mark.parametrize("runs", [False, True])
def test_a_shut_memory_is_the_window_bit_for_bit(kind, runs, monkeypatch):
    lm = test_generate.build()
    codes, donor = own_talk(lm), own_talk(lm, 30, seed=1)
    want = read(lm, "exact", codes)
    # A memory with sinks of its own is shut together with them, unless it is made to run.
    add_memory(lm, replace(KINDS[kind], sinks=0))
    if runs:
        running = partial(make_memory_cache, closed_too=True)
        monkeypatch.setattr(nll, "make_memory_cache", running)
    for variant in ("on", "frozen", "shuffled"):
        np.testing.assert_array_equal(read(lm, variant, codes, donor), want)


@pytest.fixture
def caches_seen(monkeypatch):
    """All caches made, by the mode that they were made with."""
    seen = []

    def make(*args, **kwargs):
        seen.append((kwargs["mode"], make_memory_cache(*args, **kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(nll, "make_memory_cache", make)
    return seen


def test_who_learns(caches_seen):
    lm, _ = with_memory("query")
    codes, donor = own_talk(lm), own_talk(lm, 31, seed=1)
    for variant in ("on", "frozen", "shuffled"):
        read(lm, variant, codes, donor)
    learned = [(mode, caches[1].self_attn.memory.inner.tokens) for mode, caches in caches_seen]
    # `shuffled` makes two: the donor's, which learns half of it, and the reader's, which has that.
    assert learned[:2] == [("on", FRAMES), ("frozen", 0)]
    assert sorted(learned[2:]) == [("frozen", 15), ("on", 15)]


@kinds
def test_shuffled_reads_what_the_first_half_of_the_donor_left(kind):
    lm, _ = with_memory(kind)
    codes, donor = own_talk(lm), own_talk(lm, 30, seed=1)
    line = loss.delayed(donor[None], lm.cfg)
    learned = make_memory_cache(lm.transformer, WINDOW, mode="on")
    mx.eval(loss.token_losses(lm, *loss.cut(line, lm.cfg, 0, 15), learned))
    caches = make_memory_cache(lm.transformer, WINDOW, mode="frozen")
    for cache, left in zip(caches, learned, strict=True):
        if hasattr(cache.self_attn, "memory"):
            fresh = cache.self_attn.memory.tail
            cache.self_attn.memory = replace(left.self_attn.memory, mode="frozen", tail=fresh)
    line = loss.delayed(codes[None], lm.cfg)
    want = loss.token_losses(lm, *loss.cut(line, lm.cfg, 0, FRAMES), caches)
    got = read(lm, "shuffled", codes, donor)[:, 0, [0, 2, 3, 4, 5]].sum(axis=0)
    np.testing.assert_allclose(got, np.array(mx.sum(want, axis=(0, 2))), atol=CLOSE, rtol=0)


@kinds
def test_shuffled_depends_on_that_half_alone(kind):
    lm, _ = with_memory(kind)
    codes, donor = own_talk(lm), own_talk(lm, 32, seed=1)
    late, early = donor.copy(), donor.copy()
    late[:, 16:] = own_talk(lm, 16, seed=2)
    early[:, :8] = own_talk(lm, 8, seed=2)
    want = read(lm, "shuffled", codes, donor)
    np.testing.assert_array_equal(read(lm, "shuffled", codes, late), want)
    for other in (
        read(lm, "shuffled", codes, early),
        read(lm, "shuffled", codes, codes),
        read(lm, "frozen", codes),
        read(lm, "on", codes),
    ):
        assert np.abs(other - want)[:, 0].max() > 1e-4


def test_no_state_grows_with_the_talk(caches_seen):
    lm, _ = with_memory("query")
    for frames in (40, 120):
        read(lm, "on", own_talk(lm, frames), edges=position_edges(WINDOW, frames))
    sizes = [
        {name: array.shape for c in caches for name, array in c.self_attn.state.items()}
        for _, caches in caches_seen
    ]
    assert sizes[0] == sizes[1]


# -- many talks -------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Three talks of a tiny Moshi, and the codes in them."""
    lm = test_generate.build()
    codes = [own_talk(lm, frames, seed=i) for i, frames in enumerate((40, 12, 25))]
    for i, one in enumerate(codes):
        write_shard(tmp_path / f"{i}.safetensors", one, {"source": f"{i}.wav"})
    return [open_shard(path) for path in sorted(tmp_path.glob("*.safetensors"))], codes


def test_every_talk_in_every_variant(shards):
    talks, codes = shards
    lm, adapter = with_memory("query")
    settings, ticks = Settings(WINDOW, 3, 7), []
    found = evaluate(lm, adapter, talks, settings, ticks.append)
    assert found.edges == EDGES
    assert found.talks == talks
    assert found.donors == [talks[1], talks[2], talks[0]]
    assert list(found.scores) == ["exact", "sinks", "off", "on", "frozen", "shuffled"]
    assert sum(ticks) == frames_to_read(talks, list(found.scores)) == 6 * 77 + 20 + 6 + 12
    for i, one in enumerate(codes):
        donor = codes[(i + 1) % 3]
        for variant in found.scores:
            want = read(lm, variant, one, donor)
            np.testing.assert_array_equal(found.sums(variant)[i], want)
    own = np.stack([read(lm, "shuffled", one, one) for one in codes])
    assert (np.abs(found.sums("shuffled") - own).max(axis=(1, 2, 3)) > 1e-4).all()


def test_a_talk_without_a_finite_loss_counts_in_no_variant(shards, monkeypatch):
    talks, _ = shards
    lm, score = build(), Reader.score

    def breaks(self, variant, codes, donor, edges):
        got = score(self, variant, codes, donor, edges)
        return Score(got.sums * np.nan, True) if codes.shape[1] in broken else got

    monkeypatch.setattr(Reader, "score", breaks)
    broken = (12,)
    found = evaluate(lm, None, talks, Settings(WINDOW, 3, 7))
    assert found.talks == [talks[0], talks[2]]
    assert found.skipped == [(talks[1].path, "its loss is not finite in: exact, sinks")]
    broken = (12, 25, 40)
    with pytest.raises(UserError, match=r"no talk has a finite loss; 0\.wav"):
        evaluate(lm, None, talks, Settings(WINDOW, 3, 7))


def test_a_memory_that_breaks_is_told(shards):
    talks, _ = shards
    lm, adapter = with_memory("query")
    for memory in adapter.memories.values():
        memory.v_proj.weight = memory.v_proj.weight * np.nan
    found = evaluate(lm, adapter, talks, Settings(WINDOW, 3, 7))
    assert found.broken("on") == talks
    assert found.broken("frozen") == []  # it has not learned any of them
    assert found.broken("shuffled") == talks
    assert found.broken("exact") == found.broken("off") == []


def test_variants_that_do_not_apply():
    _, adapter = with_memory("query")
    assert choose_variants(adapter, Settings(9), 2)[1] == {}
    names, why = choose_variants(None, Settings(9), 2)
    assert names == ["exact", "sinks"]
    assert set(why) == {"off", "on", "frozen", "shuffled"}
    assert set(why.values()) == {"no --adapter-path"}
    names, why = choose_variants(adapter, Settings(9, sinks=0), 1)
    assert names == ["exact", "off", "on", "frozen"]
    assert why == {"sinks": "--sinks 0", "shuffled": "needs two talks"}


# -- settings ---------------------------------------------------------------------------------------


def test_the_window_is_the_adapters_then_the_models():
    lm, adapter = with_memory("query")
    assert settings_for(lm, adapter).window == 9
    assert settings_for(lm, adapter, window=20).window == 20
    assert settings_for(lm, None).window == test_generate.CONTEXT


def test_a_memory_that_looks_ahead_is_read_frame_by_frame():
    lm = test_generate.build()
    config = LegacyConfig(layers=(1,), heads=2, head_dim=16, base_lr=1.0, sizes=(16, 32, 16))
    adapter = add_memory(lm, config)
    assert settings_for(lm, adapter, segment=50).segment == 1
    for memory in adapter.memories.values():
        memory.gate = mx.ones(memory.gate.shape)
    codes = own_talk(lm, 33)  # two mini-batches of 16 and one token
    ahead, honest = (read(lm, "on", codes, segment=segment) for segment in (50, 1))
    assert np.abs(ahead - honest).max() > 1e-3  # or there would be nothing to look at
    causal = add_memory(fresh := test_generate.build(), replace(config, causal=True))
    causal.update(adapter.parameters())
    assert settings_for(fresh, causal, segment=50).segment == 50
    # In float32, sums of 33 losses of up to 30 nats.
    np.testing.assert_allclose(read(fresh, "on", codes, segment=50), honest, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"window": 41}, "made for 40 keys"),
        ({"window": 0}, "window 0"),
        ({"window": 4}, "above sinks 4"),
        ({"sinks": -1}, "sinks -1"),
        ({"segment": 0}, "segment must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, why):
    with pytest.raises(UserError, match=why):
        settings_for(build(), None, **settings)


def test_a_model_with_cross_attention_is_refused():
    lm = build()
    lm.cfg.transformer.cross_attention = True
    with pytest.raises(UserError, match="cross-attention"):
        Reader(lm, Settings(9))


# -- files ------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_named(shards, tmp_path):
    talks, codes = shards
    config = test_generate.build().cfg
    (tmp_path / "3.safetensors").write_bytes(talks[0].path.read_bytes()[:-9])
    write_shard(tmp_path / "4.safetensors", codes[0][:5], {})
    write_shard(tmp_path / "5.safetensors", codes[0] + 32, {})
    write_shard(tmp_path / "6.safetensors", codes[0][:, :0], {})
    mx.save_safetensors(str(tmp_path / "7.safetensors"), {"codes": mx.zeros((9, 4))})
    paths = find_paths([tmp_path, talks[1].path])
    assert len(paths) == 9
    usable, skipped = usable_talks(paths, config)
    assert usable == talks
    why = {path.name: reason for path, reason in skipped}
    assert set(why) == {f"{i}.safetensors" for i in (1, 3, 4, 5, 6, 7)}
    for i, reason in {1: "named twice", 3: "not a whole", 4: "5 streams", 5: "tokens that"}.items():
        assert why[f"{i}.safetensors"].startswith(reason)
    assert "empty talk" in why["6.safetensors"]
    assert "not a shard" in why["7.safetensors"]


def test_nothing_to_read(shards, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, why in (("nowhere", "does not exist"), ("empty", "holds no shards")):
        with pytest.raises(UserError, match=why):
            find_paths([tmp_path, tmp_path / source])
    (bad := tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"not one usable talk; .*bad\.safetensors: not a whole"):
        usable_talks([bad, bad], test_generate.build().cfg)
