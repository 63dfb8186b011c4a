"""The depformer of the demo's model learns alone, from what the other layers said once."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice import train_depformer
from voice.train_depformer import batches, loss, main, read_by_depformer, spoken

from moshi_ttt_mlx import load
from moshi_ttt_mlx.hub import DEMO
from moshi_ttt_mlx.layers import make_memory_cache
from moshi_ttt_mlx.train.data import write_shard
from moshi_ttt_mlx.train.loss import cut, delayed, prepare, token_losses

LENGTHS = (30, 30, 20)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    for number, frames in enumerate(LENGTHS):
        codes = rng.integers(0, 90, (17, frames)).astype(np.int32)
        codes[1, : frames // 2] = 7 + number % 2  # silence
        write_shard(tmp_path / "shards" / f"{number}.safetensors", codes, {"source": str(number)})
    return tmp_path / "shards"


def model_of(folder):
    lm = load(str(folder)).lm
    prepare(lm)
    lm.set_dtype(mx.float32)
    return lm


def losses(lm, codes):
    hidden, targets = read_by_depformer(lm, codes)
    return np.array(loss(lm, mx.array(hidden[:, None]), mx.array(targets[:, :, None])))


def test_talks_of_a_length_come_together(shards):
    assert [codes.shape for codes in batches(shards)] == [(2, 17, 30), (1, 17, 20)]


def test_its_losses_are_those_of_all_layers_at_once(shards):
    """Hidden states are kept in half precision: 11 bits of numbers that are squared nowhere."""
    lm, codes = model_of(DEMO), next(batches(shards))
    inputs, targets = cut(delayed(codes, lm.cfg), lm.cfg, 0, codes.shape[2])
    caches = make_memory_cache(lm.transformer, batch=len(codes))
    whole = np.array(token_losses(lm, inputs, targets, caches))[:, 1:]
    told = np.array(targets)[:, 1:] < 256
    np.testing.assert_allclose(losses(lm, codes), whole.sum((0, 2)) / told.sum((0, 2)), rtol=2**-9)


def test_speech_is_what_is_neither_silence_nor_left_out():
    first = np.array([-1, 3, 3, 3, 9, 4, 4, 256, 3, 5])
    assert spoken(np.stack([np.zeros(10, int), first], axis=1)).tolist() == [4, 7, 9]


def test_nothing_but_the_depformer_learns(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(train_depformer, "FRAMES", 64)
    monkeypatch.setattr(train_depformer, "WARMUP", 2)
    out, codes = tmp_path / "out", next(batches(shards))
    main([str(DEMO), str(shards), str(out), "--steps", "20"])
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (DEMO, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name]).item()}
    depformer = {name for name in before if name.startswith("depformer.")}
    assert changed == depformer
    assert {array.dtype for array in after.values()} == {mx.float16}
    assert (losses(model_of(out), codes) < 0.9 * losses(model_of(DEMO), codes)).all()
    for other in ("mimi.safetensors", "config.json", "memory/memory.safetensors"):
        assert (out / other).read_bytes() == (DEMO / other).read_bytes()
