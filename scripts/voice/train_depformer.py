"""Teach the depformer alone, at last: it says what the other layers have decided, and they stay.

    python -m voice.train_depformer MODEL SHARDS OUT [--steps 1600]      (in scripts/)

What the depformer reads of a talk, the other layers' output, is computed once for all talks. OUT is
MODEL with another depformer; its words stay what they are, but for what it hears of its own voice.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm
from rich.progress import track

from moshi_ttt_mlx import load
from moshi_ttt_mlx.train.data import find_shards
from moshi_ttt_mlx.train.loss import audio_losses, counts

from .hearing import heard_by_layers

TALKS = 25  # at a time
FRAMES = 3072  # of an update
SPOKEN = 4 / 5  # of them; the others are any
QUIET = 2  # codes of the first codebook that silence has
WARMUP, EVERY = 50, 50  # updates


def batches(shards: Path) -> Iterator[np.ndarray]:
    """Codes `[B, S, T]` of talks of a length."""
    talks = (shard.codes() for shard in find_shards(shards))
    for _, alike in groupby(talks, lambda codes: codes.shape):
        alike = list(alike)
        for begin in range(0, len(alike), TALKS):
            yield np.stack(alike[begin : begin + TALKS])


def read_by_depformer(lm: Lm, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each frame's hidden state, float16 `[B * T, D]`, and targets, int32 `[B * T, 1 + K]`."""
    hidden, targets = heard_by_layers(lm, codes, "on")
    flat = np.array(targets.swapaxes(1, 2)).reshape(-1, targets.shape[1])
    return np.array(hidden.astype(mx.float16)).reshape(len(flat), -1), flat


def spoken(targets: np.ndarray) -> np.ndarray:
    """Frames in which the model says something: neither silence nor left out of learning."""
    first = targets[:, 1]
    codes, often = np.unique(first[first >= 0], return_counts=True)
    quiet = codes[np.argsort(-often)[:QUIET]]
    return np.flatnonzero(~np.isin(first, quiet) & (first >= 0))


def loss(lm: Lm, hidden: mx.array, targets: mx.array) -> mx.array:
    """Mean of each codebook, `[K]`, of hidden states `[N, 1, D]` and targets `[N, 1 + K, 1]`."""
    told = counts(targets, lm.cfg)[:, 1:].sum(axis=(0, 2))
    return audio_losses(lm, hidden, targets).sum(axis=(0, 2)) / mx.maximum(told, 1)


def learn(lm: Lm, hidden: np.ndarray, targets: np.ndarray, args: argparse.Namespace) -> None:
    """Updates of the depformer alone, all codebooks alike."""
    rng, said = np.random.default_rng(args.seed), spoken(targets)
    print(f"{len(targets)} frames, {len(said)} with speech", flush=True)
    # `train.optimizer` corrects the moments' bias: it would not give the bundled weights' numbers.
    rise = linear_schedule(0, args.rate, WARMUP)
    fall = cosine_decay(args.rate, args.steps - WARMUP, args.rate / 50)
    optimizer = AdamW(join_schedules([rise, fall], [WARMUP]), betas=[0.9, 0.95], weight_decay=0.01)

    def each(*batch: mx.array) -> tuple[mx.array, mx.array]:
        losses = loss(lm, *batch)
        return losses.mean(), losses

    gradients, means = nn.value_and_grad(lm.depformer, each), []
    many = round(SPOKEN * FRAMES)
    for step in range(1, args.steps + 1):
        chosen = np.concatenate(
            [rng.choice(said, many), rng.integers(0, len(targets), FRAMES - many)]
        )
        batch = hidden[chosen, None].astype(np.float32), targets[chosen, :, None]
        (_, losses), grads = gradients(*map(mx.array, batch))
        optimizer.update(lm.depformer, clip_grad_norm(grads, 1.0)[0])
        mx.eval(lm.depformer.parameters(), optimizer.state)
        means.append(np.array(losses))
        if step % EVERY == 0:
            print(step, np.round(np.mean(means, axis=0), 3).tolist(), flush=True)
            means.clear()


def write(lm: Lm, model: Path, out: Path) -> None:
    """MODEL's folder with this depformer."""
    shutil.copytree(model, out, dirs_exist_ok=True)
    path = out / "model.safetensors"
    arrays, made = mx.load(str(model / path.name)), dict(tree_flatten(lm.parameters()))
    for name in arrays:
        if name.startswith("depformer."):
            arrays[name] = made[name].astype(arrays[name].dtype)
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "shards", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    mx.set_default_device(mx.cpu)
    lm = load(str(args.model)).lm
    lm.set_dtype(mx.float32)
    found = [read_by_depformer(lm, codes) for codes in track(list(batches(args.shards)), "talks")]
    learn(lm, *(np.concatenate(part) for part in zip(*found, strict=True)), args)
    write(lm, args.model, args.out)


if __name__ == "__main__":
    main()
