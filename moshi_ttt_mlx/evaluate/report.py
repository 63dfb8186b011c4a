"""Means, errors over talks, and the baseline: an `Evaluation` as numbers that can be read.

    document = describe(found, lm.cfg)      # plain values, for JSON, tables and plots
    document["variants"]["on"]["all"]["words"]["nll"]

A mean counts tokens, not talks. Its standard error is over talks, which are independent; tokens of
one talk are not. It is that of a ratio of sums (Cochran 1977, Sampling Techniques, section 6.4):
`sqrt(n/(n-1) sum_i (S_i - m N_i)^2) / sum_i N_i`, for talks of `N_i` tokens and summed loss `S_i`.
Differences from the exact window are taken talk by talk, which removes what makes one talk harder
than another.
"""

import math
from itertools import pairwise

import numpy as np
from moshi_mlx.models import LmConfig

from ..train.data import Shard
from .nll import BASELINE, VARIANTS, Evaluation

# A mean must be so many standard errors below guessing to count as better.
_ERRORS_BELOW = 2


def stream_names(config: LmConfig) -> list[str]:
    """`text` (padding too), `words` (text that is said), `codebooks` (all), `codebook 1`, .."""
    each = [f"codebook {k}" for k in range(1, 1 + config.generated_codebooks)]
    return ["text", "words", *(["codebooks"] if each else []), *each]


def guessing(config: LmConfig) -> dict[str, float]:
    """Nats of someone who takes all tokens as equally likely, by stream."""
    codes = math.log(config.audio_vocab_size - 1)
    text = {"text": math.log(config.text_out_vocab_size)}
    return text | {n: codes for n in stream_names(config) if n.startswith("codebook ")}


def mean_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, float | None]:
    """Mean loss of a token, and its standard error over talks.

    Args:
        sums, counts: by talk `[talks]`: summed loss and number of tokens.

    Returns:
        The mean, None without tokens; the error, None for fewer than two talks with tokens.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    talks, total = len(counts), counts.sum()
    if not talks:
        return None, None
    mean = float(sums.sum() / total)
    if talks == 1:
        return mean, None
    squares = ((sums - mean * counts) ** 2).sum() * talks / (talks - 1)
    return mean, float(math.sqrt(squares) / total)


def describe(found: Evaluation, config: LmConfig) -> dict:
    """All that was measured, as plain values."""
    window, edges = found.settings.window, _used_edges(found)
    buckets = [_bucket_name(window, *edge) for edge in pairwise(edges)]
    variants = {
        name: {
            "meaning": VARIANTS[name].meaning,
            "memory_broke_in": [talk.name for talk in found.broken(name)],
            "all": _streams(found, name, slice(None), config),
            "by_position": {
                bucket: _streams(found, name, slice(i, i + 1), config)
                for i, bucket in enumerate(buckets)
            },
        }
        for name in found.scores
    }
    return {
        "unit": "nats per token; se: standard error over talks",
        "window": window,
        "streams": stream_names(config),
        "positions": {
            b: [start, stop] for b, (start, stop) in zip(buckets, pairwise(edges), strict=True)
        },
        "baseline": _baseline(variants[BASELINE]["all"], config),
        "variants": variants,
        "not_run": found.not_run,
        "talks": [_talk(*pair) for pair in zip(found.talks, found.donors, strict=True)],
        "skipped": [{"path": str(path), "reason": reason} for path, reason in found.skipped],
    }


def _used_edges(found: Evaluation) -> list[int]:
    """Without the last buckets, if the talks that would reach them were skipped."""
    longest = max(talk.frames for talk in found.talks)
    return [0, *(high for low, high in pairwise(found.edges) if low < longest)]


def _bucket_name(window: int, start: int, stop: int) -> str:
    return f"{start // window}-{stop // window}W"


def _talk(talk: Shard, donor: Shard) -> dict:
    return {"name": talk.name, "path": str(talk.path), "frames": talk.frames, "donor": donor.name}


def _streams(found: Evaluation, name: str, buckets: slice, config: LmConfig) -> dict[str, dict]:
    """By stream: mean, error, tokens, talks; and the difference from the exact window."""
    own = _with_all_codebooks(found.sums(name)[:, buckets].sum(axis=1))
    base = _with_all_codebooks(found.sums(BASELINE)[:, buckets].sum(axis=1))
    result = {}
    for k, stream in enumerate(stream_names(config)):
        counts = own[:, 1, k]
        mean, error = mean_and_error(own[:, 0, k], counts)
        entry = {"nll": mean, "se": error}
        if name != BASELINE:
            difference = mean_and_error(own[:, 0, k] - base[:, 0, k], counts)
            entry |= dict(zip(("minus_exact", "minus_exact_se"), difference, strict=True))
        result[stream] = entry | {"tokens": int(counts.sum()), "talks": int((counts > 0).sum())}
    return result


def _with_all_codebooks(sums: np.ndarray) -> np.ndarray:
    """`[talks, 2, 2 + K]` -> `[talks, 2, 3 + K]`, the sum over codebooks in front of them."""
    text, codebooks = sums[:, :, :2], sums[:, :, 2:]
    if not codebooks.shape[2]:
        return text
    return np.concatenate([text, codebooks.sum(axis=2, keepdims=True), codebooks], axis=2)


def _baseline(streams: dict[str, dict], config: LmConfig) -> dict:
    """Whether the model, without any memory, knows more than someone who guesses."""
    entries = {}
    for stream, nats in guessing(config).items():
        nll, error = streams[stream]["nll"], streams[stream]["se"] or 0.0
        beaten = nll is not None and nll + _ERRORS_BELOW * error < nats
        entries[stream] = {"nll": nll, "guessing": nats, "beaten": beaten}
    return {"beaten": all(e["beaten"] for e in entries.values()), "streams": entries}


def verdict(document: dict) -> str:
    """One line about the baseline."""
    streams = document["baseline"]["streams"]
    failed = [name for name, entry in streams.items() if not entry["beaten"]]
    if not failed:
        return "baseline: the model without memory beats guessing in every stream"
    shown = ", ".join(
        f"{n} {_nats(streams[n]['nll'])} of {streams[n]['guessing']:.3f}" for n in failed
    )
    return (
        f"NO BETTER THAN GUESSING (nats, of ln of the vocabulary): {shown}. The model is untrained, or "
        "the shards are another codec's: no difference below means anything"
    )


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
