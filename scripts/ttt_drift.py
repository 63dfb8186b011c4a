"""How far does an hour of float32 wander from float64?

Feeds the same tokens (12.5 a second, so 45,000 an hour) to the same inner learner in both precisions
and prints, at a few moments, the relative difference of the last thousand answers and of the
weights, how far the weights have travelled, and how large the last fold was.

    python scripts/ttt_drift.py
    python scripts/ttt_drift.py --kind mlp --heads 4 --rate 20

Tokens are correlated in time as speech frames are; keys and queries have unit variance, values follow
a map of the keys that itself turns slowly, so that there is always something left to learn.
"""

import argparse
import time

import mlx.core as mx
import numpy as np

from moshi_ttt_mlx.ttt import TTTMLP, InnerLearner, Rules, TTTLinear, TTTState

FRAME_RATE = 12.5
BLOCK = 1000


def make_learner(kind: str, args: argparse.Namespace, dtype: mx.Dtype) -> InnerLearner:
    """The same learner in either precision: float32 numbers, widened where float64 is asked for."""
    mx.random.seed(args.seed)
    rules = Rules(mini_batch=args.mini_batch)
    if kind == "linear":
        learner = TTTLinear(args.heads, args.head_dim, rules)
    else:
        learner = TTTMLP(args.heads, args.head_dim, args.hidden, rules)
    learner.gamma = 1 + 0.1 * mx.random.normal(learner.gamma.shape)
    learner.beta = 0.1 * mx.random.normal(learner.beta.shape)
    learner.token_idx = 0.1 / args.mini_batch * mx.random.normal(learner.token_idx.shape)
    learner.set_dtype(dtype)
    return learner


class Talk:
    """An endless stream of blocks `q, k, v [1, H, T, f]`, `lr [1, H, T]`, float32 in numpy."""

    def __init__(self, args: argparse.Namespace):
        self.rng = np.random.default_rng(args.seed)
        self.shape, self.rate = (args.heads, args.head_dim), args.rate
        self.maps = self.rng.standard_normal((2, *self.shape, args.head_dim)) / args.head_dim**0.5
        self.last = self.rng.standard_normal(self.shape)
        self.tokens = 0

    def block(self, count: int) -> list[np.ndarray]:
        """The next `count` tokens."""
        heads, f = self.shape
        x = np.empty((heads, count, f))
        for t in range(count):
            self.last = 0.9 * self.last + (1 - 0.9**2) ** 0.5 * self.rng.standard_normal(self.shape)
            x[:, t] = self.last
        turn = 2 * np.pi * (self.tokens + np.arange(count)) / (600 * FRAME_RATE)
        first, second = x @ self.maps[0], x @ self.maps[1]
        v = np.cos(turn)[:, None] * first + np.sin(turn)[:, None] * second
        q = x + 0.1 * self.rng.standard_normal(x.shape)
        lr = self.rate / (1 + np.exp(-self.rng.standard_normal((heads, count)))) / f
        self.tokens += count
        return [a[None].astype(np.float32) for a in (q, x, x + v, lr)]


def relative(a: mx.array, b: mx.array) -> float:
    """`||a - b|| / ||b||` in float64."""
    a, b = np.array(a).astype(np.float64), np.array(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def report(tokens: int, outs: list[mx.array], states: list[TTTState], wide: InnerLearner) -> str:
    """One line: moment, answers, each layer's weights, travel and step."""
    weights = [
        f"{relative(states[0].weights[n], states[1].weights[n]):.1e}"
        for n in sorted(states[1].weights)
        if n.startswith("W")
    ]
    norms = {n: float(np.array(a).mean()) for n, a in wide.norms(states[1]).items()}
    return (
        f"{tokens:7d} {tokens / FRAME_RATE / 60:6.1f}   answers {relative(*outs):.1e}   weights "
        f"{' '.join(weights)}   ||W-W0||/||W0|| {norms['drift']:.1f}   step {norms['step']:.1e}"
    )


def measure(kind: str, args: argparse.Namespace) -> None:
    """Run one kind of learner in both precisions, side by side."""
    learners = [make_learner(kind, args, dtype) for dtype in (mx.float32, mx.float64)]
    states = [learner.init_state(1) for learner in learners]
    talk, start = Talk(args), time.perf_counter()
    marks = {BLOCK, 10 * BLOCK, args.tokens}
    print(f"{kind}: {args.heads} heads of {args.head_dim}, mini-batch {args.mini_batch}")
    while talk.tokens < args.tokens:
        block, outs = talk.block(min(BLOCK, args.tokens - talk.tokens)), []
        for i, dtype in enumerate((mx.float32, mx.float64)):
            out, states[i] = learners[i](*(mx.array(a).astype(dtype) for a in block), states[i])
            mx.eval(out, states[i].arrays())
            outs.append(out)
        if talk.tokens in marks:
            print(report(talk.tokens, outs, states, learners[1]), flush=True)
    print(f"{states[0].updates} updates, {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Parse the arguments and measure the kinds asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=["linear", "mlp", "both"], default="both")
    parser.add_argument("--tokens", type=int, default=45_000)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mini-batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.0, help="base learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    for kind in ("linear", "mlp") if args.kind == "both" else (args.kind,):
        measure(kind, args)


if __name__ == "__main__":
    main()
