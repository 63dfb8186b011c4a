"""What the trainings of the codec share: arguments, one update after another, and what is printed."""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

EVERY = 50  # updates a line is printed
SAVED = 250  # updates a file is written


def add_arguments(parser: argparse.ArgumentParser, steps: int, rate: float, threads: int) -> None:
    """How long and how fast, with these defaults."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--own", type=float, default=0.3, help="share of the model's own voice")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--seed", type=int, default=0)


def begin(args: argparse.Namespace) -> random.Random:
    """PyTorch as the arguments want it; chooses what is learned from."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    return random.Random(args.seed)


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


class Descent:
    """AdamW, one cycle of its rate, gradients no longer than 1.

    Args:
        weights: that learn.
        rate: at its highest.
        steps: updates in all.
    """

    def __init__(self, weights: Iterable[nn.Parameter], rate: float, steps: int) -> None:
        self._weights, self._steps, self._step = list(weights), steps, 0
        self._optimizer = torch.optim.AdamW(self._weights, rate, (0.8, 0.98), weight_decay=1e-3)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, rate, total_steps=steps, pct_start=0.05, final_div_factor=10
        )
        self._means = Means()

    def update(self, loss: Tensor, losses: dict[str, Tensor]) -> bool:
        """One update by `loss`, of which `losses` are parts to print; whether it is time to save."""
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._step += 1
        self._means.add(losses)
        if self._step % EVERY == 0:
            print(self._step, self._means.line(), flush=True)
        return self._step % SAVED == 0 or self._step == self._steps
