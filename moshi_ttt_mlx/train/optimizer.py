"""AdamW on groups of parameters with rates of their own; warm-up, cosine, clipping, its state.

optimizer = Optimizer({"memory": 1e-4}, Schedule(steps=1000, warmup=50), clip=1.0)
params, norm = optimizer.update(params, grads)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from ..trees import under
from .segments import Params

BETAS = (0.9, 0.95)  # moshi-finetune's


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine down to `floor` of the rate.

    Args:
        steps: updates in all.
        warmup: updates until the full rate.
        floor: share of the rate that is left at the end.
    """

    steps: int
    warmup: int = 0
    floor: float = 0.1

    def share(self, step: int) -> float:
        """Of the full rate, for the update number `step`, from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a global limit on the gradient.

    Args:
        rates: full rate by group of parameters.
        schedule: share of it by step.
        clip: largest norm of the gradient of all groups together.
        weight_decay: decoupled, times the rate.
        gate_speed: rate of a memory's gates over that of its group. They start at 0, and nothing
            behind them has a gradient before they open.
        betas: decay of both moments.
    """

    def __init__(
        self,
        rates: Mapping[str, float],
        schedule: Schedule,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        gate_speed: float = 1.0,
        betas: tuple[float, float] = BETAS,
    ):
        self.rates, self.schedule, self.clip, self.step = dict(rates), schedule, clip, 0
        self.gate_speed = gate_speed
        self._adam = {
            group: optimizers.AdamW(
                0.0, list(betas), weight_decay=weight_decay, bias_correction=True
            )
            for group in rates
        }

    def update(self, params: Params, grads: Params) -> tuple[Params, float]:
        """Parameters after one step, and the gradient's norm before clipping (one host read).

        Where the norm is not finite nothing changes but the step count: one bad segment must not
        cost the run. The caller sees it by the norm.
        """
        norm = global_norm(grads).item()
        step, self.step = self.step, self.step + 1
        if not math.isfinite(norm):
            return params, norm
        scale = min(self.clip / (norm + 1e-6), 1.0)
        new = {}
        for group, adam in self._adam.items():
            adam.learning_rate = self.rates[group] * self.schedule.share(step)
            clipped = tree_map(lambda g: g * scale, grads[group])
            moved = adam.apply_gradients(clipped, params[group])
            new[group] = tree_map_with_path(self._hurried, moved, params[group])
        return new, norm

    def _hurried(self, path: str, new: mx.array, old: mx.array) -> mx.array:
        # A step of AdamW is proportional to its rate.
        is_gate = path.rpartition(".")[2] == "gate"
        return old + self.gate_speed * (new - old) if is_gate and self.gate_speed != 1 else new

    def arrays(self) -> dict[str, mx.array]:
        """The moments by flat name; `step` is the caller's to keep."""
        return {
            f"{group}.{name}": array
            for group, adam in self._adam.items()
            for name, array in tree_flatten(adam.state)
        }

    def load(self, arrays: dict[str, mx.array], params: Params, step: int) -> None:
        """Go on from `arrays` and `step`, bit for bit."""
        for group, adam in self._adam.items():
            adam.init(params[group])
            if own := under(f"{group}.", arrays):
                adam.state = tree_unflatten(list(own.items()))
        self.step = step


def global_norm(grads: Params) -> mx.array:
    """The norm of all gradients together, a scalar.

    The same bits for the same numbers: MLX adds up an array in the order of its memory, and what came
    from another process lies in rows where a gradient of our own may lie in columns.
    """
    return mx.sqrt(sum(mx.sum(mx.square(mx.contiguous(g))) for _, g in tree_flatten(grads)))
