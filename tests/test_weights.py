"""Weights: what moshi_mlx reads is read the same, bit for bit; what does not fit is named."""

import json
import re
import resource
import struct
import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig, config_helium_1_preview_2b, config_v0_1
from moshi_mlx.utils import Sampler

from moshi_ttt_mlx import UserError
from moshi_ttt_mlx.config import build_lm
from moshi_ttt_mlx.pytorch_weights import pytorch_shapes
from moshi_ttt_mlx.weights import (
    check_shapes,
    expected_shapes,
    load_lm_weights,
    quantize,
    read_shapes,
)

FAMILIES = {
    "moshi": tiny.moshi_config,
    "hibiki": tiny.hibiki_config,
    "stt": tiny.stt_config,
    "helium": tiny.helium_config,
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def config_of(family, bits=None, **overrides) -> dict:
    wide = {"dim": tiny.QUANTIZED_DIM[bits]} if bits else {}
    return FAMILIES[family](**wide | overrides)


def save(folder, config, name="model.safetensors", **kwargs):
    path = folder / name
    mx.save_safetensors(str(path), tiny.lm_tensors(config, **kwargs))
    return path


def ours(path, config, bits=None):
    lm = build_lm(LmConfig.from_config_dict(config), "tiny")
    load_lm_weights(lm, path, bits)
    return lm


def theirs(path, config):
    """As moshi_mlx's run_inference (MLX layout) and run_tts (PyTorch layout) load."""
    cfg = LmConfig.from_config_dict(config)
    lm = Lm(cfg)
    lm.set_dtype(mx.bfloat16)
    if path.name.endswith(".q4.safetensors"):
        nn.quantize(lm, bits=4, group_size=32)
    elif path.name.endswith(".q8.safetensors"):
        nn.quantize(lm, bits=8, group_size=64)
    if "pytorch" in path.name:
        lm.load_pytorch_weights(str(path), cfg, strict=True)
    else:
        lm.load_weights(str(path), strict=True)
    return lm


def bits_of(array):
    """The bytes of an array (bfloat16 has no numpy type)."""
    return array.dtype, array.shape, np.array(array.view(mx.uint8)).tobytes()


def assert_same_model(got, want):
    names = [[(n, type(m)) for n, m in lm.named_modules()] for lm in (got, want)]
    assert names[0] == names[1]
    a, b = (dict(tree_flatten(lm.parameters())) for lm in (got, want))
    assert a.keys() == b.keys()
    assert [n for n in a if bits_of(a[n]) != bits_of(b[n])] == []
    for one, other in zip(logits(got), logits(want), strict=True):
        assert bits_of(one) == bits_of(other)


def logits(lm):
    """Two steps of moshi_mlx's own loop: text logits and the codes that the depformer chooses."""
    user = [mx.array([[i]]) for i in range(lm.cfg.audio_codebooks)]
    out = []
    for token in (1, 7):
        _, codes, xs = lm._sample(mx.array([[token]]), user, Sampler(temp=0), Sampler(temp=0))
        out += [xs, lm.text_linear(xs), *([] if codes is None else [codes])]
    return out


# -- the same as moshi_mlx ------------------------------------------------------------------------


@EVERY_FAMILY
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("layout", ["mlx", "pytorch"])
def test_plain_files_load_as_moshi_mlx_loads_them(family, dtype, layout, tmp_path):
    config = config_of(family)
    path = save(tmp_path, config, f"{layout}.safetensors", layout=layout, dtype=dtype)
    assert_same_model(ours(path, config), theirs(path, config))


@EVERY_FAMILY
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_files_load_as_moshi_mlx_loads_them(family, bits, tmp_path):
    config = config_of(family, bits)
    path = save(tmp_path, config, f"model.q{bits}.safetensors", bits=bits, dtype=mx.bfloat16)
    assert_same_model(ours(path, config), theirs(path, config))
    assert_same_model(ours(path, config, bits), theirs(path, config))


@EVERY_FAMILY
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["mlx", "pytorch"])
def test_quantizing_on_load_makes_the_file_that_is_ready_made(family, bits, layout, tmp_path):
    config = config_of(family, bits)
    plain = save(tmp_path, config, layout=layout, dtype=mx.bfloat16)
    want = theirs(plain.rename(tmp_path / f"{layout}.safetensors"), config)
    nn.quantize(want, tiny.GROUP[bits], bits)
    assert_same_model(ours(tmp_path / f"{layout}.safetensors", config, bits), want)


def test_both_layouts_hold_the_same_model(tmp_path):
    """Independent of any loader: the helper that writes PyTorch's layout is undone by ours."""
    config = config_of("moshi")
    path = save(tmp_path, config, layout="pytorch")
    assert_same_model(ours(path, config), tiny.build_lm(config))


def test_layers_that_no_group_fits_stay_plain():
    lm = tiny.build_lm(config_of("moshi", dim=64))
    quantize(lm, 4)
    layer = lm.transformer.layers[0]
    assert isinstance(layer.gating.linear_out, nn.Linear)  # 176 wide
    assert isinstance(layer.gating.linear_in, nn.QuantizedLinear)


def test_a_low_rank_embedding_keeps_its_projection():
    """Only its projection is quantized: the table itself must stay moshi_mlx's own kind."""
    lm = tiny.build_lm(config_of("hibiki"))
    quantize(lm, 8)
    emb = lm.depformer.slices[1].emb
    assert type(emb).__name__ == "ScaledEmbedding"
    assert isinstance(emb.low_rank, nn.QuantizedLinear)


def test_bits_are_read_off_the_file_not_its_name(tmp_path):
    config = config_of("moshi", 4)
    path = save(tmp_path, config, "renamed.safetensors", bits=4)
    lm = build_lm(LmConfig.from_config_dict(config), "tiny")
    assert load_lm_weights(lm, path) == 4
    assert lm.text_linear.bits == 4 and lm.text_linear.group_size == 32


@pytest.mark.parametrize("held, asked", [(4, 8), (8, 4)])
def test_other_bits_than_the_files_are_refused(held, asked, tmp_path):
    config = config_of("helium", held)
    path = save(tmp_path, config, f"model.q{held}.safetensors", bits=held)
    with pytest.raises(UserError, match=f"holds {held} bits already .* leave out -q {asked}"):
        ours(path, config, asked)


def test_quantizing_on_load_needs_no_room_for_the_plain_model(tmp_path):
    """A 7B in bfloat16 takes 15 GB, in 4 bits 5: it must load where only the 5 fit."""
    config = config_of("helium", dim=256, num_layers=16)
    path = save(tmp_path, config)
    plain = path.stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    lm = ours(path, config, 4)
    held = sum(a.nbytes for _, a in tree_flatten(lm.parameters()))
    # Half of the plain size is far from both what is held (a sixth) and the plain model itself.
    assert held < mx.get_peak_memory() - before < plain / 2


# -- what does not fit ----------------------------------------------------------------------------


def tensors(layout, config):
    return tiny.lm_tensors(config, layout=layout)


def refusal(folder, config, tensors, bits=None):
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(UserError) as caught:
        ours(path, config, bits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@EVERY_FAMILY
@pytest.mark.parametrize("layout", ["mlx", "pytorch"])
def test_every_missing_extra_or_misshapen_tensor_is_named(family, layout, tmp_path):
    config = config_of(family)
    whole = tensors(layout, config)
    by_kind = {re.sub(r"\d+", "N", name): name for name in whole}  # one of each kind
    for name in by_kind.values():
        if name.endswith(".alpha") and len(whole) < 5:
            continue
        without = {n: a for n, a in whole.items() if n != name}
        assert f"1 tensors missing: {name}" in refusal(tmp_path, config, without)
        extra = whole | {name + ".more": whole[name]}
        assert f"1 tensors do not belong to this model: {name}.more" in refusal(
            tmp_path, config, extra
        )
        shape = [*whole[name].shape[:-1], whole[name].shape[-1] + 1]
        odd = whole | {name: mx.zeros(shape)}
        assert f"1 tensors of another shape: {name} is {shape}" in refusal(tmp_path, config, odd)


def test_what_is_wrong_with_many_tensors_is_said_in_short(tmp_path):
    config = config_of("moshi")
    whole = tensors("mlx", config)
    message = refusal(tmp_path, config, {n: a for n, a in whole.items() if "audio" not in n})
    assert message == (
        "model.safetensors: 16 tensors missing: audio_embs.0.weight, audio_embs.1.weight, "
        "audio_embs.10.weight, audio_embs.11.weight and 12 more"
    )


def quantized_tensors(**changes):
    whole = tiny.lm_tensors(config_of("helium", 4), bits=4)
    return {n: a for n, a in (whole | changes).items() if a is not None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_linear.scales": None}, "do not belong to this model: text_linear.biases"),
        ({"text_linear.biases": None}, "1 tensors missing: text_linear.biases"),
        ({"text_emb.scales": mx.zeros((65, 3))}, r"does not fit|another shape: text_emb.scales"),
        ({"text_emb.scales": mx.zeros(())}, r"does not fit|another shape: text_emb.scales"),
        ({"aaa.scales": mx.zeros((2, 2))}, r"the quantized layer aaa does not fit"),
        ({"zzz.scales": mx.zeros((2, 2))}, "do not belong to this model: zzz.scales"),
        ({"out_norm.scales": mx.zeros((2,))}, "the quantized layer out_norm does not fit"),
    ],
)
def test_a_quantized_file_that_does_not_fit_is_refused(changes, message, tmp_path):
    config = config_of("helium", 4)
    assert re.search(message, refusal(tmp_path, config, quantized_tensors(**changes)))


def test_a_quantized_file_of_another_width_is_refused(tmp_path):
    config = config_of("helium", dim=64)
    assert "is this the config of these weights?" in refusal(tmp_path, config, quantized_tensors())


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole"), config_of("helium")).read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_noticed(whole_file, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    length = data.draw(st.integers(0, len(whole_file) - 1))
    path.write_bytes(whole_file[:length])
    with pytest.raises(UserError, match=rf"not a whole safetensors file \({length:,} bytes"):
        read_shapes(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"<html>401</html>" * 4])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_shapes(path)


def test_a_pickle_is_refused_unopened(tmp_path):
    for ending in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        with pytest.raises(UserError, match="can run code when opened"):
            read_shapes(tmp_path / f"there-is-no-such-file{ending}")
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        read_shapes(tmp_path / "model.gguf")


# -- Kyutai's real sizes, without their memory ----------------------------------------------------


def transformer(prefix, layers, d, inner):
    """Names and shapes of a transformer's tensors, from Kyutai's published architecture."""
    return {
        f"{prefix}.layers.{i}.{name}.weight": shape
        for i in range(layers)
        for name, shape in {
            "norm1": (d,),
            "norm2": (d,),
            "self_attn.in_proj": (3 * d, d),
            "self_attn.out_proj": (d, d),
            "gating.linear_in": (2 * inner, d),
            "gating.linear_out": (d, inner),
        }.items()
    }


def moshiko_mlx():
    """`kyutai/moshiko-mlx-bf16`."""
    shapes = {f"audio_embs.{i}.weight": (2049, 4096) for i in range(16)}
    shapes |= transformer("transformer", 32, 4096, 11264)
    for i in range(8):
        piece = f"depformer.slices.{i}"
        shapes |= transformer(f"{piece}.transformer", 6, 1024, 2816) | {
            f"{piece}.emb.weight": (2049 if i else 32001, 1024),
            f"{piece}.linear_in.weight": (1024, 4096),
            f"{piece}.linear_out.weight": (2048, 1024),
        }
    return shapes | {
        "text_emb.weight": (32001, 4096),
        "text_linear.weight": (32000, 4096),
        "out_norm.weight": (4096,),
    }


def moshiko_pytorch():
    """`kyutai/moshiko-pytorch-bf16`: the depformer's attention stacked, its inner layers numbered."""
    shapes = {f"emb.{i}.weight": (2049, 4096) for i in range(16)}
    shapes |= {f"depformer_emb.{i}.weight": (2049, 1024) for i in range(7)}
    shapes |= {f"depformer_in.{i}.weight": (1024, 4096) for i in range(8)}
    shapes |= {f"linears.{i}.weight": (2048, 1024) for i in range(8)}
    shapes |= {"depformer_text_emb.weight": (32001, 1024), "out_norm.alpha": (1, 1, 4096)}
    shapes |= {"text_emb.weight": (32001, 4096), "text_linear.weight": (32000, 4096)}
    for prefix, layers, d, inner, chunks in (
        ("transformer", 32, 4096, 11264, None),
        ("depformer", 6, 1024, 2816, 8),
    ):
        for i in range(layers):
            layer = f"{prefix}.layers.{i}"
            stack = chunks or 1
            shapes |= {f"{layer}.norm{n}.alpha": (1, 1, d) for n in (1, 2)}
            shapes[f"{layer}.self_attn.in_proj_weight"] = (stack * 3 * d, d)
            shapes[f"{layer}.self_attn.out_proj.weight"] = (stack * d, d)
            for k in range(stack):
                gating = f"{layer}.gating.{k}" if chunks else f"{layer}.gating"
                shapes[f"{gating}.linear_in.weight"] = (2 * inner, d)
                shapes[f"{gating}.linear_out.weight"] = (d, inner)
    return shapes


def helium_mlx():
    """`kyutai/helium-1-preview-2b-mlx`."""
    return transformer("transformer", 24, 2560, 7040) | {
        "text_emb.weight": (48000, 2560),
        "text_linear.weight": (48000, 2560),
        "out_norm.weight": (2560,),
    }


def hibiki_config_2b() -> dict:
    """As hibiki's: 16 + 16 codebooks, and slices of low rank that share weights as tts has them."""
    delays = [0] + [2] * 15
    return tiny.hibiki_config(
        dim=2560,
        num_heads=20,
        num_layers=24,
        card=2048,
        text_card=48000,
        n_q=32,
        dep_q=16,
        delays=[0, *delays, *delays],
        depformer_dim=1024,
        depformer_num_heads=16,
        depformer_num_layers=6,
        depformer_dim_feedforward=4096,
        depformer_low_rank_embeddings=128,
        depformer_weights_per_step_schedule=[0, 1, 2, 3, 4, 5, 6, 7] + [8] * 8,
    )


def hibiki_mlx():
    shapes = {f"audio_embs.{i}.weight": (2049, 2560) for i in range(32)}
    shapes |= transformer("transformer", 24, 2560, 7040)
    for i in range(16):
        piece = f"depformer.slices.{i}"
        shapes |= transformer(f"{piece}.transformer", 6, 1024, 2816) | {
            f"{piece}.emb.weight": (2049 if i else 48001, 128),
            f"{piece}.emb.low_rank.weight": (1024, 128),
            f"{piece}.linear_in.weight": (1024, 2560),
            f"{piece}.linear_out.weight": (2048, 1024),
        }
    description = "condition_provider.conditioners.description"
    return shapes | {
        "text_emb.weight": (48001, 2560),
        "text_linear.weight": (48000, 2560),
        "out_norm.weight": (2560,),
        f"{description}.embed.weight": (32, 64),
        f"{description}.output_proj.weight": (2560, 64),
        f"{description}.learnt_padding": (1, 1, 2560),
    }


def parameters(shapes):
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.fixture
def no_memory():
    """The test builds models of gigabytes: it may use 300 MB for names and graphs, no more."""
    kilobytes = 1 if sys.platform == "linux" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / kilobytes < 300_000
    assert mx.get_peak_memory() - active < 10_000_000


REAL = {
    "moshiko": (config_v0_1, moshiko_mlx, 7.69e9),
    "helium": (config_helium_1_preview_2b, helium_mlx, 2.17e9),
    "hibiki": (lambda: LmConfig.from_config_dict(hibiki_config_2b()), hibiki_mlx, 3.66e9),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_name_every_tensor_of_kyutais_files(name, no_memory):
    config, want, size = REAL[name]
    shapes = want()
    assert expected_shapes(build_lm(config(), name)) == shapes
    # Moshi is published as 7.69 B parameters, helium as 2 B; hibiki's shared weights count each time.
    assert parameters(shapes) == pytest.approx(size, rel=0.01)


def test_real_pytorch_layout(no_memory):
    assert pytorch_shapes(build_lm(config_v0_1(), "moshiko")) == moshiko_pytorch()


def write_header(path, shapes, bits=None):
    """A safetensors file of full size with nothing in it but holes."""
    header, at = {}, 0
    for name, shape in shapes.items():
        pieces = {name: ("BF16", 2, shape)}
        if bits and len(shape) == 2:
            path_of = name.removesuffix(".weight")
            group = tiny.GROUP[bits]
            small = (shape[0], shape[1] // group)
            pieces = {
                name: ("U32", 4, (shape[0], shape[1] * bits // 32)),
                f"{path_of}.scales": ("BF16", 2, small),
                f"{path_of}.biases": ("BF16", 2, small),
            }
        for piece, (kind, width, dims) in pieces.items():
            size = width * int(np.prod(dims))
            header[piece] = {"dtype": kind, "shape": dims, "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.parametrize("bits, size", [(None, 15.4e9), (4, 4.8e9), (8, 8.2e9)])
def test_a_7b_file_is_judged_by_its_header(bits, size, tmp_path, no_memory):
    path = write_header(tmp_path / "model.safetensors", moshiko_mlx(), bits)
    assert path.stat().st_size == pytest.approx(size, rel=0.02)
    found = read_shapes(path)
    lm = build_lm(config_v0_1(), "moshiko")
    if bits:
        nn.quantize(lm, tiny.GROUP[bits], bits)
    check_shapes(found, expected_shapes(lm), path.name)
    with pytest.raises(UserError, match=r"tensors do not belong|is this the config"):
        load_lm_weights(build_lm(config_helium_1_preview_2b(), "helium"), path)
