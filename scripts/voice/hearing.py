"""How much a model understands, word by word: the share of keys and values that it writes down rightly.

    python -m voice.hearing MODEL SHARDS ...      (in scripts/)

Teacher-forced, without memory, all frames at once: each word is judged with what was really said before
it, so one that was misheard spoils none behind it. SHARDS come from `voice.remix --wear 0`; for voices
that are kept for testing, from tapes of theirs (`voice.dialogues --voices af_nova`).
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from moshi_mlx.models import Lm

from moshi_ttt_mlx import load
from moshi_ttt_mlx.layers import make_memory_cache
from moshi_ttt_mlx.memory import Mode
from moshi_ttt_mlx.model import Model
from moshi_ttt_mlx.train.data import find_shards
from moshi_ttt_mlx.train.loss import cut, delayed, hidden_states, prepare

from .world import ALL_VALUES, KEYS

BATCH = 32  # talks at a time


def tokens_of(model: Model, words: Iterable[str]) -> np.ndarray:
    """The tokens of words; the demo's tokenizer has one for each, with the space before it."""
    pieces = {model.piece(token): token for token in range(model.lm.cfg.text_out_vocab_size)}
    return np.array([pieces["▁" + word] for word in words])


def heard_by_layers(lm: Lm, codes: np.ndarray, memory: Mode) -> tuple[mx.array, mx.array]:
    """Talks, teacher-forced and all frames at once.

    Args:
        codes: int `[B, S, T]`, as shards hold them.

    Returns:
        What text head and depformer read, `[B, T, D]`, and the targets `[B, 1 + K, T]`.
    """
    prepare(lm)
    inputs, targets = cut(delayed(codes, lm.cfg), lm.cfg, 0, codes.shape[2])
    caches = make_memory_cache(lm.transformer, batch=len(codes), mode=memory)
    return hidden_states(lm, inputs, lambda xs: lm.transformer(xs, cache=caches)), targets


def written(model: Model, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text of talks, and what the model would write in its place: int `[B, T]`, both.

    Args:
        model: with a memory or without, it is not asked.
        codes: int `[B, S, T]`, as shards hold them.
    """
    hidden, targets = heard_by_layers(model.lm, codes, "off")
    return np.array(targets[:, 0]), np.array(mx.argmax(model.lm.text_linear(hidden), axis=-1))


def shares(model: Model, talks: Sequence[np.ndarray]) -> dict[str, tuple[int, int]]:
    """How many keys and values are right, and how many there are.

    Args:
        model: see `written`.
        talks: int `[S, T]` each, all as long.
    """
    groups = {"keys": tokens_of(model, KEYS), "values": tokens_of(model, ALL_VALUES)}
    sums = {name: np.zeros(2, int) for name in groups}
    for begin in range(0, len(talks), BATCH):
        said, guessed = written(model, np.stack(talks[begin : begin + BATCH]))
        for name, tokens in groups.items():
            here = np.isin(said, tokens)
            sums[name] += (said == guessed)[here].sum(), here.sum()
    return {name: (int(right), int(many)) for name, (right, many) in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("shards", type=Path, nargs="+", help="folders, judged apart")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model = load(args.model)
    for folder in args.shards:
        found = shares(model, [shard.codes() for shard in find_shards(folder)])
        parts = [f"{name} {100 * r / max(n, 1):.1f} % of {n}" for name, (r, n) in found.items()]
        print(f"{folder.name}: " + ", ".join(parts), flush=True)


if __name__ == "__main__":
    main()
