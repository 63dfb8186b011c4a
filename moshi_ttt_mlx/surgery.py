"""Memory into a moshi_mlx `Lm`, out of it, and adapters on disk. The base is never edited.

    adapter = add_memory(lm, MemoryConfig(layers="top:16", window=250))
    save_adapter(adapter, "my_memory")
    remove_memory(lm)
    adapter = load_adapter(lm, "my_memory")

An adapter is two files in a folder or hub repository: `memory.safetensors` and
`memory_config.json`.
"""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm
from moshi_mlx.modules.transformer import TransformerLayer

from .config import read_json
from .errors import UserError
from .hub import MEMORY_NAMES, MemoryFiles, ModelFiles, find_memory_files, open_source
from .layers import MemoryAttention, WindowAttention, use_window_attention
from .legacy import LegacyConfig, LegacyMemory, StreamLayer, share_layer
from .memory import MemoryConfig, TTTMemory
from .weights import check_shapes, dense_weight, expected_shapes, read_shapes

CONFIG_NAME, WEIGHTS_NAME = map(str, MEMORY_NAMES)
NO_ADAPTER = "none"
"""As an adapter's path: leave out the memory that comes with a model."""
FORMAT = 1


class Adapter(nn.Module):
    """All memories of one model: the parameters that training changes.

    Args:
        config: their shape.
        memories: memory by layer index.
    """

    def __init__(self, config: MemoryConfig, memories: dict[int, TTTMemory]):
        super().__init__()
        self._config = config
        # Not a list: only some layers have one. Not digits: MLX would make a list of them.
        for index, memory in memories.items():
            self[f"layer_{index}"] = memory

    @property
    def memories(self) -> dict[int, TTTMemory]:
        """Memory by layer index."""
        return {int(name.removeprefix("layer_")): memory for name, memory in self.items()}

    @property
    def config(self) -> MemoryConfig:
        return self._config

    def num_parameters(self) -> int:
        """Outer-loop parameters."""
        return sum(array.size for _, array in tree_flatten(self.parameters()))


def add_memory(lm: Lm, config: MemoryConfig) -> Adapter:
    """Put an untrained memory into a model; its gates are shut, so nothing changes yet.

    It starts from its layer's attention: see `TTTMemory.inherit`.

    Raises:
        UserError: layers the model does not have, or a model that has a memory already.
    """
    if find_memory(lm) is not None:
        raise UserError("this model has a memory already: remove_memory first")
    transformer = lm.transformer
    use_window_attention(transformer)
    legacy = isinstance(config, LegacyConfig)
    kind, memories = LegacyMemory if legacy else TTTMemory, {}
    for index in config.layer_indices(len(transformer.layers)):
        memory = kind(lm.cfg.transformer.d_model, lm.cfg.transformer.num_heads, config)
        layer = transformer.layers[index]
        if not legacy:
            memory.inherit(*map(dense_weight, (layer.self_attn.in_proj, layer.self_attn.out_proj)))
        layer.self_attn = MemoryAttention.with_memory(layer.self_attn, memory)
        if legacy:
            transformer.layers[index] = share_layer(StreamLayer, layer)
        memories[index] = memory
    return Adapter(config, memories)


def find_memory(lm: Lm) -> Adapter | None:
    """The memory a model has, or None."""
    memories = {
        index: layer.self_attn.memory
        for index, layer in enumerate(lm.transformer.layers)
        if isinstance(layer.self_attn, MemoryAttention)
    }
    return Adapter(next(iter(memories.values())).config, memories) if memories else None


def remove_memory(lm: Lm) -> None:
    """Take the memory out: the base model as it was."""
    for index, layer in enumerate(lm.transformer.layers):
        if isinstance(layer.self_attn, MemoryAttention):
            layer.self_attn = WindowAttention.sharing(layer.self_attn)
        if isinstance(layer, StreamLayer):
            lm.transformer.layers[index] = share_layer(TransformerLayer, layer)


def save_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write `memory.safetensors` and `memory_config.json` into a folder, made where missing.

    Raises:
        UserError: the folder cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = dict(tree_flatten(adapter.parameters()))
        mx.save_safetensors(str(folder / WEIGHTS_NAME), arrays, {"format": "mlx"})
        config = {"format": FORMAT, **asdict(adapter.config)}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write an adapter into {folder}: {error}") from error


def read_memory_config(path: Path) -> MemoryConfig:
    """Parse a `memory_config.json`.

    Raises:
        UserError: another format, unknown fields, impossible values.
    """
    fields = read_json(path)
    if fields.pop("format", None) != FORMAT:
        raise UserError(f"{path}: expected a memory config of format {FORMAT}")
    kind = LegacyConfig if fields.get("placement") == "stream" else MemoryConfig
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"{path}: not a memory config: {error}") from error


def choose_memory(files: ModelFiles | None, adapter_path: str | None) -> MemoryFiles | None:
    """The files of the memory that a model gets.

    Args:
        files: of the model, which may bring one along; None for a model that is not here.
        adapter_path: a folder, or a repository on the hub; `none` for no memory at all.

    Raises:
        UserError: no such folder or repository, or a file of it is missing.
    """
    if adapter_path is None:
        return files.memory if files else None
    return None if adapter_path == NO_ADAPTER else find_memory_files(open_source(adapter_path))


def load_adapter(lm: Lm, adapter_path: str | MemoryFiles) -> Adapter:
    """Put a saved memory into a model.

    Args:
        lm: the model.
        adapter_path: a folder, a repository on the hub, or a memory's two files.

    Raises:
        UserError: an adapter of another model: tensors and shapes are named.
    """
    if isinstance(adapter_path, MemoryFiles):
        where, files = adapter_path.weights.parent, adapter_path
    else:
        where, files = adapter_path, find_memory_files(open_source(adapter_path))
    config_file, weights_file = files
    adapter = add_memory(lm, read_memory_config(config_file))
    try:
        check_shapes(read_shapes(weights_file), expected_shapes(adapter), f"adapter {where}")
    except UserError:
        remove_memory(lm)
        raise
    weights = mx.load(str(weights_file))
    adapter.load_weights([(name, array.astype(mx.float32)) for name, array in weights.items()])
    mx.eval(adapter.parameters())
    return adapter
