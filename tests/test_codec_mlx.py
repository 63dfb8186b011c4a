"""Mimi on MLX: any split gives the same, it equals rustymimi, its state is all there is."""

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mimi_checkpoints import FRAME, checkpoint, sound
from mlx.utils import tree_flatten
from moshi_mlx.models.mimi import Mimi, mimi_202407
from moshi_mlx.modules.seanet import StreamingAdd

from moshi_ttt_mlx.codec import (
    mimi_config_from_dict,
    mimi_config_to_dict,
    open_codec,
    small_mimi,
)
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.mimi_weights import kyutai_layout, load_mimi_weights
from moshi_ttt_mlx.mlx_codec import MlxCodec

# Other shapes of matrix product round differently; latents and samples here are at most about 4.
SPLIT_TOLERANCE = 2e-5
FRAMES = 16


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    mx.set_default_device(mx.cpu)


def short_window(num_codebooks=8):
    """The small Mimi with a window of 4 frames: 16 frames wrap it several times."""
    config = small_mimi(num_codebooks)
    return replace(config, transformer=replace(config.transformer, context=8))


@pytest.fixture(scope="module")
def codec():
    return MlxCodec.open(checkpoint("small"), 8, short_window())


def run(codec, pcm):
    codes = np.stack([codec.encode(frame) for frame in pcm])
    return codes, np.stack([codec.decode(frame) for frame in codes])


def latents(codec, pcm, sizes):
    """What the quantizer sees, `[D, frames]`, with `sizes` frames in each call."""
    model, stream, outs, at = codec._model, codec._model.into.new_stream(), [], 0
    for size in sizes:
        xs = mx.array(pcm[at : at + size].reshape(1, 1, -1))
        outs.append(model.into.run(stream, lambda xs=xs: model.latents(stream, xs), size))
        at += size
    return np.concatenate([np.array(out)[0] for out in outs], axis=1)


@st.composite
def splits(draw, total=FRAMES):
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


@settings(max_examples=25, deadline=None)
@given(splits())
def test_any_split_encodes_the_same(codec, sizes):
    pcm = sound(FRAMES)
    whole = latents(codec, pcm, [FRAMES])
    assert np.abs(whole).max() > 0.3
    np.testing.assert_allclose(latents(codec, pcm, sizes), whole, atol=SPLIT_TOLERANCE, rtol=0)


@settings(max_examples=25, deadline=None)
@given(splits())
def test_any_split_decodes_the_same(codec, sizes):
    codes = np.random.default_rng(2).integers(0, 256, (8, FRAMES))
    whole = codec.fresh().decode_block(codes)
    assert whole.std() > 0.01
    stream, at, outs = codec.fresh(), 0, []
    for size in sizes:
        outs.append(stream.decode_block(codes[:, at : at + size]))
        at += size
    np.testing.assert_allclose(np.concatenate(outs), whole, atol=SPLIT_TOLERANCE, rtol=0)


def test_frames_and_blocks_give_the_same_codes(codec):
    pcm, stream = sound(FRAMES), codec.fresh()
    one_by_one = np.stack([stream.encode(frame) for frame in pcm], axis=1)
    assert np.array_equal(codec.fresh().encode_block(pcm.ravel()), one_by_one)
    assert all(len(set(book)) > 4 for book in one_by_one)


def test_the_window_ends(codec):
    """Two transformer layers of 4 frames' window, and convolutions, look back 12 frames at most."""
    pcm = sound(28)
    other = np.concatenate([sound(8, seed=5) + 0.1, pcm[8:]])
    a, b = latents(codec, pcm, [1] * 28), latents(codec, other, [1] * 28)
    assert np.abs(a - b)[:, 9].max() > 1e-3
    np.testing.assert_allclose(a[:, 20:], b[:, 20:], atol=SPLIT_TOLERANCE, rtol=0)


# -- the same as rustymimi ------------------------------------------------------------------------

needs_rustymimi = pytest.mark.skipif(
    importlib.util.find_spec("rustymimi") is None, reason="rustymimi has no wheel for this Python"
)


def test_without_rustymimi_mlx_runs_kyutais_mimi(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert open_codec(checkpoint("kyutai")).name == "mlx"
    with pytest.raises(UserError, match="rustymimi is not installed"):
        open_codec(checkpoint("kyutai"), backend="rustymimi")


@pytest.fixture(scope="module")
def kyutai():
    return open_codec(checkpoint("kyutai"), backend="mlx")


@needs_rustymimi
def test_equals_rustymimi(kyutai):
    """Float32 rounding in two programs: the sound is at most 1 loud, its error at most 1e-5.
    Codes are an argmin, so a near-tie may fall to the other side: one in a hundred is allowed."""
    rusty, pcm = open_codec(checkpoint("kyutai")), sound(8)
    rusty_codes, rusty_samples = run(rusty, pcm)
    mlx = kyutai.fresh()
    codes = np.stack([mlx.encode(frame) for frame in pcm])
    samples = np.stack([mlx.decode(frame) for frame in rusty_codes])
    assert codes.dtype == rusty_codes.dtype and samples.dtype == rusty_samples.dtype
    assert (codes == rusty_codes).mean() >= 0.99
    np.testing.assert_allclose(samples, rusty_samples, atol=1e-5, rtol=0)


@needs_rustymimi
@pytest.mark.slow
def test_equals_rustymimi_past_the_window(kyutai):
    """Past frame 125 a window of one key more or less is off by 4e-4, forty times the tolerance."""
    codes = np.random.default_rng(1).integers(0, 2048, (132, 8), dtype=np.int32)
    rusty = open_codec(checkpoint("kyutai"))
    expected = np.concatenate([rusty.decode(frame) for frame in codes])
    samples = kyutai.fresh().decode_block(codes.T)
    np.testing.assert_allclose(samples, expected, atol=1e-5, rtol=0)


def test_the_gelu_is_the_exact_one(codec):
    """Against float64; moshi_mlx's tanh form is off by up to 5e-4 before the second matrix."""
    mlp = codec._model.mimi.encoder_transformer.transformer.layers[0].gating
    xs = np.random.default_rng(7).standard_normal((4, 64))
    first, second = (np.array(m.weight, np.float64) for m in (mlp.linear1, mlp.linear2))
    hidden = xs @ first.T
    exact = hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
    got = np.array(mlp(mx.array(xs, dtype=mx.float32)))
    np.testing.assert_allclose(got, exact @ second.T, atol=5e-6, rtol=0)


# -- state ----------------------------------------------------------------------------------------


def test_reset_equals_fresh(codec):
    pcm, stream = sound(6), codec.fresh()
    expected = run(codec.fresh(), pcm)
    run(stream, sound(7, seed=1))
    stream.reset()
    for got, wanted in zip(run(stream, pcm), expected, strict=True):
        assert np.array_equal(got, wanted)


def test_streams_share_weights_and_nothing_else(codec):
    pcm, noise = sound(6), sound(6, seed=1)
    expected = run(codec.fresh(), pcm)
    a, b = codec.fresh(), codec.fresh()
    assert a._model is b._model
    codes, samples = [], []
    for frame, other in zip(pcm, noise, strict=True):
        b.decode(b.encode(other))
        codes.append(a.encode(frame))
        b.encode(other)
        samples.append(a.decode(codes[-1]))
    assert np.array_equal(np.stack(codes), expected[0])
    assert np.array_equal(np.stack(samples), expected[1])


@settings(max_examples=12, deadline=None)
@given(at=st.integers(0, FRAMES - 1), ahead=st.integers(0, 3))
def test_resumed_equals_uninterrupted(codec, at, ahead):
    """At any frame, encoding up to 3 frames ahead of decoding, saved and read as files are."""
    pcm, stream = sound(FRAMES + 6), codec.fresh()
    codes = [stream.encode(frame) for frame in pcm[: at + ahead]]
    for frame in codes[:at]:
        stream.decode(frame)
    arrays, meta = stream.state()
    assert all(isinstance(value, str) for value in meta.values())
    assert all(isinstance(value, np.ndarray) and value.size for value in arrays.values())
    arrays = {name: value.copy() for name, value in arrays.items()}
    resumed = codec.fresh()
    run(resumed, sound(2, seed=3))
    resumed.load_state(arrays, meta)
    for frame in pcm[at + ahead : at + ahead + 3]:
        code = stream.encode(frame)
        assert np.array_equal(resumed.encode(frame), code)
        assert np.array_equal(resumed.decode(code), stream.decode(code))


def test_skip_connections_keep_nothing_between_frames(codec):
    """moshi_mlx's `StreamingAdd` has state too, which its reset misses; here it is never used."""
    stream = codec.fresh()
    run(stream, sound(2))
    adds = [m for m in codec._model.mimi.modules() if isinstance(m, StreamingAdd)]
    assert adds and all(add._lhs is None and add._rhs is None for add in adds)


def test_a_state_does_not_change_afterwards(codec):
    stream = codec.fresh()
    run(stream, sound(12))
    arrays, _ = stream.state()
    before = {name: value.copy() for name, value in arrays.items()}
    run(stream, sound(5))
    assert all(np.array_equal(before[name], arrays[name]) for name in before)


def test_memory_is_flat():
    """State and MLX's live memory from frame 20 on (the window is full at 5) and up to frame 120.

    In a process of its own: in this one, threads of earlier tests come and go with their memory. The
    least of 20 readings: a thread of MLX's may still hold some kB of the frame before. What may be left
    is less than one frame of sound, where a hundred went through.
    """
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_codec_mlx import *
mx.set_default_device(mx.cpu)
stream = MlxCodec.open(checkpoint("small"), 8, short_window()).fresh()
for frame in sound(120):
    stream.decode(stream.encode(frame))
    print(sum(array.nbytes for array in stream.state()[0].values()), mx.get_active_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    states, live = np.array([line.split() for line in done.stdout.splitlines()], int).T
    assert len(states) == 120
    assert states[19] == states[-1]
    assert live[-20:].min() <= live[19:39].min() + sound(1)[0].nbytes


def test_a_state_of_another_codec(codec):
    arrays, meta = codec.fresh().state()
    for key in ("backend", "weights", "num_codebooks"):
        with pytest.raises(UserError, match=key):
            codec.fresh().load_state(arrays, meta | {key: "other"})


# -- codebooks, frames, files ---------------------------------------------------------------------


@pytest.mark.parametrize("fewer", [1, 2, 5])
def test_fewer_codebooks(codec, fewer):
    """A codec of 8 decodes the first ones like a codec of that many."""
    codes = np.random.default_rng(4).integers(0, 256, (3, fewer))
    small = MlxCodec.open(checkpoint("small"), fewer, short_window())
    stream = codec.fresh()
    for frame in codes:
        assert np.array_equal(stream.decode(frame), small.decode(frame))
    pcm = sound(3)
    first = np.stack([stream.encode(frame)[:fewer] for frame in pcm])
    assert np.array_equal(np.stack([small.encode(frame) for frame in pcm]), first)


def test_frames_of_a_wrong_shape(codec):
    with pytest.raises(ValueError, match="one frame"):
        codec.encode(np.zeros(FRAME + 1, np.float32))
    with pytest.raises(ValueError, match="whole frames"):
        codec.encode_block(np.zeros(FRAME + 1, np.float32))
    for codes in (np.zeros(9, np.int32), np.zeros((8, 1), np.int32), np.zeros(0, np.int32)):
        with pytest.raises(ValueError, match="1 to 8 codes"):
            codec.decode(codes)
    with pytest.raises(ValueError, match=r"0\.\.255"):
        codec.decode(np.full(8, 256))


def test_a_small_config_opens_on_mlx():
    codec = open_codec(checkpoint("small"), 4, config=small_mimi())
    assert (codec.name, codec.num_codebooks, codec.frame_size) == ("mlx", 4, FRAME)
    assert codec.encode(sound(1)[0]).shape == (4,)


def test_weights_are_read_like_moshi_mlx_reads_them():
    ours, theirs = Mimi(small_mimi()), Mimi(small_mimi())
    load_mimi_weights(ours, checkpoint("small"))
    theirs.load_pytorch_weights(str(checkpoint("small")))
    expected = dict(tree_flatten(theirs.parameters()))
    found = dict(tree_flatten(ours.parameters()))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    codes = mx.random.randint(0, 256, (1, 8, 3))
    assert np.array_equal(ours.decode(codes), theirs.decode(codes))  # derived tables too


def test_weights_of_other_depths_have_their_own_names():
    """Two residual blocks and three ratios: flat numbers as Kyutai's code counts them."""
    config = mimi_config_to_dict(small_mimi())
    config["seanet"] |= {"nresidual_layers": 2, "ratios": [8, 6, 5]}
    layout = kyutai_layout(Mimi(mimi_config_from_dict(config | {"frame_rate": 50.0})))
    assert layout["encoder.model.2.block.3.conv.conv.weight"].shape == (8, 4, 1)
    assert layout["encoder.model.4.conv.conv.weight"].shape == (16, 8, 10)
    assert layout["encoder.model.14.conv.conv.weight"].shape == (64, 64, 3)
    assert layout["decoder.model.2.convtr.convtr.weight"].shape == (64, 32, 16)
    assert layout["decoder.model.4.block.1.conv.conv.weight"].shape == (16, 32, 3)
    assert layout["decoder.model.14.conv.conv.weight"].shape == (1, 8, 3)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            lambda w: w.pop("upsample.convtr.convtr.convtr.weight"),
            "1 tensors missing: upsample.convtr",
        ),
        (lambda w: w.update(surplus=mx.zeros(3)), "do not belong to this model: surplus"),
        (
            lambda w: w.update({"decoder.model.14.conv.conv.bias": mx.zeros(2)}),
            r"decoder.model.14.conv.conv.bias is \[2\], expected \[1\]",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, complaint):
    weights = mx.load(str(checkpoint("small")))
    change(weights)
    path = tmp_path / "wrong.safetensors"
    mx.save_safetensors(str(path), weights)
    with pytest.raises(UserError, match=complaint):
        MlxCodec.open(path, 8, small_mimi())


def test_broken_files(tmp_path):
    whole = checkpoint("small").read_bytes()
    for name, content in {"cut": whole[:-1000], "noise": b"not a safetensors file"}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            MlxCodec.open(path, 8, small_mimi())
    with pytest.raises(UserError, match="no file"):
        MlxCodec.open(tmp_path / "absent.safetensors", 8, small_mimi())
    with pytest.raises(UserError, match="120 tensors missing"):
        MlxCodec.open(checkpoint("small"), 8, mimi_202407(8))


def test_configs_as_dicts():
    config = mimi_202407(8)
    as_dict = mimi_config_to_dict(config)
    assert mimi_config_from_dict(as_dict) == config
    as_dict["seanet"]["nfilter"] = as_dict["seanet"].pop("nfilters")
    with pytest.raises(UserError, match=r"seanet: missing \['nfilters'\], unknown \['nfilter'\]"):
        mimi_config_from_dict(as_dict)


# -- upstream: fails when moshi_mlx's Mimi gets a mask, and then `mlx_codec.py` can shrink --------


def test_upstream_frames_differ_from_half_frames():
    """moshi_mlx attends without a mask: a step sees the later one of its own call."""
    mimi = Mimi(small_mimi())
    mimi.load_pytorch_weights(str(checkpoint("small")))
    pcm = mx.array(sound(4).reshape(1, 1, -1))

    def latents(samples):
        mimi.reset_all()
        caches, outs = mimi.encoder_transformer.make_cache(), []
        for at in range(0, pcm.shape[-1], samples):
            xs = mimi.encoder.step(pcm[..., at : at + samples])
            outs.append(mimi.encoder_transformer(xs, cache=caches)[0])
        return mx.concatenate(outs, axis=-1)

    pairs, singles = latents(FRAME), latents(FRAME // 2)
    assert mx.abs(pairs - singles).max().item() > 100 * SPLIT_TOLERANCE
