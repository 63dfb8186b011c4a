"""A memory for `SMALL` that says something though nobody has trained it: its gates are open."""

import mlx.core as mx
from tiny import SMALL

from moshi_ttt_mlx import MemoryConfig, load
from moshi_ttt_mlx.surgery import add_memory, save_adapter

CONFIG = MemoryConfig(layers="top:2", heads=2, head_dim=8, hidden=16, mini_batch=4, window=20)


def save_open_memory(folder):
    """Write the adapter; returns what `--adapter-path` takes. Same seed, same bytes."""
    mx.random.seed(2)
    adapter = add_memory(load(SMALL).lm, CONFIG)
    for memory in adapter.memories.values():
        memory.gate = 3 * mx.random.normal(memory.gate.shape)
    save_adapter(adapter, folder)
    return str(folder)
