"""PyTorch Moshi-TTT checkpoints into adapters, so that a converted layer is the function it was.

    convert_ttt(Path("checkpoint_003000/consolidated"), Path("my_memory"))
    load("kyutai/moshiko-mlx-q8", adapter_path="my_memory")

What lives here: which tensors and settings a checkpoint has, what of it is refused, and writing the
adapter (and the base model, where the checkpoint holds one). What does not: how such a memory works
(`legacy.py`), LoRA (`lora.py`).
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import Config, build_lm, check_config, lm_config, read_json
from .errors import UserError
from .finetuned import (
    LORA_PART,
    MEMORY_PART,
    base_name,
    new_folder,
    stacked_name,
    write_config,
)
from .hub import MIMI_NAME, TOKENIZER_NAME, Progress, silent
from .legacy import LegacyConfig, LegacyMemory
from .pytorch_weights import Shapes
from .surgery import Adapter, save_adapter
from .weights import check_shapes, load_lm_weights, read_shapes

WEIGHTS = ("consolidated.safetensors", "lora.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_BLOCK = "transformer.layers.{}.seq_modeling_block."
_TTT = "ttt_layer.ttt."
_INNER = re.compile(r"ttt_layer\.ttt\.(W|b|weights\.|biases\.)\d+$")


@dataclass(frozen=True)
class Converted:
    """What was found and written.

    Attributes:
        config: of the memory.
        parameters: outer-loop parameters of the memory.
        base: whether the base model was in the checkpoint and is in the folder too.
        notes: lines that the user should read.
    """

    config: LegacyConfig
    parameters: int
    base: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Checkpoint:
    """The files of one checkpoint: weights, the LM's config and the `ttt` block of its training."""

    weights: Path
    lm: Config
    ttt: dict[str, Any]
    shapes: Shapes

    def setting(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        """A setting of the `ttt` block.

        Raises:
            UserError: missing without a default, or of another kind.
        """
        value = self.ttt.get(name, default)
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            found = repr(value) if name in self.ttt else "nothing"
            raise UserError(f"training_config.json: ttt.{name} is not usable: found {found}")
        return value

    def optional(self, name: str, kind: type) -> Any:
        """As `setting`, None where it is missing or null."""
        return None if self.ttt.get(name) is None else self.setting(name, None, kind)


def convert_ttt(
    checkpoint: Path,
    out: Path,
    *,
    post_norm: bool = False,
    l2_norm: bool = True,
    causal: bool = False,
    progress: Progress = silent,
) -> Converted:
    """Make an adapter folder of a PyTorch Moshi-TTT checkpoint.

    Args:
        checkpoint: folder with `lora.safetensors` or `consolidated.safetensors`, `config.json` and
            `training_config.json`.
        out: new folder. A base model inside the checkpoint is written there too.
        post_norm: trained by a build that had `post_norm` and `wo` behind the inner network.
        l2_norm: False for checkpoints trained before the `place_into` fix.
        causal: answer many tokens at once as one by one; False is how it was trained.
        progress: called with one line before each step that takes time.

    Raises:
        UserError: whatever is missing or does not fit, in one line.
    """
    found = _read_checkpoint(checkpoint)
    config = _memory_config(found, post_norm=post_norm, l2_norm=l2_norm, causal=causal)
    memories = {i: LegacyMemory(found.lm["dim"], config.heads, config) for i in config.layers}
    adapter = Adapter(config, memories)
    base = _base_shapes(found.shapes)
    if base:
        check_config(found.lm, str(checkpoint / "config.json"))
    progress(f"reading {found.weights.name}")
    tensors = mx.load(str(found.weights))
    adapter.load_weights(list(_adapter_tensors(config, tensors).items()))
    with new_folder(out) as folder:
        progress("writing the memory")
        save_adapter(adapter, folder)
        notes = _notes(found, config)
        if base:
            progress("writing the base model")
            notes += _write_base(found, tensors, folder)
    return Converted(config, adapter.num_parameters(), bool(base), tuple(notes))


# -- reading ---------------------------------------------------------------------------------------


def _read_checkpoint(folder: Path) -> _Checkpoint:
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: expected one with {' or '.join(WEIGHTS)}, config.json and "
            "training_config.json"
        )
    weights = _weights_file(folder)
    for name, holds in {
        "training_config.json": "the memory's base_lr, mini_batch_size and layers are only there",
        "config.json": "the model's sizes are there",
    }.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: copy it in from the training run, {holds}")
    lm = read_json(folder / "config.json")
    for name in ("dim", "num_layers"):
        if not isinstance(lm.get(name), int):
            raise UserError(f"{folder / 'config.json'}: not a Moshi config, it has no {name}")
    ttt = read_json(folder / "training_config.json").get("ttt")
    if not isinstance(ttt, dict):
        raise UserError(f"{folder / 'training_config.json'}: no ttt block: no memory was trained")
    return _Checkpoint(weights, lm, ttt, read_shapes(weights))


def _weights_file(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name.endswith(PICKLES):
            read_shapes(folder / name)  # says why a pickle is refused
    raise UserError(
        f"{folder} has no {' or '.join(WEIGHTS)} (found: {', '.join(names[:8]) or 'nothing'})"
    )


# -- the memory ------------------------------------------------------------------------------------


def _memory_config(found: _Checkpoint, **switches: bool) -> LegacyConfig:
    if found.ttt.get("normalize_ttt_output"):
        raise UserError("training_config.json: ttt.normalize_ttt_output is not supported")
    layers = _layers(found.ttt.get("layers"), found.lm["num_layers"])
    parts = _memory_parts(found.shapes, layers)
    heads, head_dim = parts[layers[0]].get(_TTT + "ttt_norm_weight", (0, 0))
    if heads * head_dim != found.lm["dim"]:
        raise UserError(
            f"{found.weights.name}: ttt_norm_weight {[heads, head_dim]} does not make up the width "
            f"{found.lm['dim']} of config.json: is this the config of these weights?"
        )
    config = LegacyConfig(
        layers=tuple(layers),
        heads=heads,
        head_dim=head_dim,
        hidden=(sizes := _sizes(found, head_dim))[1],
        mini_batch=found.setting("mini_batch_size", None, int),
        base_lr=float(found.setting("base_lr", None, (int, float))),
        window=found.optional("ttt_layer_context", int),
        rope=found.setting("use_rope", False, bool),
        rope_theta=float(found.setting("rope_theta", 10000.0, (int, float))),
        sizes=sizes,
        **switches,
    )
    _check_parts(config, parts, found)
    return config


def _layers(named: Any, total: int) -> list[int]:
    """The layers that a training config names: all, middle, or numbers."""
    words = {"all": range(total), "middle": range(total // 4, 3 * total // 4)}
    if isinstance(named, str) and named in words:
        return list(words[named])
    numbers = named.split(",") if isinstance(named, str) else named
    try:
        # Layers the model does not have were left out by the training code too.
        layers = sorted({int(n) for n in numbers if 0 <= int(n) < total})
    except (TypeError, ValueError):
        layers = []
    if not layers:
        raise UserError(
            f"training_config.json: ttt.layers names no layer of 0..{total - 1}: found {named!r}"
        )
    return layers


def _sizes(found: _Checkpoint, head_dim: int) -> tuple[int, ...]:
    """Widths of the inner network, by the rules of the training code."""
    depth = found.setting("ttt_mlp_layers", 2, int)
    if depth < 3:
        return head_dim, 4 * head_dim, head_dim
    hidden = found.ttt.get("ttt_mlp_hidden_dims")
    if hidden is None:
        factor = found.setting("ttt_mlp_expansion_factor", 4.0, (int, float))
        hidden = [int(head_dim * factor)] * (depth - 1)
    if not isinstance(hidden, list) or len(hidden) != depth - 1:
        raise UserError(
            f"training_config.json: ttt.ttt_mlp_hidden_dims should be {depth - 1} widths, found "
            f"{hidden!r}"
        )
    return head_dim, *hidden, head_dim


def _memory_parts(shapes: Shapes, layers: list[int]) -> dict[int, Shapes]:
    """Shapes of each layer's own tensors.

    Raises:
        UserError: layers that should have a memory and do not, or the reverse.
    """
    parts: dict[int, Shapes] = {}
    for name, shape in shapes.items():
        match = MEMORY_PART.match(name)
        if match and not match[2].startswith("original_layer."):
            parts.setdefault(int(match[1]), {})[match[2]] = shape
    if absent := [i for i in layers if i not in parts]:
        raise UserError(
            f"layers {absent} of training_config.json have no memory tensors in the file, not even "
            f"{_BLOCK.format(absent[0])}{_TTT}wq.weight: multi-GPU LoRA saves lose them; convert a "
            "full (consolidated) save"
        )
    if beyond := sorted(parts.keys() - set(layers)):
        raise UserError(f"layers {beyond} have memory tensors, but ttt.layers does not name them")
    return parts


def _check_parts(config: LegacyConfig, parts: dict[int, Shapes], found: _Checkpoint) -> None:
    expected = {source: shape for source, shape, _ in _table(config)}
    unused = _unused(config)
    for index, part in parts.items():
        where = f"{found.weights.name}, layer {index}"
        inner = {name for name in part if _INNER.match(name)}
        if inner and not inner & expected.keys():
            raise UserError(
                f"{where}: ttt_mlp_layers of training_config.json is {len(config.sizes) - 1}, which "
                f"goes with other tensors than {min(inner)}"
            )
        if missing := sorted(expected.keys() - part.keys()):
            raise UserError(
                f"{where}: {len(missing)} memory tensors missing, the first is "
                f"{_BLOCK.format(index)}{missing[0]}: multi-GPU LoRA saves lose some; convert a "
                "full (consolidated) save"
            )
        check_shapes({n: s for n, s in part.items() if n not in unused}, expected, where)


def _table(config: LegacyConfig) -> list[tuple[str, tuple[int, ...], str]]:
    """Every tensor of a layer: its name in the checkpoint, its shape there, its name here."""
    h, f, width = config.heads, config.head_dim, config.heads * config.head_dim
    rows = [
        (f"{_TTT}w{x}.{part}", shape, f"{x}_proj.{part}")
        for x in "qkv"
        for part, shape in (("weight", (width, width)), ("bias", (width,)))
    ]
    rows += [
        (_TTT + "learnable_ttt_lr_weight", (h, 1, width), "rate.weight"),
        (_TTT + "learnable_ttt_lr_bias", (h, 1), "rate.bias"),
        (_TTT + "ttt_norm_weight", (h, f), "learner.gamma"),
        (_TTT + "ttt_norm_bias", (h, f), "learner.beta"),
        ("forward_ssm_gating.gating_alpha", (width,), "gate"),
    ]
    deep = len(config.sizes) > 3
    for i, (n_in, n_out) in enumerate(zip(config.sizes, config.sizes[1:], strict=False), 1):
        w, b = (f"weights.{i - 1}", f"biases.{i - 1}") if deep else (f"W{i}", f"b{i}")
        rows.append((_TTT + w, (h, n_in, n_out), f"learner.W{i}"))
        rows.append((_TTT + b, (h, 1, n_out), f"learner.b{i}"))
    if config.post_norm:
        for part, shape in (("weight", (width, width)), ("bias", (width,))):
            rows.append((f"{_TTT}wo.{part}", shape, f"out_proj.{part}"))
            rows.append((f"{_TTT}post_norm.{part}", (width,), f"post_norm.{part}"))
    return rows


def _unused(config: LegacyConfig) -> set[str]:
    """Tensors that a checkpoint holds and the function does not use."""
    names = {"backward_ssm_gating.gating_alpha"}
    if not config.post_norm:
        names |= {f"{_TTT}{x}.{part}" for x in ("wo", "post_norm") for part in ("weight", "bias")}
    return names


def _adapter_tensors(config: LegacyConfig, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    out = {}
    for index in config.layers:
        for source, shape, name in _table(config):
            array = tensors[_BLOCK.format(index) + source].astype(mx.float32)
            # One rate per head: [H, 1, D] and [H, 1] there, a Linear's [H, D] and [H] here.
            if name.startswith("rate."):
                array = array.reshape(shape[0], *shape[2:])
            out[f"layer_{index}.{name}"] = array
    return out


def _notes(found: _Checkpoint, config: LegacyConfig) -> list[str]:
    notes = []
    if any(LORA_PART.match(name) for name in found.shapes):
        notes.append(
            f"{found.weights.name} holds LoRA factors too: this memory was trained on top of them; "
            f"merge them into the base: convert lora --hf-repo BASE --lora {found.weights} OUT"
        )
    if context := found.optional("non_ttt_layer_context", int):
        notes.append(f"the layers without a memory were trained to see {context} frames: --context")
    if config.rules.read_gain == 2:
        notes.append(f"{len(config.sizes) - 1} inner layers: the answer takes each step twice")
    return notes


# -- the base model --------------------------------------------------------------------------------


def _base_shapes(shapes: Shapes) -> Shapes:
    """The base model's tensors, by Kyutai's names; empty where the file holds none of note."""
    names = {base_name(name): shape for name, shape in shapes.items() if base_name(name)}
    # A LoRA save may hold embeddings or frozen weights: a whole model has an output norm.
    return names if "out_norm.alpha" in names else {}


def _write_base(found: _Checkpoint, tensors: dict[str, mx.array], folder: Path) -> list[str]:
    """Write the base as `model.safetensors` in MLX layout, with a config and what lies beside it."""
    config = found.lm | {"moshi_name": "model.safetensors"}
    lm = build_lm(lm_config(config, name=found.weights.name), found.weights.name)
    plain = folder / "pytorch.safetensors"
    mx.save_safetensors(str(plain), base_tensors(tensors))
    load_lm_weights(lm, plain)
    plain.unlink()
    lm.save_weights(str(folder / "model.safetensors"))
    write_config(folder, config)
    absent = []
    for name in _small_files(config):
        if (beside := found.weights.parent / name).is_file():
            shutil.copyfile(beside, folder / name)
        else:
            absent.append(name)
    if not absent:
        return []
    return [f"copy {' and '.join(absent)} of the base model into the folder, or name them by flags"]


def base_tensors(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The base model's tensors of a fine-tuned file, in Kyutai's PyTorch layout."""
    out, steps = {}, {}
    for name, array in tensors.items():
        if (plain := base_name(name)) is None:
            continue
        if step := stacked_name(plain):
            steps.setdefault(step[0], {})[step[1]] = array
        else:
            out[plain] = array
    return out | {
        name: mx.concatenate([parts[i] for i in sorted(parts)]) for name, parts in steps.items()
    }


def _small_files(config: Config) -> list[str]:
    names = [config.get("tokenizer_name", TOKENIZER_NAME)]
    return names + ([config.get("mimi_name", MIMI_NAME)] if config["n_q"] else [])
