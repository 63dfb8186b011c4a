"""LoRA of moshi-finetune merged into a base model, quantized or not: `W + scaling * B @ A`.

    merge_lora("kyutai/moshiko-mlx-q4", Path("lora.safetensors"), Path("my_moshi"), scaling=2.0)
    load("my_moshi")

What lives here: which weight a pair of factors belongs to, and the merge. What does not: memory
tensors that may be in the same file (`convert.py`); they are left alone.

The sum is taken in float32. A quantized weight is dequantized, merged and quantized again to the
bits and group it had; its rounding is then that of the merged weight.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm

from .config import build_lm, lm_config, read_json
from .errors import UserError
from .finetuned import LORA_PART, MEMORY_PART, base_name, new_folder, write_config
from .hub import ModelFiles, Progress, find_files, resolve_file, silent
from .pytorch_weights import step_name, step_schedule
from .weights import dense_weight, load_lm_weights, read_shapes


@dataclass
class _Change:
    """What a fine-tuned file says of one weight: two factors, the whole weight, or both."""

    a: mx.array | None = None
    b: mx.array | None = None
    whole: mx.array | None = None


Changes = dict[str, _Change]


def merge_lora(
    hf_repo: str,
    lora: Path,
    out: Path,
    scaling: float | None = None,
    progress: Progress = silent,
) -> int:
    """Write a model folder with a LoRA file merged into its weights.

    Args:
        hf_repo: the base model: a repository, a folder or `demo`; in any layout, quantized or not.
        lora: moshi-finetune's `lora.safetensors`.
        out: new folder, in MLX layout, quantized as the base.
        scaling: factor on `B @ A`. Default: what the configs beside `lora` say.
        progress: called with one line before each step that takes time.

    Returns:
        How many weights were changed.

    Raises:
        UserError: what is missing or does not fit, in one line.
    """
    lora = resolve_file(lora)
    shapes = read_shapes(lora)
    if not any(LORA_PART.match(name) for name in shapes):
        raise UserError(f"{lora.name} has no LoRA factors (lora_A, lora_B)")
    scaling = _scaling(lora.parent) if scaling is None else scaling
    files = find_files(hf_repo, progress=progress)
    lm = build_lm(lm_config(files.config, name=files.name, text_only=files.mimi is None), hf_repo)
    progress(f"reading {files.moshi.name}")
    bits = load_lm_weights(lm, files.moshi)
    progress("merging")
    merged = merge(lm, mx.load(str(lora)), scaling, lora.name)
    with new_folder(out) as folder:
        progress(f"writing {out}")
        _write_model(files, lm, bits, folder)
    return merged


def _scaling(folder: Path) -> float:
    """The scaling that a LoRA was trained with, from the configs beside it."""
    for name, path in {
        "config.json": ("lora_scaling",),
        "training_config.json": ("lora", "scaling"),
    }.items():
        value = read_json(folder / name) if (folder / name).is_file() else None
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    raise UserError(
        f"no config beside the LoRA file in {folder} says its scaling: name it with --scaling "
        "(moshi-finetune's default is 2.0)"
    )


def merge(lm: Lm, tensors: dict[str, mx.array], scaling: float, where: str) -> int:
    """Merge a fine-tuned file's tensors into a model's weights, layer by layer.

    Args:
        lm: changed in place.
        tensors: `X.lora_A.weight [r, in]` and `X.lora_B.weight [out, r]`, by PyTorch's names;
            `X.frozen_W.weight` or a whole `X.weight` takes the base weight's place.
        scaling: factor on `B @ A`.
        where: the file's name, for messages.

    Returns:
        How many weights were changed.

    Raises:
        UserError: half a pair, factors that do not fit, or tensors of another model.
    """
    changes = _changes(tensors, max(step_schedule(lm), default=0) + 1, where)
    schedule, used, merged = step_schedule(lm), set(), 0
    for path, module in lm.named_modules():
        if "weight" not in module or module["weight"].ndim != 2:
            continue
        name = _target(path, schedule)
        if name in changes:
            _merge(module, changes[name], scaling, f"{where}: {name}")
            used.add(name)
            merged += 1
    if strays := sorted(changes.keys() - used):
        raise UserError(
            f"{where}: {len(strays)} of its weights are not in this model, the first is "
            f"{strays[0]}: is this the base that it was trained on?"
        )
    return merged


def _target(path: str, schedule: list[int]) -> str:
    """A module's name in PyTorch's files, attention by its step: `...self_attn.in_projs.{step}`."""
    step = re.match(r"depformer\.slices\.(\d+)\.", path)
    name = step_name(f"{path}.weight", schedule).removesuffix(".weight")
    name = re.sub(r"^audio_embs\.", "emb.", name)
    number = schedule[int(step[1])] if step else 0
    return re.sub(r"\.self_attn\.(in|out)_proj$", rf".self_attn.\1_projs.{number}", name)


def _changes(tensors: dict[str, mx.array], steps: int, where: str) -> Changes:
    changes: Changes = {}
    for name, array in tensors.items():
        if MEMORY_PART.match(name) and ".original_layer." not in name:
            continue
        factor = LORA_PART.match(name)
        weight = base_name(f"{factor[1]}.weight" if factor else name)
        kind = factor[2].lower() if factor else "whole"
        for target, part in _by_step(weight, array, steps):
            setattr(changes.setdefault(target, _Change()), kind, part)
    if halves := sorted(n for n, c in changes.items() if (c.a is None) != (c.b is None)):
        raise UserError(f"{where}: {halves[0]} has only one of lora_A and lora_B")
    return changes


def _by_step(weight: str, array: mx.array, steps: int) -> list[tuple[str, mx.array]]:
    """The weights that a tensor is for: older files stack attention's of all steps in one."""
    match = re.match(r"^(.+\.self_attn\.)(in|out)_proj[._]weight$", weight)
    if match is None:
        return [(weight.removesuffix(".weight"), array)]
    count = steps if weight.startswith("depformer.") else 1
    if array.shape[0] % count:
        return [(weight.removesuffix(".weight"), array)]  # fits nothing: named as a stray
    parts = mx.split(array, count)
    return [(f"{match[1]}{match[2]}_projs.{i}", part) for i, part in enumerate(parts)]


def _merge(module: nn.Module, change: _Change, scaling: float, where: str) -> None:
    weight = dense_weight(module) if change.whole is None else change.whole.astype(mx.float32)
    shape = _shape(module)
    factors = change.a is None or (change.b.shape[:1] + change.a.shape[1:], change.b.shape[1:]) == (
        shape,
        change.a.shape[:1],
    )
    if weight.shape != shape or not factors:
        found = [list(x.shape) for x in (change.whole, change.a, change.b) if x is not None]
        raise UserError(f"{where} has the shapes {found}, expected a weight {list(shape)}")
    if change.a is not None:
        a, b = (x.astype(mx.float32) for x in (change.a, change.b))
        weight = weight + scaling * (b @ a)
    _store(module, weight)
    mx.eval(module.parameters())  # one layer at a time in memory


def _quantized(module: nn.Module) -> bool:
    return "scales" in module


def _shape(module: nn.Module) -> tuple[int, ...]:
    rows, columns = module["weight"].shape
    return (rows, columns * 32 // module.bits) if _quantized(module) else (rows, columns)


def _store(module: nn.Module, weight: mx.array) -> None:
    if not _quantized(module):
        module["weight"] = weight.astype(module["weight"].dtype)
        return
    weight = weight.astype(module["scales"].dtype)
    parts = mx.quantize(weight, module.group_size, module.bits)
    module["weight"], module["scales"], module["biases"] = parts


def _write_model(files: ModelFiles, lm: Lm, bits: int | None, folder: Path) -> None:
    """The model as moshi_mlx reads it: weights, config where there was one, codec, tokenizer."""
    weights = f"model.q{bits}.safetensors" if bits in (4, 8) else "model.safetensors"
    mx.save_safetensors(str(folder / weights), dict(tree_flatten(lm.parameters())))
    names = {"moshi_name": weights, "tokenizer_name": files.tokenizer.name}
    if files.mimi is not None:
        names["mimi_name"] = files.mimi.name
    if files.config is not None:
        write_config(folder, files.config | names)
    for path in (files.tokenizer, files.mimi):
        if path is not None:
            shutil.copyfile(path, folder / path.name)
