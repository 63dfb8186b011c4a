"""Metal, and whether the memory's kernels compute what plain MLX operations compute."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import ttt_kernels
from ..legacy import LegacyConfig, LegacyMemory
from ..memory import MemoryConfig, TTTMemory
from ..surgery import choose_memory, read_memory_config
from ..ttt import InnerLearner
from .case import Case
from .finding import Finding

WISH = "MOSHI_TTT_KERNEL"
# Rounding is 1e-6 of these magnitudes; a kernel that went wrong is off by as much as they.
AGREES = 1e-3


def check_metal(case: Case) -> Finding:
    """Whether there is Metal, and how far the memory's kernels are from plain operations."""
    if not on_metal():
        facts = {"metal": False, "kernels": "ops"}
        return Finding("metal", "ok", "no Metal here: ops", facts)
    config = _memory_config(case)
    learner = _learner(config)
    facts = {"metal": True, "kernels": "metal"}
    if not ttt_kernels.fits(config.rules, learner.init_state(1).weights):
        line = "Metal; a memory of this shape runs on plain operations"
        return Finding("metal", "ok", line, facts | {"kernels": "ops"})
    with _wishing("metal"):
        off = largest_difference(learner)
    facts["largest_difference"] = off if math.isfinite(off) else None
    if not off <= AGREES:  # also where it is no number
        line = f"the memory's kernels are off by {off:.1e}: set {WISH}=ops, and please report it"
        return Finding("metal", "problem", line, facts)
    line = f"Metal; the memory's kernels agree with plain operations to {off:.1e}"
    return Finding("metal", "ok", line, facts)


def on_metal() -> bool:
    """Whether MLX runs on a Mac's GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def _memory_config(case: Case) -> MemoryConfig:
    """Of the given adapter, else a memory's usual shape."""
    files = choose_memory(None, case.chosen.adapter_path)
    return read_memory_config(files.config) if files else MemoryConfig(layers="top:1")


def _learner(config: MemoryConfig) -> InnerLearner:
    kind = LegacyMemory if isinstance(config, LegacyConfig) else TTTMemory
    return kind(config.heads * config.head_dim, config.heads, config).learner


@contextmanager
def _wishing(way: str) -> Iterator[None]:
    before = os.environ.get(WISH)
    os.environ[WISH] = way
    try:
        yield
    finally:
        del os.environ[WISH]
        if before is not None:
            os.environ[WISH] = before


def largest_difference(learner: InnerLearner) -> float:
    """A talk's way through a learner (kernels, where they are wished for) against plain operations.

    Returns:
        The largest difference between their answers, in units of one more than the largest answer.
    """
    kernels = operations = learner.init_state(1)
    found, wanted = [], []
    for *qkv, lr in _random_tokens(learner):
        decay = None if learner.rules.forget is None else mx.full(lr.shape, 0.99)
        place = mx.array(kernels.tokens % learner.rules.mini_batch)
        answer, kernels = learner.trace(*qkv, lr, kernels, place, decay)
        kernels = learner.advance(kernels)
        found.append(answer)
        answer, operations = learner(*qkv, lr, operations, decay)
        wanted.append(answer)
    found, wanted = mx.stack(found), mx.stack(wanted)
    return (mx.max(mx.abs(found - wanted)) / (1 + mx.max(mx.abs(wanted)))).item()


def _random_tokens(learner: InnerLearner) -> Iterator[list[mx.array]]:
    """Queries, keys, values `[1, H, 1, f]` and rates `[1, H, 1]`, token by token."""
    heads, width = learner.init_state(1).weights["W1"].shape[1:3]
    # Two folds, and a mini-batch that is not full.
    for seed in range(2 * learner.rules.mini_batch + learner.rules.mini_batch // 2):
        keys = mx.random.split(mx.random.key(seed), 4)
        tokens = [mx.random.normal((1, heads, 1, width), key=key) for key in keys[:3]]
        yield [*tokens, 0.1 * mx.abs(mx.random.normal((1, heads, 1), key=keys[3]))]
