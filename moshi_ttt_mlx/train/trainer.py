"""The trainer: one update after another, all of its state in one place.

    learner = Learner(lm, adapter, attention=Attention(window=125))
    trainer = Trainer(learner, shards, Settings(steps=1000, batch=4), Together())
    while trainer.step < trainer.settings.steps:
        report = trainer.update()

What lives here: what one update is, the held-out loss, and the state that a resumed run needs. What
does not: gradients of a segment (`segments.py`), files, the log, the progress bar (`run.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import UserError
from ..trees import under
from .data import Shard
from .loss import cut
from .optimizer import Optimizer, Schedule, global_norm
from .plan import Plan, cuts, read_batch
from .segments import Carried, Learner, Phase, Segment
from .together import Together

MOST_BAD_STEPS = 20
"""So many updates in a row without a finite gradient end a run."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        phase: `memory` (the base is frozen), `all`, or `base` (without a memory).
        steps: updates.
        batch: talks at once, in each process.
        micro_batch: talks in one pass; gradients of passes are added up. None: all at once.
        segment: most frames of an update.
        window, sinks: what attention sees, see `segments.Attention`.
        memory_rate, base_rate: full learning rates.
        warmup: updates until they are reached.
        clip: largest norm of the gradient.
        weight_decay: decoupled, times the rate.
        gate_speed: rate of the gates over `memory_rate`, see `Optimizer`.
        text_padding, first_codebook, audio, lately: see `loss.LossWeights`.
        kept: phrases for testing, in words, see `kept.py`; the learner has them as tokens.
        recompute: layers again in the backward pass, rather than their inner results in memory.
        seed: of the first weights of what is new, and of the order of talks.
    """

    phase: Phase = "memory"
    steps: int = 1000
    batch: int = 1
    micro_batch: int | None = None
    segment: int = 250
    window: int | None = None
    sinks: int = 0
    memory_rate: float = 1e-4
    base_rate: float = 1e-6
    warmup: int = 50
    clip: float = 1.0
    weight_decay: float = 0.01
    gate_speed: float = 10.0
    text_padding: float = 0.5
    first_codebook: float = 100.0
    audio: float = 1.0
    lately: float = 0.0
    kept: tuple[str, ...] = ()
    recompute: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "segment"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("memory_rate", "base_rate", "clip", "gate_speed"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.window is not None and not 0 <= self.sinks < self.window:
            raise UserError(f"window {self.window} must be above 0 and above sinks {self.sinks}")
        for name in ("audio", "lately"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        rows = self.micro_batch or self.batch
        if rows < 1 or self.batch % rows:
            raise UserError(f"micro_batch {rows} does not divide a batch of {self.batch}")

    @property
    def rates(self) -> dict[str, float]:
        """Full rate by group of parameters."""
        rates = {"memory": self.memory_rate}
        if self.phase != "memory":
            rates["base"] = self.base_rate
            if self.lately:
                rates["lately"] = self.base_rate
        return rates


class Losses(NamedTuple):
    """Losses of one update or of a held-out set, in nats; NaN for a stream without a token in it.

    Attributes:
        loss: what is minimised: weighted text plus weighted codebooks.
        text: mean over all text tokens.
        said: mean over those that somebody says.
        codebooks: mean of each codebook.
        tokens: tokens counted.
    """

    loss: float
    text: float
    said: float
    codebooks: list[float]
    tokens: int

    @classmethod
    def of(cls, loss: float, sums: mx.array) -> "Losses":
        """From `loss.stream_sums`."""
        total, count = np.array(sums, np.float64)
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan).tolist()
        return cls(loss, mean[0], mean[1], mean[2:], int(count[0] + count[2:].sum()))


class Report(NamedTuple):
    """One update.

    Attributes:
        step: its number, from 1.
        losses: before it.
        norm: of the gradient before clipping; not finite: nothing was changed.
        share: of the full rate.
        gates: mean amplitude of a layer's gates.
        updates: largest `||dW|| / ||W||` of a layer's last fold.
    """

    step: int
    losses: Losses
    norm: float
    share: float
    gates: dict[int, float]
    updates: dict[int, float]


class Trainer:
    """Trains a model's memory on shards.

    Args:
        learner: the model, as a function of what learns.
        shards: the talks.
        settings: how.
        together: the processes.

    Raises:
        UserError: processes that do not start alike.
    """

    def __init__(
        self, learner: Learner, shards: Sequence[Shard], settings: Settings, together: Together
    ):
        self.learner, self.settings, self.together = learner, settings, together
        self.plan = Plan(shards, settings.batch * together.size, settings.seed)
        self.optimizer = Optimizer(
            settings.rates,
            Schedule(settings.steps, settings.warmup),
            settings.clip,
            settings.weight_decay,
            settings.gate_speed,
        )
        self.params = learner.parameters()
        self._passes = settings.batch // (settings.micro_batch or settings.batch)
        self._begin_batch(0)
        self._bad = 0
        alike = "start all with the same command and data"
        together.check_equal("weights", global_norm(self.params).item(), alike)
        together.check_equal("talks", sum(shard.frames for shard in shards), alike)

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.optimizer.step

    # -- one update ---------------------------------------------------------------------------

    def update(self) -> Report:
        """Learn from the next segment of the batch.

        Raises:
            UserError: a shard that cannot be read; no finite gradient for a long time.
        """
        parts = self._parts()
        total = self.together.sum(sum(self.learner.total(targets) for _, targets in parts))
        carried, grads, loss, sums = [], None, 0.0, 0.0
        for part, before in zip(parts, self._carried, strict=True):
            segment, new = self.learner.gradients(self.params, before, *part, total)
            grads = new if grads is None else tree_map(mx.add, grads, new)
            loss, sums = loss + segment.loss, sums + segment.sums
            mx.eval(grads, loss, sums, segment.carried.arrays)
            carried.append(segment.carried)
        loss, sums, grads = self.together.sum((loss, sums, grads))
        share = self.optimizer.schedule.share(self.step)
        self.params, norm = self.optimizer.update(self.params, grads)
        mx.eval(self.params, self.optimizer.arrays())
        self.learner.install(self.params)
        self._carried = carried
        report = Report(self.step, Losses.of(loss.item(), sums), norm, share, *self._monitor())
        self._go_on(math.isfinite(norm))
        return report

    def _parts(self) -> list[tuple[mx.array, mx.array]]:
        """Inputs and targets of each pass over the current segment."""
        if self._line is None:
            rows = self.together.share(self.settings.batch)
            self._line = read_batch(self.plan.talks(self._batch), rows, self.learner.lm.cfg)
        start, stop = cuts(self._line.shape[2] - 1, self.settings.segment)[self._segment]
        lines = np.split(self._line, self._passes)
        return [cut(line, self.learner.lm.cfg, start, stop) for line in lines]

    def _begin_batch(self, number: int) -> None:
        self._batch, self._segment, self._line = number, 0, None
        self._carried: list[Carried | None] = [None] * self._passes

    def _go_on(self, usable: bool) -> None:
        """To the next segment; what is left of talks without a finite gradient is left out."""
        self._bad = 0 if usable else self._bad + 1
        if self._bad == MOST_BAD_STEPS:
            raise UserError(
                f"no finite gradient in {MOST_BAD_STEPS} updates: lower the learning rate, or go "
                "back to an adapter that worked"
            )
        self._segment += 1
        if not usable or self._segment == len(cuts(self._line.shape[2] - 1, self.settings.segment)):
            self._begin_batch(self._batch + 1)

    def _monitor(self) -> tuple[dict[int, float], dict[int, float]]:
        gates, updates = {}, {}
        for layer, memory in self.learner.adapter.memories.items():
            gates[layer] = mx.mean(mx.abs(memory.gate)).item()
            steps = [c.arrays[layer]["memory.step"] for c in self._carried]
            updates[layer] = max(mx.max(step).item() for step in steps)
        return gates, updates

    # -- held out -----------------------------------------------------------------------------

    def held_out(self, shards: Sequence[Shard]) -> Losses:
        """The losses of talks that nothing is learned from; every talk from its start to its end."""
        rows = self.settings.micro_batch or self.settings.batch
        shards = sorted(shards, key=lambda shard: shard.frames)
        groups = [shards[i : i + rows] for i in range(0, len(shards), rows)]
        codebooks = self.learner.lm.cfg.generated_codebooks if self.settings.audio else 0
        parts, weights, sums = mx.zeros(2), mx.zeros(2), mx.zeros((2, 2 + codebooks))
        for group in groups[self.together.rank :: self.together.size]:
            for segment, total in self._listen(group):
                parts, weights = parts + segment.parts, weights + total
                sums = sums + segment.sums
                mx.eval(parts, weights, sums, segment.carried.arrays)
        parts, weights, sums = self.together.sum((parts, weights, sums))
        text, audio = (parts / mx.maximum(weights, 1e-6)).tolist()
        loss = text + self.settings.audio * audio
        return Losses.of(loss, sums)

    def _listen(self, talks: Sequence[Shard]):
        """Every segment of some talks, and its weights' total."""
        line = read_batch(talks, slice(None), self.learner.lm.cfg)
        carried = None
        for start, stop in cuts(line.shape[2] - 1, self.settings.segment):
            inputs, targets = cut(line, self.learner.lm.cfg, start, stop)
            total = self.learner.total(targets)
            segment: Segment = self.learner.forward(self.params, carried, inputs, targets, total)
            carried = segment.carried
            yield segment, total

    # -- state --------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, mx.array], dict]:
        """All that the next update depends on besides model, data and settings.

        What is the same in every process is in the first one's state only.
        """
        arrays = {}
        if self.together.leads:
            arrays |= {f"params.{name}": a for name, a in tree_flatten(self.params)}
            arrays |= {f"optimizer.{name}": a for name, a in self.optimizer.arrays().items()}
        metas = []
        for i, carried in enumerate(self._carried):
            metas.append(None if carried is None else carried.meta)
            for layer, own in enumerate(carried.arrays if carried else []):
                arrays |= {f"carried.{i}.{layer}.{name}": a for name, a in own.items()}
        position = {"step": self.step, "batch": self._batch, "segment": self._segment}
        return arrays, position | {"carried": metas, "bad": self._bad}

    def load_state(self, arrays: dict[str, mx.array], meta: dict) -> None:
        """Go on from `state()` of a trainer with the same model, data and settings, bit for bit."""
        params = under("params.", arrays)
        known = dict(tree_flatten(self.params))
        if {n: a.shape for n, a in params.items()} != {n: a.shape for n, a in known.items()}:
            raise UserError("the checkpoint is of another memory or phase: use another --out")
        # In the order that they were in: sums over all of them depend on it.
        found = tree_unflatten([(name, params[name]) for name in known])
        # A group without parameters (the memory, in phase `base`) leaves no name behind.
        self.params = {group: found.get(group, {}) for group in self.params}
        self.optimizer.load(under("optimizer.", arrays), self.params, meta["step"])
        self.learner.install(self.params)
        self._begin_batch(meta["batch"])
        self._segment, self._bad = meta["segment"], meta["bad"]
        self._carried = [
            _carried(under(f"carried.{i}.", arrays), counters)
            for i, counters in enumerate(meta["carried"])
        ]


def _carried(arrays: dict[str, mx.array], counters: list[dict[str, int]] | None) -> Carried | None:
    """What a pass carries, from flat names; None where a talk begins."""
    if counters is None:
        return None
    return Carried([under(f"{layer}.", arrays) for layer in range(len(counters))], counters)
