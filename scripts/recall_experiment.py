#!/usr/bin/env python
"""Does a memory recall what has left attention's window? From nothing, on a CPU, in parts that resume.

    python scripts/recall_experiment.py                      # the default memory, three seeds
    python scripts/recall_experiment.py --variants all       # the whole table
    python scripts/recall_experiment.py --report-only        # tables and plots of what is there

For each seed a small `Lm` of moshi_mlx's learns to recall facts inside its window. Then it is frozen,
and each variant of a memory is trained on distances up to four windows, and measured up to sixteen and
an hour away. The variant `spoken` has the same facts in Moshi's 17 streams, and is measured through
the generator, frame by frame. Every finished part is a file in `--work`: a run that was stopped goes
on with the parts that are missing. `docs/evidence.md` says what came out.
"""

import argparse
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from moshi_mlx.models import Lm
from recall import report
from recall.gated_delta import GatedDelta
from recall.training import (
    DISTANCES,
    FULL,
    QUICK,
    SPOKEN,
    TEXT,
    WINDOW,
    WORLD,
    Budget,
    load_base,
    save_base,
    train_base,
    train_memory,
)
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moshi_ttt_mlx.evaluate.recall import Talks, answers, probe
from moshi_ttt_mlx.evaluate.recall_spoken import talk_answers
from moshi_ttt_mlx.layers import make_memory_cache
from moshi_ttt_mlx.memory import MemoryConfig
from moshi_ttt_mlx.surgery import add_memory, find_memory, save_adapter
from moshi_ttt_mlx.train.loss import token_losses

HOUR = 45_000  # frames of 80 ms
DEFAULT = MemoryConfig(layers="top:1")
BASES = {"base": TEXT, "spoken base": SPOKEN}


@dataclass(frozen=True)
class Variant:
    """A memory to compare.

    Args:
        config: of the memory; None is attention's window alone.
        inherit: start from the attention it sits beside.
        rival: a gated-delta matrix memory in the inner learner's place.
    """

    config: MemoryConfig | None
    inherit: bool = True
    rival: bool = False


VARIANTS = {
    "default": Variant(DEFAULT),
    "window alone": Variant(None),
    "cache, slots": Variant(replace(DEFAULT, read="slots", slots=24)),
    "after": Variant(replace(DEFAULT, placement="after")),
    "replace": Variant(replace(DEFAULT, placement="replace")),
    "forgetting": Variant(replace(DEFAULT, forget="init")),
    # 8 heads of 64 have as large a state as 2 heads of 64 with a hidden width of 128.
    "TTT-Linear": Variant(replace(DEFAULT, inner="linear", heads=8)),
    "gated delta": Variant(replace(DEFAULT, heads=8, base_lr=64.0, forget="zero"), rival=True),
    "random start": Variant(DEFAULT, inherit=False),
}


def put_memory(lm: Lm, variant: Variant) -> None:
    """The variant's memory into the model, untrained."""
    for memory in add_memory(lm, variant.config).memories.values():
        if not variant.inherit:
            for name in ("q_proj", "k_proj", "v_proj", "key_proj", "value_proj"):
                rows, columns = memory[name].weight.shape
                memory[name].weight = nn.Linear(columns, rows, bias=False).weight
        if variant.rival:
            memory.learner = GatedDelta(variant.config.heads, variant.config.head_dim)
            memory.rate.bias = mx.zeros_like(memory.rate.bias)  # at first half of what is new


# -- measuring ----------------------------------------------------------------------------------


def in_window(some: Talks) -> np.ndarray:
    """Questions whose fact attention still sees: bool `[B, T]`."""
    return (some.targets >= 0) & (some.distances < WINDOW)


def measure(lm: Lm, seed: int, budget: Budget) -> dict:
    """All that the table says about one model with its memory."""

    def ask(distance, variant="plain", rows=budget.probes, **how) -> tuple[float, float]:
        """Share of right answers at the distance, and of those inside the window."""
        some = probe(random.Random(77 + seed), WORLD, rows, distance, variant)
        right, near = answers(lm, some, WINDOW, **how), in_window(some)
        return float(right[some.far].mean()), float(right[near].mean()) if near.any() else 1.0

    plain = {name: ask(distance) for name, distance in DISTANCES.items()}
    off = {name: ask(distance, mode="off") for name, distance in DISTANCES.items()}
    found = {
        "recall": _far(plain),
        "in_window": float(np.mean([near for _, near in plain.values()])),
        "in_window_base": float(np.mean([near for _, near in off.values()])),
        "memory_off": _far(off),
        "overwritten": {n: ask(d, "overwritten")[0] for n, d in DISTANCES.items() if d >= 96},
        "noise": {"16W": ask(DISTANCES["16W"], "noise")[0]},
    }
    if budget.hour_rows:
        found["noise"]["1 h"] = ask(HOUR, "noise", budget.hour_rows)[0]
    adapter = find_memory(lm)
    if adapter is None:
        return found
    found["shuffled"] = {n: ask(d, shuffle=True)[0] for n, d in DISTANCES.items()}
    for memory in adapter.memories.values():
        memory.gate = mx.zeros_like(memory.gate)
    found["gate_closed"] = {n: ask(d)[0] for n, d in DISTANCES.items()}
    return found


def measure_spoken(lm: Lm, seed: int, budget: Budget) -> dict:
    """Through the generator, frame by frame: the model hears the user and feeds on its own words."""
    found = {group: {} for group in ("recall", "voice", "memory_off")}
    near, near_off, silent = [], [], []
    for name, distance in DISTANCES.items():
        some = probe(random.Random(77 + seed), WORLD, budget.probes // 2, distance)
        close = in_window(some)
        on = talk_answers(lm, some, WORLD, WINDOW)
        off = talk_answers(lm, some, WORLD, WINDOW, mode="off")
        found["recall"][name] = float(on.text[some.far].mean())
        found["voice"][name] = float(on.sound[some.far].mean())
        found["memory_off"][name] = float(off.text[some.far].mean())
        near.append(float(on.text[close].mean()))
        near_off.append(float(off.text[close].mean()))
        silent.append(on.silent)
    found["stream_difference"] = stream_difference(lm, some)
    names = "in_window", "in_window_base", "silent"
    means = (float(np.mean(values)) for values in (near, near_off, silent))
    return found | dict(zip(names, means, strict=True))


def stream_difference(lm: Lm, some: Talks) -> float:
    """Largest difference of a token's loss, nats: all frames of some talks at once, or one at a time."""
    inputs, targets = SPOKEN.tensors(Talks(*(x[:4, :192] for x in some[:4])), lm)
    losses = []
    for step in (inputs.shape[2], 1):
        caches = make_memory_cache(lm.transformer, WINDOW, batch=len(inputs))
        parts = []
        for t in range(0, inputs.shape[2], step):
            frames = slice(t, t + step)
            parts.append(token_losses(lm, inputs[:, :, frames], targets[:, :, frames], caches))
            mx.eval(parts[-1], [cache.self_attn.state for cache in caches])
        losses.append(mx.concatenate(parts, axis=2))
    return mx.max(mx.abs(losses[0] - losses[1])).item()


def _far(asked: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {name: far for name, (far, _) in asked.items()}


# -- parts --------------------------------------------------------------------------------------


def run_part(name: str, seed: int, work: Path, budget: Budget) -> Path:
    """Train and measure one part with one seed, unless its file is there."""
    folder = work / f"seed_{seed}"
    done = folder / f"{name}.json"
    if done.exists():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    if name in BASES:
        save_base(train_base(BASES[name], seed, budget), folder, name)
        part = {}
    elif name == "spoken":
        part = _run_spoken(seed, folder, budget)
    else:
        part = _run_variant(name, seed, folder, budget)
    part["cpu_seconds"] = time.process_time() - started
    half = done.with_suffix(".tmp")
    half.write_text(json.dumps(part))
    half.replace(done)
    return done


def _run_spoken(seed: int, folder: Path, budget: Budget) -> dict:
    lm = load_base(SPOKEN, folder, "spoken base")
    mx.random.seed(seed)
    put_memory(lm, VARIANTS["default"])
    losses = train_memory(SPOKEN, lm, seed, budget)
    save_adapter(find_memory(lm), folder / "spoken")
    return {"loss": losses} | measure_spoken(lm, seed, budget)


def _run_variant(name: str, seed: int, folder: Path, budget: Budget) -> dict:
    lm, variant, part = load_base(TEXT, folder, "base"), VARIANTS[name], {}
    mx.random.seed(seed)
    if variant.config is not None:
        put_memory(lm, variant)
        part["loss"] = train_memory(TEXT, lm, seed, budget)
        save_adapter(find_memory(lm), folder / name)
    return part | measure(lm, seed, budget)


def run_parts(names, seeds, work: Path, budget: Budget, jobs: int) -> None:
    """The bases, then the variants; a bar, and a line for each finished part."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        ProcessPoolExecutor(jobs, get_context("spawn")) as pool,
        Progress(*columns) as bar,
    ):
        bases = {"spoken base" if name == "spoken" else "base" for name in names}
        for what, group in (("bases", sorted(bases)), ("memories", names)):
            task = bar.add_task(what, total=len(group) * len(seeds))
            parts = [
                pool.submit(run_part, name, seed, work, budget) for name in group for seed in seeds
            ]
            for part in as_completed(parts):
                bar.console.print(report.line(part.result()), highlight=False, soft_wrap=True)
                bar.advance(task)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("recall_work"), help="finished parts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["default"], metavar="NAME", help="or all")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time, a core each")
    parser.add_argument("--docs", type=Path, help="folder of evidence.md; default: --work")
    parser.add_argument("--quick", action="store_true", help="a few updates, to see that it runs")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    args = parser.parse_args()
    known = [*VARIANTS, "spoken"]
    names = known if args.variants == ["all"] else args.variants
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no variant {unknown[0]!r}; there are {', '.join(known)}")
    if not args.report_only:
        run_parts(names, args.seeds, args.work, QUICK if args.quick else FULL, args.jobs)
    report.write(args.work, known, WORLD.chance, args.docs or args.work)


if __name__ == "__main__":
    main()
