"""Bytes that a talk takes, computed from configs and headers of files: no weights are read.

What lives here: weights, keys and values, a memory's state, the codec, against what the machine has.
What does not: a frame's temporaries, which are small beside them, and other programs.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import safetensors
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig

from ..codec import choose_backend
from ..config import build_lm, lm_config
from ..hub import MemoryFiles, ModelFiles
from ..memory import MemoryConfig
from ..model import mimi_shape
from ..surgery import add_memory, choose_memory, read_memory_config
from ..weights import quantize_lazily
from .case import Case, Chosen, NotDownloaded
from .finding import Finding, size
from .machine import read_machine

_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# rustymimi keeps its weights twice while the next tokenizer warms up (docs/codec.md).
_CODEC_COPIES = {"rustymimi": 2, "mlx": 1}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model in a talk.

    Attributes:
        weights: the network.
        keys_and_values: attention's windows once they are full.
        memory_state: what a memory changes while it talks.
        adapter: a memory's own parameters.
        codec: its weights, as often as its backend holds them.
        source: what all this was computed from.
    """

    weights: int
    keys_and_values: int
    memory_state: int
    adapter: int
    codec: int
    source: str

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.weights, self.keys_and_values, self.memory_state, self.adapter, self.codec)
        return sum(parts)


@dataclass(frozen=True)
class _Header:
    """What a weights file says of itself."""

    nbytes: int
    dtype: mx.Dtype  # of what is not quantized, so of keys and values
    quantized: bool


def _read_header(path: Path) -> _Header:
    with safetensors.safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        names = [s.get_dtype() for n, s in slices.items() if n.startswith("out_norm.")]
    dtype = _DTYPES.get(names[0] if names else "", mx.bfloat16)
    with path.open("rb") as file:
        begins = 8 + int.from_bytes(file.read(8), "little")
    quantized = any(name.endswith(".scales") for name in slices)
    return _Header(path.stat().st_size - begins, dtype, quantized)


def footprint(chosen: Chosen, context: int | None = None) -> Footprint:
    """What a model will take.

    Args:
        chosen: by its files; of Moshi's own repositories also by its name alone.
        context: frames attention sees; None takes the model's own.

    Raises:
        UserError: files that are missing or broken.
        NotDownloaded: a repository whose shape is not known.
    """
    try:
        files = chosen.files
    except NotDownloaded:
        return _of_published(chosen, context)
    config = lm_config(files.config, name=files.name, text_only=files.mimi is None)
    header = _read_header(files.moshi)
    bits = None if header.quantized else files.quantized
    lm = _unread(config, files.name, header.dtype, bits)
    weights = header.nbytes if header.quantized else _nbytes(lm)
    on_load = f", made {bits} bits on load" if bits else ""
    codec = _codec_bytes(files, chosen.codec)
    source = f"the config and {files.moshi.name}'s header{on_load}"
    memory = choose_memory(files, chosen.adapter_path)
    return _with_windows(lm, header.dtype, memory, context, weights, codec, source)


def _of_published(chosen: Chosen, context: int | None) -> Footprint:
    """Moshi's own repositories are all of one shape, which moshi_mlx knows."""
    match = re.fullmatch(r"kyutai/moshik[oa]-mlx-(bf16|q4|q8)", chosen.name)
    if match is None:
        raise NotDownloaded(chosen.name)
    held = {"q4": 4, "q8": 8}.get(match[1])
    bits = held or chosen.flags.get("quantized")
    lm = _unread(lm_config(None, name=chosen.name), chosen.name, mx.bfloat16, bits)
    source = "the published shape of Moshi (not downloaded yet; without the codec's file)"
    memory = choose_memory(None, chosen.adapter_path)
    return _with_windows(lm, mx.bfloat16, memory, context, _nbytes(lm), 0, source)


def _unread(config: LmConfig, name: str, dtype: mx.Dtype, bits: int | None) -> Lm:
    """The network as it will be loaded; nothing of it is ever computed."""
    lm = build_lm(config, name)
    lm.set_dtype(dtype)
    if bits:
        quantize_lazily(lm, bits)
    return lm


def _nbytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def _with_windows(
    lm: Lm,
    dtype: mx.Dtype,
    files: MemoryFiles | None,
    context: int | None,
    weights: int,
    codec: int,
    source: str,
) -> Footprint:
    transformer = lm.cfg.transformer
    full = min(context or transformer.context, transformer.context)
    windows, state, adapter = [full] * transformer.num_layers, 0, 0
    if files:
        memory = read_memory_config(files.config)
        state, adapter = _memory_bytes(lm, memory)
        for layer in memory.layer_indices(len(windows)):
            windows[layer] = min(memory.window or full, full)
    row = 2 * transformer.d_model * dtype.size
    return Footprint(weights, sum(windows) * row, state, adapter, codec, source)


def _memory_bytes(lm: Lm, config: MemoryConfig) -> tuple[int, int]:
    """State and parameters of a memory; after the model's own bytes were counted."""
    adapter = add_memory(lm, config)
    states = [memory.init_cache(1).state for memory in adapter.memories.values()]
    return sum(a.nbytes for state in states for a in state.values()), _nbytes(adapter)


def _codec_bytes(files: ModelFiles, backend: str) -> int:
    if files.mimi is None:
        return 0
    return _CODEC_COPIES[choose_backend(backend, mimi_shape(files))] * files.mimi.stat().st_size


def check_memory(case: Case) -> Finding:
    """Whether the models and their talk fit into the machine."""
    try:
        prints = [footprint(chosen, case.context) for chosen in case.models]
    except NotDownloaded as error:
        return Finding("memory", "skipped", str(error))
    machine = read_machine()
    needed = sum(one.total for one in prints)
    left = machine.usable - needed
    facts = {
        "models": [
            {"name": chosen.name, **vars(one), "total": one.total}
            for chosen, one in zip(case.models, prints, strict=True)
        ],
        "needed": needed,
        "usable": machine.usable,
        "headroom": left,
    }
    names = zip(case.models, prints, strict=True)
    parts = "; ".join(f"{chosen.name}: {_described(one)}" for chosen, one in names)
    if left < 0:
        line = (
            f"{parts}; {size(needed)} of {size(machine.usable)} ({machine.usable_is}): "
            "too much, try -q 4 or a smaller --context"
        )
        return Finding("memory", "problem", line, facts)
    line = f"{parts}; {size(needed)} of {size(machine.usable)}: {size(left)} to spare"
    return Finding("memory", "ok", line, facts)


def _described(one: Footprint) -> str:
    parts = {
        "weights": one.weights,
        "keys and values": one.keys_and_values,
        "memory's state": one.memory_state,
        "adapter": one.adapter,
        "codec": one.codec,
    }
    listed = " + ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    return f"{listed}, from {one.source}"
