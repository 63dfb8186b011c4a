"""Tiny checkpoints in the formats of Kyutai's repositories, for every family that `Lm` covers.

    tiny_moshi(tmp_path / "moshi", layout="pytorch")
    tiny_stt(tmp_path / "stt", bits=4, stt_config={"audio_delay_seconds": 0.16})

Each writes a folder that `moshi_ttt_mlx.load` opens: `config.json`, the model, a small Mimi and a text
tokenizer. Same arguments, same bytes. `load(SMALL)` is one that is there already: a Moshi without a
memory, written by `scripts/make_small_model.py`.
"""

import functools
import io
import json
import shutil
from pathlib import Path

import mlx.core as mx
import sentencepiece
from mimi_checkpoints import checkpoint
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig

from moshi_ttt_mlx.codec import mimi_config_to_dict, small_mimi

SMALL = str(Path(__file__).resolve().parent / "models" / "small")

MIMI_NAME = "mimi-tiny.safetensors"
TOKENIZER_NAME = "tokenizer_spm_tiny.model"
TEXT_CARD = 64
# 11/4 of the width, the inner width of every layer, has to fit the groups of the bits.
QUANTIZED_DIM = {4: 128, 8: 256}
GROUP = {4: 32, 8: 64}


def moshi_config(**overrides) -> dict:
    """moshiko and moshika: 8 streams of Moshi's, 8 of the user's."""
    delays = [0] + [1] * 7
    return _common(n_q=16, dep_q=8, delays=[0, *delays, *delays]) | overrides


def hibiki_config(**overrides) -> dict:
    """hibiki: a description to condition on, slices that share weights, low-rank embeddings."""
    delays = [0] + [2] * 7
    description = {
        "n_bins": 31,
        "dim": 64,
        "tokenizer": "noop",
        "possible_values": ["very_bad", "bad", "neutral", "good", "very_good"],
    }
    return (
        _common(n_q=16, dep_q=8, delays=[0, *delays, *delays])
        | {
            "model_type": "hibiki",
            "context": 50,
            "depformer_dim": 128,
            "depformer_weights_per_step_schedule": [0, 1, 2, 3, 3, 3, 3, 3],
            "depformer_low_rank_embeddings": 64,
            "conditioners": {"description": {"type": "lut", "lut": description}},
            "fuser": {"cross_attention_pos_emb": False, "sum": ["description"], "prepend": []},
            "lm_gen_config": {"temp": 0.8, "temp_text": 0.7, "top_k": 250, "top_k_text": 50},
        }
        | overrides
    )


def stt_config(**overrides) -> dict:
    """stt: listens to all streams, writes text, and heads that tell when someone is speaking."""
    return (
        _common(n_q=8, dep_q=0, delays=[0] * 9)
        | {
            "model_type": "stt",
            "context": 75,
            "extra_heads_num_heads": 2,
            "extra_heads_dim": 6,
            "stt_config": {"audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 1.0},
        }
        | overrides
    )


def helium_config(**overrides) -> dict:
    """helium: text only."""
    return _common(n_q=0, dep_q=0, delays=[0]) | {"model_type": "helium"} | overrides


def _common(n_q: int, dep_q: int, delays: list[int]) -> dict:
    # With the fields that Kyutai's configs have and moshi_mlx does not read.
    return {
        "model_type": "moshi",
        "card": small_mimi().quantizer_bins,
        "n_q": n_q,
        "dep_q": dep_q,
        "delays": delays,
        "dim": 64,
        "text_card": TEXT_CARD,
        "existing_text_padding_id": 3,
        "num_heads": 4,
        "num_layers": 2,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": 100,
        "max_period": 10000.0,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 64,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_dim_feedforward": 192,
        "depformer_multi_linear": True,
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "cross_attention": False,
    }


def tiny_moshi(folder: Path, **kwargs) -> Path:
    """A tiny moshiko; see `write` for the arguments."""
    return write(folder, moshi_config, **kwargs)


def tiny_hibiki(folder: Path, **kwargs) -> Path:
    """A tiny hibiki; see `write` for the arguments."""
    return write(folder, hibiki_config, **kwargs)


def tiny_stt(folder: Path, **kwargs) -> Path:
    """A tiny stt; see `write` for the arguments."""
    return write(folder, stt_config, **kwargs)


def tiny_helium(folder: Path, **kwargs) -> Path:
    """A tiny helium; see `write` for the arguments."""
    return write(folder, helium_config, **kwargs)


def write(
    folder: Path,
    family,
    *,
    layout: str = "mlx",
    bits: int | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    **overrides,
) -> Path:
    """Write one model's folder and return it.

    Args:
        layout: `mlx`, or Kyutai's `pytorch`.
        bits: 4 or 8 writes `model.q4.safetensors` or `model.q8.safetensors`, as Kyutai quantizes.
        overrides: fields of `config.json`; `None` is a value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wide = {"dim": QUANTIZED_DIM[bits]} if bits else {}
    config = family(**wide | overrides)
    weights = f"model.q{bits}.safetensors" if bits else "model.safetensors"
    config |= {"moshi_name": weights, "tokenizer_name": TOKENIZER_NAME}
    (folder / TOKENIZER_NAME).write_bytes(tokenizer_bytes(config["text_card"]))
    if config["n_q"]:
        config |= {"mimi_name": MIMI_NAME, "mimi_config": mimi_config_to_dict(small_mimi())}
        shutil.copyfile(checkpoint("small"), folder / MIMI_NAME)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    mx.save_safetensors(
        str(folder / weights),
        lm_tensors(config, layout=layout, bits=bits, dtype=dtype, seed=seed),
    )
    return folder


def build_lm(config: dict, seed: int = 0) -> Lm:
    """An `Lm` with random weights, large enough that its choices differ."""
    mx.random.seed(seed)
    lm = Lm(LmConfig.from_config_dict(config))
    lm.apply(lambda a: a * 3 if a.ndim == 2 else a)
    if lm.condition_provider is not None:
        for conditioner in lm.condition_provider.conditioners.values():
            conditioner.learnt_padding = mx.random.normal(conditioner.learnt_padding.shape)
    for layer in lm.transformer.layers:
        layer.norm1.weight = 1 + 0.1 * mx.random.normal(layer.norm1.weight.shape)
    return lm


def lm_tensors(
    config: dict,
    *,
    layout: str = "mlx",
    bits: int | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> dict[str, mx.array]:
    """The tensors of a weights file."""
    lm = build_lm(config, seed)
    if layout == "pytorch":
        share_depformer_weights(lm)
    lm.set_dtype(dtype)
    if bits:
        nn.quantize(lm, bits=bits, group_size=GROUP[bits])
    tensors = dict(tree_flatten(lm.parameters()))
    return to_pytorch(tensors, lm.cfg) if layout == "pytorch" else tensors


def share_depformer_weights(lm: Lm) -> None:
    """PyTorch's layout holds a shared weight once: let every slice have its first user's arrays."""
    schedule = lm.cfg.depformer.weights_per_step_schedule
    if schedule is None:
        return
    for piece, index in zip(lm.depformer.slices, schedule, strict=True):
        first = lm.depformer.slices[schedule.index(index)]
        piece.transformer.update(first.transformer.parameters())
        piece.linear_in.update(first.linear_in.parameters())
    # Attention is one stacked tensor, its norms are one for all slices.
    for piece in lm.depformer.slices:
        for layer, shared in zip(
            piece.transformer.layers, lm.depformer.slices[0].transformer.layers, strict=True
        ):
            layer.norm1.update(shared.norm1.parameters())
            layer.norm2.update(shared.norm2.parameters())


def to_pytorch(tensors: dict[str, mx.array], cfg: LmConfig) -> dict[str, mx.array]:
    """Rename and stack moshi_mlx's tensors into Kyutai's PyTorch layout."""
    slices = cfg.depformer.num_slices
    schedule = cfg.depformer.weights_per_step_schedule or list(range(slices))
    out = {}
    stacks: dict[str, dict[int, mx.array]] = {}
    for name, array in tensors.items():
        if name == "out_norm.weight":
            out["out_norm.alpha"] = array[None, None]
        elif name.startswith("audio_embs."):
            out[name.replace("audio_embs.", "emb.")] = array
        elif name.startswith("transformer."):
            name, array = _attention_and_norms(name, array)
            out[name] = array
        elif name.startswith("depformer.slices."):
            number, _, rest = name.removeprefix("depformer.slices.").partition(".")
            _slice_tensor(int(number), schedule[int(number)], rest, array, out, stacks)
        else:
            out[name] = array
    for name, parts in stacks.items():
        out[name] = mx.concatenate([parts[i] for i in sorted(parts)])
    return out


def _attention_and_norms(name: str, array: mx.array) -> tuple[str, mx.array]:
    if ".norm1." in name or ".norm2." in name:
        return name.replace(".weight", ".alpha"), array[None, None]
    return name.replace(".in_proj.weight", ".in_proj_weight"), array


def _slice_tensor(number: int, shared: int, rest: str, array, out: dict, stacks: dict) -> None:
    if rest.startswith("linear_in."):
        out[f"depformer_in.{shared}.weight"] = array
    elif rest.startswith("linear_out."):
        out[f"linears.{number}.weight"] = array
    elif rest.startswith("emb."):
        owner = f"depformer_emb.{number - 1}" if number else "depformer_text_emb"
        out[f"{owner}.{rest.removeprefix('emb.')}"] = array
    else:
        name, array = _attention_and_norms(rest.replace("transformer.", "depformer."), array)
        if ".self_attn." in name:
            stacks.setdefault(name, {})[shared] = array
        else:
            out[name.replace(".gating.", f".gating.{shared}.")] = array


@functools.cache
def tokenizer_bytes(pieces: int = TEXT_CARD) -> bytes:
    """A SentencePiece model of exactly `pieces` pieces, with Moshi's ids: 3 is padding."""
    said = "hello how are you today I am well thank you what is your name the colour is green "
    text = [said[i:] + said[:j] for i in range(40) for j in range(40)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
