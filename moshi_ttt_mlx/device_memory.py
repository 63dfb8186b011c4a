"""What MLX is told about memory on a Mac, so that a long talk neither swaps nor hoards.

Wired memory stays in RAM: a model that waits for its user would otherwise be compressed or paged out
and be slow when it is spoken to. MLX keeps freed buffers for later ones of the same size; in a talk
of hours whose shapes change now and then that is memory nobody uses again.

Both are settings of the process. Neither was measured on a Mac; without Metal nothing is set.
"""

import mlx.core as mx
from mlx.utils import tree_flatten

# Beside the weights: keys and values, a memory, and what a frame computes. Computed: 1.6 GB of keys
# and values at 7B, and as much again while a ring grows.
_BESIDE_WEIGHTS = 4 << 30
# Freed buffers that may wait for a new use. More than any frame frees (at 7B tens of megabytes,
# computed), and less than the 1.5 GB of rings that were outgrown: those never come back.
_CACHE = 1 << 30
# Frames between two clearings of that cache: five and a half minutes.
CLEAR_EVERY = 4096


def device_info() -> dict:
    """What MLX says of a Mac's GPU; only with Metal."""
    # mlx 0.26 has it in `mx.metal` only, where later versions warn.
    return mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()


def prepare(weights: dict) -> None:
    """Wire what a talk with these weights needs, and limit the cache; before the first frame.

    Args:
        weights: a tree of arrays. macOS recommends a most for a process; more is not asked for.
    """
    if not mx.metal.is_available():
        return
    size = sum(array.nbytes for _, array in tree_flatten(weights))
    most = int(device_info()["max_recommended_working_set_size"])
    mx.set_wired_limit(min(size + _BESIDE_WEIGHTS, most))
    mx.set_cache_limit(_CACHE)


def after_frame(frame: int) -> None:
    """Give freed buffers back every so often; what is in use is not touched."""
    if frame % CLEAR_EVERY == 0:
        mx.clear_cache()
