"""Processes that train together: MLX's distributed engine, one process a machine or GPU.

    mlx.launch -n 2 --backend ring -- moshi-ttt-mlx train ...

Each process takes its share of a batch's talks; gradients are added up, so that all make the same
step. One process alone needs nothing of this and is a group of one.
"""

from typing import TypeVar

import mlx.core as mx
from mlx.utils import tree_map

from ..errors import UserError

Tree = TypeVar("Tree")


class Together:
    """The processes that `mlx.launch` started.

    Attributes:
        rank, size: which one this is, and how many there are.
    """

    def __init__(self):
        group = mx.distributed.init()
        self.rank, self.size = group.rank(), group.size()

    @property
    def leads(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's rows of a batch of `size * rows`."""
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def sum(self, tree: Tree) -> Tree:
        """A tree of arrays, added up over all processes."""
        return tree if self.size == 1 else tree_map(mx.distributed.all_sum, tree)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.sum(mx.array(float(flag))).item() > 0

    def check_equal(self, what: str, value: float, advice: str) -> None:
        """All processes hold the same number (as float32).

        Raises:
            UserError: they do not.
        """
        if self.size == 1:
            return
        values = mx.distributed.all_gather(mx.array([value], mx.float32)).tolist()
        if len(set(values)) > 1:
            raise UserError(f"the processes have different {what}: {advice}")
