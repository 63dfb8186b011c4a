"""Which talks are read when: decided by seed and number alone, so a run that resumes reads on.

plan = Plan(shards, rows=4, seed=0)
talks = plan.talks(7)                   # the 4 talks of the batch number 7, of the whole run
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from moshi_mlx.models import LmConfig

from .data import Shard, check_codes, pad_talks
from .loss import delayed

# Talks within so much of each other's length count as equally long, and mix.
_LENGTHS_ALIKE = 0.2


class Plan:
    """Every talk once an epoch, in batches that begin together; talks of a batch are about as long.

    Args:
        shards: the talks.
        rows: talks of a batch, all processes together. Fewer talks than that are repeated.
        seed: of the order.
    """

    def __init__(self, shards: Sequence[Shard], rows: int, seed: int):
        self.shards, self.rows, self.seed = list(shards), rows, seed
        self.batches_per_epoch = -(-len(self.shards) // rows)

    def talks(self, number: int) -> list[Shard]:
        """The talks of a batch; batches are counted over all epochs."""
        epoch, within = divmod(number, self.batches_per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        frames = np.array([shard.frames for shard in self.shards])
        alike = rng.uniform(1 - _LENGTHS_ALIKE, 1 + _LENGTHS_ALIKE, len(frames))
        order = np.argsort(frames * alike)
        # The last batch of an epoch is filled up with talks that the epoch has had.
        filled = np.resize(order, self.batches_per_epoch * self.rows)
        batches = rng.permutation(filled.reshape(-1, self.rows))
        return [self.shards[i] for i in batches[within]]


def cuts(frames: int, segment: int) -> list[tuple[int, int]]:
    """A talk's segments, `(start, stop)`: as few as `segment` allows, and equally long.

    A short rest at the end would count as much as a whole segment does.
    """
    pieces = -(-frames // segment)
    edges = [frames * i // pieces for i in range(pieces + 1)]
    return list(pairwise(edges))


def read_batch(talks: Sequence[Shard], rows: slice, config: LmConfig) -> np.ndarray:
    """Some rows of a batch, delayed, padded to the longest of all: int32 `[B, S, T + 1]`.

    Raises:
        UserError: a shard that cannot be read, or is another model's.
    """
    frames = max(talk.frames for talk in talks)
    lines = []
    for talk in talks[rows]:
        codes = talk.codes()
        check_codes(codes, config, talk.name)
        # Each delayed by itself: a talk's end is the same beside longer ones as alone.
        lines.append(delayed(codes[None], config)[0])
    return pad_talks(lines, frames + 1)
