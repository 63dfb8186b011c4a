"""What a memory costs: frame time beside moshi_mlx, and bytes, measured or computed from shapes.

`bench.py` measures the frame loop itself; nothing here prints either.
"""

from dataclasses import asdict, dataclass, replace
from itertools import islice

import mlx.core as mx
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig, config_v0_1
from moshi_mlx.utils import Sampler

from .bench import (
    MOSHI_MLX_STEPS,
    SEED,
    WARM_UP,
    interleave,
    milliseconds,
    moshi_mlx_generator,
    moshi_mlx_loop,
    our_loop,
    twin,
    user_codes,
)
from .generate import FrameGenerator
from .memory import MemoryConfig, TTTMemory
from .surgery import add_memory, find_memory

# Of the memory that is timed; all else about it is `MemoryConfig`'s default.
WINDOW = 100


def half_the_layers(lm_config: LmConfig, **fields) -> MemoryConfig:
    """A memory in the upper half of the layers."""
    return MemoryConfig(layers=f"top:{max(1, lm_config.transformer.num_layers // 2)}", **fields)


def compare_with_memory(lm: Lm, seconds: float = 4.0, warm_up: int = WARM_UP) -> dict:
    """Our frame with memory in half the layers, without it, and `LmGen`'s, interleaved.

    Args:
        lm: with the memory to time, or left with one of the bench's own in it.
        seconds: for timing, after the warm-up.
        warm_up: frames of each before.

    Returns:
        The JSON keys of this section.
    """
    stock = twin(lm)
    if find_memory(lm) is None:
        add_open_memory(lm)
    ours = {
        mode: FrameGenerator(lm, Sampler(), Sampler(), memory=mode, seed=SEED)
        for mode in ("on", "off")
    }
    loops = {mode: our_loop(generator) for mode, generator in ours.items()}
    loops["moshi_mlx"] = moshi_mlx_loop(moshi_mlx_generator(stock))
    codes = user_codes(lm)
    for loop in loops.values():
        for frame in islice(codes, warm_up):
            loop(frame)
    times = interleave(loops, codes, seconds, most=MOSHI_MLX_STEPS - warm_up - 10)
    p50 = {name: milliseconds(of_frames, 50) for name, of_frames in times.items()}
    return {
        "memory_ratio": p50["on"] / p50["moshi_mlx"],
        "memory_on_off_ratio": p50["on"] / p50["off"],
        "memory_frame_ms_p50": p50["on"],
        "memory_frame_ms_p95": milliseconds(times["on"], 95),
        "memory_report": ours["on"].memory_report(),
        "memory_costs": [asdict(row) for row in cost_table(lm.cfg)],
    }


def add_open_memory(lm: Lm) -> None:
    """Put a memory into the upper half of the layers, its gates open a little."""
    adapter = add_memory(lm, half_the_layers(lm.cfg, window=min(WINDOW, _context(lm.cfg))))
    for memory in adapter.memories.values():
        memory.gate = mx.full(memory.gate.shape, 0.1)
    mx.eval(adapter.parameters())


def _context(config: LmConfig) -> int:
    return config.transformer.context


@dataclass(frozen=True)
class Costs:
    """Bytes of one talk, and parameters of its adapter.

    Attributes:
        name: the model.
        kv_bytes: keys and values of all layers at the model's full context.
        kv_bytes_with_memory: the same with `window` keys in the layers that have a memory.
        state_bytes: the memory's state, float32, one row.
        adapter_parameters: outer-loop parameters of the memory.
        adapter_share: beside the model's own parameters.
    """

    name: str
    memory: MemoryConfig
    kv_bytes: int
    kv_bytes_with_memory: int
    state_bytes: int
    adapter_parameters: int
    adapter_share: float


def costs(name: str, config: LmConfig, memory: MemoryConfig, item_size: int) -> Costs:
    """What a memory costs, from shapes alone: nothing is allocated.

    Args:
        name: the model.
        config: its config.
        memory: the memory's.
        item_size: bytes of one number of a key (2 for bfloat16).
    """
    layers = config.transformer.num_layers
    mine = len(memory.layer_indices(layers))
    width, heads = config.transformer.d_model, config.transformer.num_heads
    row = 2 * width * item_size
    window = min(memory.window or _context(config), _context(config))
    one = TTTMemory(width, heads, memory)
    state = sum(array.nbytes for array in one.init_cache(1).state.values())
    adapter = mine * sum(array.size for _, array in tree_flatten(one.parameters()))
    base = sum(array.size for _, array in tree_flatten(Lm(config).parameters()))
    return Costs(
        name,
        memory,
        kv_bytes=layers * _context(config) * row,
        kv_bytes_with_memory=((layers - mine) * _context(config) + mine * window) * row,
        state_bytes=mine * state,
        adapter_parameters=adapter,
        adapter_share=adapter / base,
    )


def cost_table(tiny: LmConfig) -> list[Costs]:
    """The tiny model of this bench, and Moshi 7B: memory in half and in all of its layers."""
    half = half_the_layers(config_v0_1(), window=250)
    return [
        costs("tiny", tiny, half_the_layers(tiny, window=WINDOW), 4),
        costs("Moshi 7B, 16 layers", config_v0_1(), half, 2),
        costs("Moshi 7B, 16 layers, slots", config_v0_1(), replace(half, read="slots"), 2),
        costs("Moshi 7B, all layers", config_v0_1(), replace(half, layers="top:32"), 2),
    ]
