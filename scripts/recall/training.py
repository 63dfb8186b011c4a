"""Small models that know facts inside their window, and memories for what lies behind it.

Nothing here knows how facts reach the model; a `Format` does: as text alone, or as Moshi's streams.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm

from moshi_ttt_mlx.config import build_lm, lm_config
from moshi_ttt_mlx.evaluate.recall import Mix, Talks, World, decks, talks
from moshi_ttt_mlx.evaluate.recall_spoken import CARD, spoken
from moshi_ttt_mlx.generate import embed_frame
from moshi_ttt_mlx.layers import make_window_cache
from moshi_ttt_mlx.surgery import find_memory
from moshi_ttt_mlx.train.loss import (
    LossWeights,
    audio_losses,
    cut,
    delayed,
    prepare,
    target_weights,
    text_losses,
    totals,
    weighted_loss,
)
from moshi_ttt_mlx.train.optimizer import Optimizer, Schedule
from moshi_ttt_mlx.train.segments import USUAL_WEIGHTS, Attention, Learner

WORLD, WINDOW, WIDTH = World(), 32, 64
DISTANCES = {"2W": 64, "4W": 128, "8W": 256, "16W": 512}
NEAR = (2, 28)
BETAS = (0.9, 0.98)

Report = Callable[[str], None]
say = partial(print, flush=True)


@dataclass(frozen=True)
class Format:
    """How facts reach the model and its answers come back.

    Args:
        codebooks: of each side; 0 is text alone, 8 Moshi's 17 streams with their delays.
        weights: of the losses of what is said and what is not.
        base_rows: talks in a batch of the model's own training.
    """

    codebooks: int = 0
    weights: LossWeights = USUAL_WEIGHTS
    base_rows: int = 64

    @property
    def heard(self) -> int:
        """The stream that carries the facts."""
        return 1 + self.codebooks if self.codebooks else 0

    def config(self) -> dict:
        """Of a model with two layers, as Kyutai's `config.json`."""
        delays = [0] + [1] * (self.codebooks - 1)
        return {
            "model_type": "moshi" if self.codebooks else "helium",
            "card": CARD,
            "n_q": 2 * self.codebooks,
            "dep_q": self.codebooks,
            "delays": [0, *delays, *delays] if self.codebooks else [0],
            "dim": WIDTH,
            "text_card": WORLD.vocabulary,
            "existing_text_padding_id": 3,
            "num_heads": 2,
            "num_layers": 2,
            "hidden_scale": 4.125,
            "causal": True,
            "layer_scale": None,
            "context": WINDOW,
            "max_period": 10000.0,
            "gating": "silu",
            "norm": "rms_norm_f32",
            "positional_embedding": "rope",
            "depformer_dim": 32,
            "depformer_num_heads": 1,
            "depformer_num_layers": 1,
            "depformer_dim_feedforward": 96,
            "depformer_multi_linear": True,
            "depformer_pos_emb": "none",
            "depformer_weights_per_step": True,
            "cross_attention": False,
        }

    def tensors(self, some: Talks, lm: Lm) -> tuple[mx.array, mx.array]:
        """Inputs `[B, S, T]` and targets `[B, 1 + K, T]` of `Learner`."""
        if not self.codebooks:
            return mx.array(some.inputs[:, None]), mx.array(some.targets[:, None])
        line = delayed(spoken(some, WORLD, self.codebooks), lm.cfg)
        return cut(line, lm.cfg, 0, some.inputs.shape[1])


TEXT = Format()
SPOKEN = Format(8, LossWeights(text_padding=0.05, first_codebook=1.0), base_rows=32)


@dataclass(frozen=True)
class Budget:
    """How much training and measuring.

    Args:
        base_steps, base_rate: of the model's training, on talks of 64 tokens.
        warm_steps: of the memory, on talks of 96 tokens, then
        steps: on talks of 192 tokens.
        rows, rate: of the memory's batches.
        probes: rows of each probe, at 12 questions.
        hour_rows: of the probe over an hour; 0 leaves it out.
    """

    base_steps: int = 700
    base_rate: float = 3e-3
    warm_steps: int = 200
    steps: int = 800
    rows: int = 16
    rate: float = 6e-3
    probes: int = 64
    hour_rows: int = 8


FULL, QUICK = Budget(), Budget(4, 3e-3, 2, 2, 2, 6e-3, 2, 0)


def new_model(form: Format) -> Lm:
    """Untrained, ready for this package's caches."""
    lm = build_lm(lm_config(form.config(), name="recall"), "recall")
    prepare(lm)
    return lm


def load_base(form: Format, folder: Path, name: str) -> Lm:
    """What `save_base` kept."""
    lm = new_model(form)
    lm.load_weights(str(folder / f"{name}.safetensors"))
    mx.eval(lm.parameters())
    return lm


def save_base(lm: Lm, folder: Path, name: str) -> None:
    mx.save_safetensors(str(folder / f"{name}.safetensors"), dict(tree_flatten(lm.parameters())))


def base_talks(rng: random.Random, step: int, rows: int, budget: Budget) -> Talks:
    """Decks first, then half of them, then facts and questions."""
    sixth = budget.base_steps // 6
    share = 1.0 if step < sixth else 0.5 if step < 2 * sixth else 0.0
    if rng.random() < share:
        return decks(rng, WORLD, rows, 64)
    return talks(rng, WORLD, rows, 64, Mix(near=NEAR, p_fact=0.4, most=6))


def base_loss(form: Format, lm: Lm, before: nn.Linear, inputs, targets) -> mx.array:
    """The format's loss, and the token before each token, told by the first layer.

    To know what came before is the first half of copying; taught by itself it is found at once.
    """
    caches = make_window_cache(lm.transformer)
    first, second = lm.transformer.layers
    below = first(embed_frame(lm, inputs), cache=caches[0])
    hidden = lm.out_norm(second(below, cache=caches[1]))
    nll = text_losses(lm, hidden, targets)
    if form.codebooks:
        nll = mx.concatenate([nll, audio_losses(lm, hidden, targets)], axis=1)
    weights = target_weights(targets, lm.cfg, form.weights)
    heard = inputs[:, form.heard]
    previous = nn.losses.cross_entropy(before(below[:, 1:]), heard[:, :-1])
    return weighted_loss(nll, weights, totals(weights)) + 0.3 * mx.mean(previous)


def train_base(form: Format, seed: int, budget: Budget, report: Report = say) -> Lm:
    """A model that recalls facts inside its window, and nothing else."""
    mx.random.seed(seed)
    rng = random.Random(seed)
    lm, before = new_model(form), nn.Linear(WIDTH, max(CARD, WORLD.vocabulary) + 1)
    schedule = Schedule(budget.base_steps, 50, floor=0.0)
    optimizer = Optimizer({"base": budget.base_rate}, schedule, betas=BETAS)
    params = {"lm": lm.trainable_parameters(), "before": before.trainable_parameters()}

    def loss(params, inputs, targets):
        lm.update(params["lm"])
        before.update(params["before"])
        return base_loss(form, lm, before, inputs, targets)

    gradients = mx.value_and_grad(loss)
    for step in range(budget.base_steps):
        some = base_talks(rng, step, form.base_rows, budget)
        value, grads = gradients(params, *form.tensors(some, lm))
        params = optimizer.update({"base": params}, {"base": grads})[0]["base"]
        mx.eval(params)
        if step % 100 == 99:
            report(f"base, seed {seed}, update {step + 1}: loss {value.item():.3f}")
    lm.update(params["lm"])
    return lm


def memory_talks(rng: random.Random, step: int, budget: Budget) -> Talks:
    """Short talks first, then up to four windows; a third of the questions inside the window.

    Facts are told as often as they can be, so that the memory is soon as full as after a long talk.
    """
    far, tokens = ((34, 64), 96) if step < budget.warm_steps else ((34, 120), 192)
    return talks(rng, WORLD, budget.rows, tokens, Mix(near=NEAR, far=far, p_near=0.3, p_fact=0.4))


def train_memory(form: Format, lm: Lm, seed: int, budget: Budget, report: Report = say) -> list:
    """Train the model's memory, the base frozen; the loss of every update."""
    rng = random.Random(1000 + seed)
    learner = Learner(
        lm, find_memory(lm), attention=Attention(WINDOW), weights=form.weights, recompute=False
    )
    steps = budget.warm_steps + budget.steps
    schedule = Schedule(steps, 20, floor=0.05)
    optimizer = Optimizer({"memory": budget.rate}, schedule, betas=BETAS, gate_speed=10)
    params, losses = learner.parameters(), []
    for step in range(steps):
        inputs, targets = form.tensors(memory_talks(rng, step, budget), lm)
        segment, grads = learner.gradients(params, None, inputs, targets, learner.total(targets))
        params, _ = optimizer.update(params, grads)
        mx.eval(params)
        losses.append(segment.loss.item())
        if step % 100 == 99:
            report(f"memory, seed {seed}, update {step + 1}: loss {np.mean(losses[-50:]):.3f}")
    learner.install(params)
    return losses
