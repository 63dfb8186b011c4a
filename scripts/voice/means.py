"""What a training run prints: means of its losses since the line before, and the time."""

import time
from collections import defaultdict

from torch import Tensor


class Means:
    """Collects losses by name; each is the mean over the times that it came."""

    def __init__(self) -> None:
        self._begun, self._values = time.time(), defaultdict(list)

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self._values[name].append(value.item())

    def line(self) -> str:
        """All of them, and a new start."""
        means = {name: sum(some) / len(some) for name, some in self._values.items()}
        self._values.clear()
        parts = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        return f"{parts} ({time.time() - self._begun:.0f} s)"
