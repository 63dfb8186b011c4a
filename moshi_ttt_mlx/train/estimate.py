"""How much memory training takes, computed from shapes before anything is allocated.

The parts that are exact are exact: weights, gradients, the optimizer's moments, keys and values, the
memory's state. What the backward pass needs for a moment is counted operation by operation, with one
number for each kind (`_PER_...` below); measured beside it, the sum is within 30 % on the CPU
(`tests/test_train_estimate.py`). No figure for a Mac was measured.

    for part, size in estimate(config_v0_1(), memory, settings, bits=4).items(): ...
"""

from collections.abc import Iterator

from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig

from ..memory import MemoryConfig, TTTMemory
from ..weights import GROUP_SIZE
from .segments import DEPFORMER_FRAMES
from .trainer import Settings

GIB = 1 << 30
_FLOAT32 = 4
# Arrays of the width given, alive at the peak of one layer's backward pass: its inputs, what is in
# between, and the gradients of both.
_PER_TOKEN = 18  # of the model's width: norms, queries, keys, values, residuals
_PER_HIDDEN = 8  # of the feed-forward's hidden width
_PER_SCORE = 4  # of the attention scores
_PER_MEMORY_TOKEN = 14  # float32, of the model's width: convolution, virtual keys and values
_PER_MEMORY_SCORE = 3  # float32: scores once more, beside the virtual ones
_PER_ROW = 12  # float32, of a memory's rows: inputs, outputs and gradients of its inner layers
_PER_FOLD = 6  # float32, of a memory's inner weights, for every fold of a segment
_PER_LOGIT = 4  # float32


def estimate(
    config: LmConfig,
    memory: MemoryConfig,
    settings: Settings,
    bits: int | None = None,
    item: int = 2,
) -> dict[str, int]:
    """Bytes by part, of one process.

    Args:
        config: of the model.
        memory: of its memory.
        settings: of the training.
        bits: of a quantized base (4 or 8), None for none.
        item: bytes of one number of the base, if not quantized, and of activations.
    """
    rows = settings.micro_batch or settings.batch
    learning = _trained_layers(config, memory, settings)
    one = TTTMemory(config.transformer.d_model, config.transformer.num_heads, memory)
    adapter = _FLOAT32 * _size(one) * len(memory.layer_indices(config.transformer.num_layers))
    base = Lm(config)
    parts = {"base": base_bytes(base, bits, item)}
    # Parameters, gradients (a second set while passes are added up), two moments.
    copies = 4 if rows == settings.batch else 5
    parts["memory, its gradients and moments"] = copies * adapter
    if settings.phase != "memory":
        parts["base: float32 master, gradients, moments"] = copies * _FLOAT32 * _size(base)
    parts["keys and values, memory's state"] = _carried(config, memory, one, settings, item)
    parts["inputs of the layers that are recomputed"] = (
        learning * rows * settings.segment * config.transformer.d_model * item
    )
    once = max(_layer(config, memory, settings, rows, item), _heads(config, settings, rows, item))
    if not settings.recompute:
        once = learning * _layer(config, memory, settings, rows, item)
        once += _heads(config, settings, rows, item)
    parts["activations of one layer" if settings.recompute else "activations"] = once
    return parts


def of_model(lm: Lm, memory: MemoryConfig, settings: Settings) -> tuple:
    """The arguments of `estimate` for a model that is loaded."""
    bits = next((m.bits for _, m in lm.named_modules() if hasattr(m, "bits")), None)
    return lm.cfg, memory, settings, bits, lm.out_norm.weight.dtype.size


def _size(module: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(module.parameters()))


def _trained_layers(config: LmConfig, memory: MemoryConfig, settings: Settings) -> int:
    """Layers that a gradient goes through: from the lowest memory up, or all of them."""
    layers = config.transformer.num_layers
    return layers - memory.layer_indices(layers)[0] if settings.phase == "memory" else layers


def base_bytes(lm: Lm, bits: int | None, item: int) -> int:
    """Of a model's weights; nothing is allocated."""
    return sum(_module_bytes(module, bits, item) for module in _leaves(lm))


def _leaves(lm: Lm) -> Iterator[nn.Module]:
    for _, module in lm.named_modules():
        if not module.children() or "weight" in module:
            yield module


def _module_bytes(module: nn.Module, bits: int | None, item: int) -> int:
    own = sum(array.size for array in module.values() if hasattr(array, "nbytes"))
    if bits is None or not hasattr(module, "to_quantized"):
        return own * item
    group = GROUP_SIZE[bits]
    if module.weight.shape[-1] % group:
        return own * item
    # Codes, and a scale and a bias a group.
    return own * bits // 8 + 2 * item * own // group


def _carried(
    config: LmConfig, memory: MemoryConfig, one: TTTMemory, settings: Settings, item: int
) -> int:
    """Twice, where it is being replaced: the state before a segment and behind it."""
    shape = config.transformer
    with_memory = len(memory.layer_indices(shape.num_layers))
    window = min(settings.window or shape.context, shape.context)
    own = min(memory.window or window, window)
    keys = with_memory * own + (shape.num_layers - with_memory) * window
    state = sum(array.nbytes for array in one.init_cache(1).state.values())
    row = 2 * keys * shape.d_model * item + with_memory * state
    rows = settings.micro_batch or settings.batch
    return row * (settings.batch + rows)


def _layer(config: LmConfig, memory: MemoryConfig, settings: Settings, rows: int, item: int) -> int:
    """The peak of one layer with a memory, recomputed and differentiated."""
    shape, tokens = config.transformer, rows * settings.segment
    window = min(memory.window or shape.context, settings.window or shape.context)
    scores = tokens * shape.num_heads * (window - 1 + min(settings.segment, window))
    hidden = (
        11 * shape.d_model // 4
        if shape.dim_feedforward == 4 * shape.d_model
        else (2 * shape.dim_feedforward // 3)
    )
    plain = tokens * (_PER_TOKEN * shape.d_model + _PER_HIDDEN * hidden) + _PER_SCORE * scores
    inner = memory.heads * (memory.head_dim + memory.hidden)
    fold = 2 * memory.heads * memory.head_dim * memory.hidden * rows
    extra = tokens * (_PER_MEMORY_TOKEN * shape.d_model + _PER_ROW * inner)
    extra += _PER_MEMORY_SCORE * scores + _PER_FOLD * fold * settings.segment // memory.mini_batch
    return plain * item + extra * _FLOAT32


def _heads(config: LmConfig, settings: Settings, rows: int, item: int) -> int:
    """Text head and depformer, which come one after the other."""
    text = _PER_LOGIT * rows * settings.segment * config.text_out_vocab_size * _FLOAT32
    shape, slices = config.depformer.transformer, config.depformer.num_slices
    frames = rows * min(settings.segment, DEPFORMER_FRAMES)
    hidden = 2 * shape.dim_feedforward // 3
    layers = shape.num_layers * (_PER_TOKEN * shape.d_model + _PER_HIDDEN * hidden)
    audio = (
        slices * frames * (layers * item + _PER_LOGIT * (config.audio_vocab_size - 1) * _FLOAT32)
    )
    return max(text, audio)
