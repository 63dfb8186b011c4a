"""LoRA merged into a base: the sum is the sum, wherever PyTorch's names put it.

The expected weights come by another way than the merge's: whole deltas `scaling * B @ A` are made in
numpy, laid out as a PyTorch checkpoint, and renamed by moshi_mlx's own `load_pytorch_weights`.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig
from test_generate import codes
from tiny import (
    hibiki_config,
    lm_tensors,
    moshi_config,
    stt_config,
    tiny_hibiki,
    tiny_moshi,
    tiny_stt,
)

from moshi_ttt_mlx import Session, load
from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.config import build_lm
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.lora import merge_lora
from moshi_ttt_mlx.weights import load_lm_weights

RANK, SCALING = 3, 2.5
FAMILIES = {
    "moshi": (tiny_moshi, moshi_config),
    "hibiki": (tiny_hibiki, hibiki_config),  # slices that share weights, low-rank embeddings
    "stt": (tiny_stt, stt_config),
}
families = pytest.mark.parametrize("family", FAMILIES)


def factors(config, style="numbered", scale=0.3):
    """LoRA of every linear layer by PyTorch's names, and what it adds to the whole checkpoint."""
    steps = _steps(config)
    plain = lm_tensors(config, layout="pytorch")
    rng, lora = np.random.default_rng(4), {}
    delta = {name: np.zeros(a.shape, np.float32) for name, a in plain.items()}

    def add(target, rows, columns):
        pair = {
            f"{target}.lora_A.weight": rng.standard_normal((RANK, columns)).astype(np.float32),
            f"{target}.lora_B.weight": rng.standard_normal((rows, RANK)).astype(np.float32) * scale,
        }
        lora.update(pair)
        a, b = pair.values()
        return SCALING * b.astype(np.float64) @ a.astype(np.float64)

    for name, array in plain.items():
        if array.ndim != 2 or ".norm" in name or "emb" in name.split(".weight")[0].split(".")[0]:
            continue
        owner, _, part = name.rpartition(".self_attn.")
        if not owner:
            delta[name] = add(name.removesuffix(".weight"), *array.shape)
            continue
        count = steps if name.startswith("depformer.") else 1
        which = "in" if part.startswith("in") else "out"
        rows = array.shape[0] // count
        targets = [f"{owner}.self_attn.{which}_projs.{i}" for i in range(count)]
        delta[name] = np.concatenate([add(t, rows, array.shape[1]) for t in targets])
        if style == "stacked":
            for x in "AB":
                parts = [lora.pop(f"{t}.lora_{x}.weight") for t in targets]
                stacked = f"{owner}.self_attn.{which}_proj.lora_{x}.weight"
                lora[stacked] = np.concatenate(parts)
    return lora, delta


def _steps(config):
    schedule = config.get("depformer_weights_per_step_schedule")
    return max(schedule) + 1 if schedule else max(config["dep_q"], 1)


def in_mlx(config, delta, tmp_path):
    """The deltas by MLX's names, renamed by moshi_mlx."""
    path = tmp_path / "delta.safetensors"
    mx.save_safetensors(str(path), {n: mx.array(a.astype(np.float32)) for n, a in delta.items()})
    lm = Lm(LmConfig.from_config_dict(config))
    lm.load_pytorch_weights(str(path), lm.cfg, strict=True)
    return {n: np.array(a) for n, a in tree_flatten(lm.parameters())}


def write_lora(tmp_path, lora, **configs):
    folder = tmp_path / "lora"
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "lora.safetensors"), {n: mx.array(a) for n, a in lora.items()})
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder / "lora.safetensors"


def read(folder):
    """The weights of a model folder, through the loader."""
    config = json.loads((folder / "config.json").read_text())
    lm = build_lm(LmConfig.from_config_dict(config), "test")
    load_lm_weights(lm, folder / config["moshi_name"])
    return lm


def weights(lm):
    return {n: np.array(a.astype(mx.float32)) for n, a in tree_flatten(lm.parameters())}


@families
@pytest.mark.parametrize("layout", ["mlx", "pytorch"])
@pytest.mark.parametrize("style", ["numbered", "stacked"])
def test_every_weight_is_the_base_and_its_factors_product(family, layout, style, tmp_path):
    write, make_config = FAMILIES[family]
    base = write(tmp_path / "base", layout=layout)
    lora, delta = factors(make_config(), style)
    count = merge_lora(str(base), write_lora(tmp_path, lora), tmp_path / "out", SCALING)
    before, after = weights(read(base)), weights(read(tmp_path / "out"))
    added = in_mlx(make_config(), delta, tmp_path)
    changed = [n for n in after if np.abs(added[n]).max() > 0]
    assert count == len(changed) > 10
    for name, weight in after.items():
        # One rounding of float32: of the product, then of the sum.
        np.testing.assert_allclose(weight, before[name] + added[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_quantized_again_as_it_was(bits, dtype, tmp_path):
    base = tiny_moshi(tmp_path / "base", bits=bits, dtype=dtype)
    config = json.loads((base / "config.json").read_text())
    lora, delta = factors(config, scale=0.1)
    merge_lora(str(base), write_lora(tmp_path, lora), tmp_path / "out", SCALING)
    added = in_mlx(config, delta, tmp_path)
    assert (tmp_path / "out" / f"model.q{bits}.safetensors").is_file()
    before, after = (dict(read(folder).named_modules()) for folder in (base, tmp_path / "out"))
    quantized = [path for path, module in after.items() if "scales" in module]
    assert len(quantized) > 10
    for path in quantized:
        old, new = before[path], after[path]
        assert (new.bits, new.group_size) == (old.bits, old.group_size)
        assert new["scales"].dtype == old["scales"].dtype == dtype
        goal = dense(old) + mx.array(added[f"{path}.weight"])
        step = np.repeat(
            np.abs(np.array(new["scales"].astype(mx.float32))), new.group_size, axis=-1
        )
        off = np.abs(np.array(dense(new) - goal))
        # A step of the grid. bfloat16 holds goal, scales and biases to 8 bits of the largest entry.
        coarse = 1e-6 if dtype == mx.float32 else np.abs(np.array(goal)).max() / 64
        assert (off <= step + coarse).all(), path


def dense(module):
    parts = (module[name].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(module["weight"], *parts, module.group_size, module.bits)


def test_what_is_not_touched_stays_bit_for_bit(tmp_path):
    base = tiny_moshi(tmp_path / "base", bits=4)
    lora = {
        "transformer.layers.1.gating.linear_out.lora_A.weight": np.ones((2, 352), np.float32),
        "transformer.layers.1.gating.linear_out.lora_B.weight": np.ones((128, 2), np.float32),
    }
    assert merge_lora(str(base), write_lora(tmp_path, lora), tmp_path / "out", 1.0) == 1
    before, after = (
        mx.load(str(folder / "model.q4.safetensors")) for folder in (base, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    differing = {n for n in before if not mx.array_equal(before[n], after[n]).item()}
    touched = "transformer.layers.1.gating.linear_out."
    assert differing and all(name.startswith(touched) for name in differing)


def test_the_dtype_stays_the_bases(tmp_path):
    base = tiny_moshi(tmp_path / "base", dtype=mx.bfloat16)
    lora, _ = factors(moshi_config())
    merge_lora(str(base), write_lora(tmp_path, lora), tmp_path / "out", SCALING)
    after = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {a.dtype for a in after.values()} == {mx.bfloat16}


def test_whole_and_frozen_weights_take_the_bases_place(tmp_path):
    """`ft_embed` saves embeddings whole; a layer's `frozen_W` is the weight that was trained on."""
    base = tiny_moshi(tmp_path / "base")
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    before = weights(read(base))
    frozen, a, b = draw(64, 64), draw(2, 64), draw(64, 2)
    emb = draw(*before["audio_embs.3.weight"].shape)
    layer = "transformer.layers.0.original_layer.self_attn.out_projs.0"
    lora = {
        f"{layer}.frozen_W.weight": frozen,
        f"{layer}.lora_A.weight": a,
        f"{layer}.lora_B.weight": b,
        "emb.3.weight": emb,
        "transformer.layers.0.seq_modeling_block.ttt_layer.ttt.wq.weight": draw(64, 64),
    }
    assert merge_lora(str(base), write_lora(tmp_path, lora), tmp_path / "out", 2.0) == 2
    after = weights(read(tmp_path / "out"))
    changed = "transformer.layers.0.self_attn.out_proj.weight"
    np.testing.assert_allclose(after.pop(changed), frozen + 2 * b @ a, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(after.pop("audio_embs.3.weight"), emb)
    for name, weight in after.items():
        np.testing.assert_array_equal(weight, before[name])


@pytest.mark.parametrize(
    "configs",
    [
        {"config": {"lora_scaling": SCALING}},
        {"training_config": {"lora": {"scaling": SCALING}}},
        {"config": {"lora_scaling": SCALING}, "training_config": {"lora": {"scaling": 9.0}}},
    ],
)
def test_the_scaling_is_what_it_was_trained_with(configs, tmp_path):
    base = tiny_moshi(tmp_path / "base")
    lora, _ = factors(moshi_config())
    path = write_lora(tmp_path, lora, **configs)
    merge_lora(str(base), path, tmp_path / "said")
    merge_lora(str(base), path, tmp_path / "named", SCALING)
    said, named = (weights(read(tmp_path / folder)) for folder in ("said", "named"))
    for name, weight in named.items():
        np.testing.assert_array_equal(said[name], weight)


@pytest.mark.parametrize("bits", [None, 8])
def test_the_merged_model_talks_and_says_something_else(bits, tmp_path):
    base = tiny_moshi(tmp_path / "base", bits=bits)
    config = json.loads((base / "config.json").read_text())
    lora, _ = factors(config)
    merge_lora(str(base), write_lora(tmp_path, lora), tmp_path / "out", SCALING)
    user = codes(8, n=8, card=config["card"])[:, 0]
    said = []
    for folder in (base, tmp_path / "out"):
        session = Session(load(str(folder)), seed=1)
        said.append([session.step(frame).piece for frame in user])
    assert said[0] != said[1]


# -- refusals --------------------------------------------------------------------------------------

LAYER = "transformer.layers.0.gating.linear_in"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
GOOD = {A: np.ones((2, 64), np.float32), B: np.ones((352, 2), np.float32)}
ELSEWHERE = {name.replace(".0.", ".7."): a for name, a in GOOD.items()}


@pytest.mark.parametrize(
    "lora, message",
    [
        ({A: GOOD[A]}, "gating.linear_in has only one of lora_A and lora_B"),
        (GOOD | {A: np.ones((3, 64), np.float32)}, r"linear_in has the shapes .*expected a weight"),
        (GOOD | {B: np.ones((9, 2), np.float32)}, r"\[9, 2\].*expected a weight \[352, 64\]"),
        ({n.replace(".0.", ".7."): a for n, a in GOOD.items()}, r"layers\.7.*is this the base"),
        (
            GOOD | {n.replace(".0.", ".7."): a for n, a in GOOD.items()},
            r"1 of its weights are not.*\.7\.",
        ),
        ({"text_linear.weight": np.ones((64, 64), np.float32)}, "has no LoRA factors"),
        (GOOD | {"text_linear.weight": np.ones((2, 2), np.float32)}, r"\[\[2, 2\]\], expected"),
    ],
)
def test_factors_that_do_not_fit_are_named(lora, message, tmp_path):
    base = tiny_moshi(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        merge_lora(str(base), write_lora(tmp_path, lora), tmp_path / "out", 2.0)
    assert not (tmp_path / "out").exists()


def test_a_scaling_that_nobody_names_is_asked_for(tmp_path):
    base = tiny_moshi(tmp_path / "base")
    with pytest.raises(UserError, match="name it with --scaling"):
        merge_lora(str(base), write_lora(tmp_path, GOOD), tmp_path / "out")


def test_the_verb(tmp_path, capsys):
    base = tiny_moshi(tmp_path / "base")
    path = write_lora(tmp_path, GOOD)
    out = tmp_path / "out"
    argv = ["convert", "lora", "--hf-repo", str(base), "--lora", str(path), str(out)]
    assert main(argv) == 2
    assert "--scaling" in capsys.readouterr().err
    assert main([*argv, "--scaling", "2.0"]) == 0
    assert "1 weights merged" in capsys.readouterr().err.replace("\n", " ")
    assert main([*argv, "--scaling", "2.0"]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error and error.count("\n") == 1
    assert main(["convert", "lora", "--hf-repo", str(base), "--lora", "nowhere", "x"]) == 2
    assert "no file nowhere" in capsys.readouterr().err
