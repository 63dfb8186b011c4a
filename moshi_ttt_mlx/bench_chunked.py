"""Many tokens in one call against one token a call: speed and peak memory of the memory's learner.

The two are the same function (`ttt.py`); this measures what the cut costs. Times are the best of
turns taken in one process, since a busy machine only ever adds to them.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import mlx.core as mx
from mlx import nn
from moshi_mlx.models import Lm

from .bench_memory import add_open_memory
from .layers import make_memory_cache, use_window_attention
from .ttt import TTTMLP, InnerLearner, Rules, TTTLinear

Run = Callable[[int], object]  # plays a run of tokens in calls of so many; returns arrays


@dataclass(frozen=True)
class Case:
    """One row: what is run, and for how many tokens."""

    name: str
    run: Run
    tokens: int


def _inputs(heads: int, width: int, tokens: int) -> dict[str, mx.array]:
    """Seeded tokens; queries and keys of length 1, as `TTTMemory` makes them."""
    keys = mx.random.split(mx.random.key(0), 3)
    q, k, v = (mx.random.normal((1, heads, tokens, width), key=key) for key in keys)
    q, k = (a * mx.rsqrt(mx.sum(a * a, axis=-1, keepdims=True)) for a in (q, k))
    made = {"q": q, "k": k, "v": v, "lr": mx.full((1, heads, tokens), 2 * width**-0.5)}
    mx.eval(made)
    return made


def _play(learner: InnerLearner, tokens: dict[str, mx.array], size: int, wait: bool) -> list:
    """Answers of all tokens, `size` of them a call; `wait` for each call, as a talk does."""
    state, outs = learner.init_state(1), []
    for start in range(0, tokens["q"].shape[2], size):
        part = {name: a[:, :, start : start + size] for name, a in tokens.items()}
        out, state = learner(**part, state=state)
        outs.append(out)
        if wait:
            mx.eval(out, state.arrays())
    return [*outs, state.arrays()]


def learner_case(name: str, learner: InnerLearner, tokens: int) -> Case:
    """The learner alone, in calls as in a talk or a prefill."""
    inputs = _inputs(*learner.gamma.shape, tokens)
    mx.eval(learner.parameters())
    return Case(name, lambda size: _play(learner, inputs, size, wait=True), tokens)


def training_case(name: str, learner: InnerLearner, tokens: int) -> Case:
    """A loss on all answers and its gradient for every parameter, forward and back."""
    inputs = _inputs(*learner.gamma.shape, tokens)
    mx.eval(learner.parameters())

    def run(size: int):
        def loss(of: InnerLearner) -> mx.array:
            *outs, _ = _play(of, inputs, size, wait=False)
            return sum(mx.mean(out * out) for out in outs)

        return nn.value_and_grad(learner, loss)(learner)

    return Case(name, run, tokens)


def model_case(name: str, lm: Lm, tokens: int) -> Case:
    """A model's temporal transformer with its memory: frame by frame, or all frames at once."""
    xs = mx.random.normal((1, tokens, lm.cfg.transformer.d_model), key=mx.random.key(0))
    use_window_attention(lm.transformer)
    mx.eval(xs)

    def run(size: int):
        caches = make_memory_cache(lm.transformer)
        for start in range(0, tokens, size):
            out = lm.transformer(xs[:, start : start + size], cache=caches)
            mx.eval(out, [cache.self_attn.state for cache in caches])
        return out

    return Case(name, run, tokens)


def _seconds(run: Run, size: int) -> float:
    begin = time.perf_counter()
    mx.eval(run(size))
    return time.perf_counter() - begin


def _peak_bytes(case: Case, size: int) -> int:
    before = mx.get_active_memory()
    mx.clear_cache()  # a larger buffer that was left over would be taken, and counted
    mx.reset_peak_memory()
    mx.eval(case.run(size))
    return mx.get_peak_memory() - before


@dataclass(frozen=True)
class Measured:
    """Tokens a second of one case in calls of one token and in one call, and the peak of each."""

    name: str
    tokens: int
    streaming: float
    chunked: float
    ratio: float
    streaming_peak: int
    chunked_peak: int


def measure(case: Case, turns: int) -> Measured:
    """Take turns; the best of each counts."""
    sizes = (1, case.tokens)
    peaks = [_peak_bytes(case, size) for size in sizes]  # also builds what is built once
    times = [[_seconds(case.run, size) for size in sizes] for _ in range(turns)]
    speeds = [case.tokens / min(of_one) for of_one in zip(*times, strict=True)]
    return Measured(case.name, case.tokens, *speeds, speeds[1] / speeds[0], *peaks)


def cases(lm: Lm) -> list[Case]:
    """What `bench` shows at `C = 16`: small learners, one as wide as Moshi, training, and `lm`.

    The learners' sizes are fixed, so that figures of different days compare; the memory in `lm` has
    the default ones.

    Args:
        lm: left with a memory in half of its layers.
    """
    rules = Rules(target="standardized")
    add_open_memory(lm)
    return [
        learner_case("MLP, 4 x 32, hidden 64", TTTMLP(4, 32, 64, rules), 512),
        learner_case("linear, 4 x 32", TTTLinear(4, 32, rules), 512),
        learner_case("MLP, 32 x 128, hidden 512", TTTMLP(32, 128, 512, rules), 64),
        training_case("MLP, 4 x 32, training", TTTMLP(4, 32, 64, rules), 128),
        training_case("MLP, 4 x 32, training", TTTMLP(4, 32, 64, rules), 256),
        model_case("tiny model, memory in half its layers", lm, 512),
    ]


def compare_chunked(lm: Lm, turns: int = 3) -> dict:
    """All cases; the JSON keys of this section."""
    return {"chunked": [asdict(measure(case, turns)) for case in cases(lm)]}
