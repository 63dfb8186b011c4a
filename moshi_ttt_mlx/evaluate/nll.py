"""Negative log-likelihood by position: the same talks, read with and without a memory.

    found = evaluate(lm, adapter, talks, settings_for(lm, adapter, window=250))
    found.sums("on")                        # float64 [talks, buckets, 2, 2 + K]

Every talk is read frame after frame from its start, in segments whose state is carried, so its
length costs no memory; once for each of `VARIANTS`. The losses are those of training
(`train/loss.py`). What lives here: variants, positions, sums. What does not: means and errors
(`report.py`).

A loss is filed under the frame that made it, counted from 0. With a window of `W` keys, frame `t`
sees the whole talk as long as `t < W`, so buckets end at `W, 2W, 4W, ..`: in the first one no window
cuts anything off, and a memory can only help in the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from moshi_mlx.models import Lm
from moshi_mlx.modules.transformer import LayerCache

from ..errors import UserError
from ..kv_cache import HybridKVCache
from ..layers import make_memory_cache
from ..memory import Mode
from ..surgery import Adapter
from ..train.data import Shard
from ..train.loss import cut, delayed, hidden_states, prepare, stream_sums, token_losses

Tick = Callable[[int], None]
"""Called with the number of frames just read."""


class Variant(NamedTuple):
    """One way to read a talk.

    Attributes:
        meaning: of it, for reports.
        mode: of the memory.
        sinks: whether the first keys stay visible.
        foreign: whether the memory comes from another talk.
    """

    meaning: str
    mode: Mode = "off"
    sinks: bool = False
    foreign: bool = False


VARIANTS = {
    "exact": Variant("the window alone"),
    "sinks": Variant("the window, its first keys those of the talk", sinks=True),
    "off": Variant("the adapter in place and switched off: exact, bit for bit"),
    "on": Variant("the memory learns and is read", "on"),
    "frozen": Variant("the memory is read as it was before the talk, and never learns", "frozen"),
    "shuffled": Variant(
        "the memory is read as the first half of another talk left it, and never learns",
        "frozen",
        foreign=True,
    ),
}
BASELINE = "exact"


@dataclass(frozen=True)
class Settings:
    """How to read.

    Attributes:
        window: `W`, keys that attention sees, in every layer of every variant. (A layer's memory may
            have been trained beside fewer; it keeps to those.)
        sinks: first keys of the variant `sinks`, counted in the window; 0 leaves it out.
        segment: frames at once; changes time and space, not the numbers.
    """

    window: int
    sinks: int = 4
    segment: int = 250

    def __post_init__(self):
        if self.segment < 1:
            raise UserError(f"segment must be at least 1, got {self.segment}")
        if not 0 <= self.sinks < self.window:
            raise UserError(f"window {self.window} must be above 0 and above sinks {self.sinks}")


def settings_for(
    lm: Lm, adapter: Adapter | None, window: int | None = None, sinks: int = 4, segment: int = 250
) -> Settings:
    """The settings that suit a model.

    Args:
        window: None takes the one that the adapter was trained beside, else the model's context.
        sinks, segment: see `Settings`. An adapter that looks ahead inside a call (converted ones do,
            see `legacy.LegacyConfig`) is read one frame at a time, as it talks.

    Raises:
        UserError: out of range, or a window larger than the model's context.
    """
    context, config = lm.cfg.transformer.context, adapter.config if adapter else None
    if window is None:
        window = min((config.window if config else None) or context, context)
    if window > context:
        raise UserError(f"window {window}: this model was made for {context} keys at most")
    ahead = config is not None and not config.rules.causal
    return Settings(window, sinks, 1 if ahead else segment)


class Score(NamedTuple):
    """One talk in one variant.

    Attributes:
        sums: float64 `[buckets, 2, 2 + K]`: `loss.stream_sums` of each bucket: summed nll in nats and
            number of tokens; of all text, text that is said, each codebook.
        memory_ok: whether the memory was finite all the time.
    """

    sums: np.ndarray
    memory_ok: bool


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        settings: how.
        edges: of the buckets, in frames: bucket `i` is `edges[i] <= t < edges[i + 1]`.
        scores: by variant, the scores of `talks`, in their order.
        not_run: variants that do not apply, and why.
        talks: those that count.
        donors: whose memory each of them was read with in `shuffled`.
        skipped: files that do not count, and why.
    """

    settings: Settings
    edges: list[int]
    scores: dict[str, list[Score]]
    not_run: dict[str, str] = field(default_factory=dict)
    talks: list[Shard] = field(default_factory=list)
    donors: list[Shard] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, talk: Shard, donor: Shard, scores: dict[str, Score]) -> None:
        """Count a talk; one whose loss is not finite in some variant counts in none."""
        if wrong := [name for name, one in scores.items() if not np.isfinite(one.sums).all()]:
            self.skipped.append((talk.path, f"its loss is not finite in: {', '.join(wrong)}"))
            return
        self.talks.append(talk)
        self.donors.append(donor)
        for name, score in scores.items():
            self.scores[name].append(score)

    def sums(self, variant: str) -> np.ndarray:
        """`Score.sums` of all talks: `[talks, buckets, 2, 2 + K]`."""
        return np.stack([score.sums for score in self.scores[variant]])

    def broken(self, variant: str) -> list[Shard]:
        """Talks in which a memory was not finite, and shut out, at some time."""
        pairs = zip(self.talks, self.scores[variant], strict=True)
        return [talk for talk, score in pairs if not score.memory_ok]


# -- which variants, which positions ----------------------------------------------------------------


def choose_variants(
    adapter: Adapter | None, settings: Settings, talks: int
) -> tuple[list[str], dict[str, str]]:
    """The variants that apply, and why the others do not."""
    reasons = {}
    if not settings.sinks:
        reasons["sinks"] = "--sinks 0"
    if talks < 2:
        reasons["shuffled"] = "needs two talks"
    if adapter is None:
        reasons |= dict.fromkeys(("off", "on", "frozen", "shuffled"), "no --adapter-path")
    return [name for name in VARIANTS if name not in reasons], reasons


def position_edges(window: int, frames: int) -> list[int]:
    """Edges `[0, W, 2W, 4W, ..]` of the buckets that hold `frames` frames."""
    edges = [0, window]
    while edges[-1] < frames:
        edges.append(2 * edges[-1])
    return edges


# -- reading ----------------------------------------------------------------------------------------


class Reader:
    """Reads talks with a model.

    Args:
        lm: the model, with its memory if it has one.
        settings: how.
        tick: told of progress.
    """

    def __init__(self, lm: Lm, settings: Settings, tick: Tick = lambda frames: None):
        if lm.cfg.transformer.cross_attention:
            raise UserError(
                "models with cross-attention cannot be evaluated: shards hold no source"
            )
        prepare(lm)
        self.lm, self.settings, self.tick = lm, settings, tick

    def score(
        self, variant: str, codes: np.ndarray, donor: np.ndarray, edges: Sequence[int]
    ) -> Score:
        """One talk in one variant.

        Args:
            codes: int `[S, T]`, undelayed; alone in its batch, so nothing is padded.
            donor: the talk whose memory is read in `shuffled`.
            edges: of the buckets; the last one is at least `T`.
        """
        caches = self._caches(variant)
        if VARIANTS[variant].foreign:
            _hand_over(self._learned_from(donor), caches)
        sums, finite = np.zeros((len(edges) - 1, 2, 2 + self.lm.cfg.generated_codebooks)), True
        for start, inputs, targets in self._segments(codes, codes.shape[1]):
            nll = token_losses(self.lm, inputs, targets, caches)
            parts = self._by_bucket(nll, targets, start, edges)
            mx.eval(parts, [cache.self_attn.state for cache in caches])
            for bucket, part in parts.items():
                sums[bucket] += np.array(part)
            finite = finite and _is_finite(caches)
        return Score(sums, finite)

    def _by_bucket(
        self, nll: mx.array, targets: mx.array, start: int, edges: Sequence[int]
    ) -> dict[int, mx.array]:
        """`loss.stream_sums` of a segment that begins with frame `start`, by bucket."""
        parts, stop = {}, start + nll.shape[2]
        for bucket, (low, high) in enumerate(pairwise(edges)):
            here = slice(max(low, start) - start, min(high, stop) - start)
            if here.start < here.stop:
                some = nll[:, :, here], targets[:, :, here]
                parts[bucket] = stream_sums(*some, self.lm.cfg)
        return parts

    def _learned_from(self, codes: np.ndarray) -> list[LayerCache]:
        """Caches whose memory has learned the first half of a talk."""
        caches = self._caches("on")
        for _, inputs, _ in self._segments(codes, codes.shape[1] // 2):
            # No head is asked: what a memory learns from is inside the temporal transformer.
            hidden_states(self.lm, inputs, lambda xs: self.lm.transformer(xs, cache=caches))
            mx.eval([cache.self_attn.state for cache in caches])
        return caches

    def _caches(self, variant: str) -> list[LayerCache]:
        how = VARIANTS[variant]
        sinks = self.settings.sinks if how.sinks else 0
        return make_memory_cache(self.lm.transformer, self.settings.window, sinks, mode=how.mode)

    def _segments(self, codes: np.ndarray, frames: int):
        """First frame, inputs and targets of each segment of a talk's first `frames` frames."""
        line, length = delayed(codes[None], self.lm.cfg), self.settings.segment
        for start in range(0, frames, length):
            stop = min(start + length, frames)
            yield start, *cut(line, self.lm.cfg, start, stop)
            self.tick(stop - start)


def _hand_over(learned: list[LayerCache], caches: list[LayerCache]) -> None:
    """Let memories go on with what others have learned; keys and last inputs stay their own."""
    for source, cache in zip(learned, caches, strict=True):
        if isinstance(cache.self_attn, HybridKVCache):
            given, memory = source.self_attn.memory, cache.self_attn.memory
            memory.inner, memory.slots = given.inner, given.slots


def _is_finite(caches: list[LayerCache]) -> bool:
    memories = [c.self_attn.memory for c in caches if isinstance(c.self_attn, HybridKVCache)]
    return all(mx.all(memory.ok).item() for memory in memories)


# -- all of it --------------------------------------------------------------------------------------


def frames_to_read(talks: Sequence[Shard], variants: Sequence[str]) -> int:
    """How many frames `evaluate` reads, for a progress bar."""
    halves = sum(talk.frames // 2 for talk in talks) if "shuffled" in variants else 0
    return len(variants) * sum(talk.frames for talk in talks) + halves


def evaluate(
    lm: Lm,
    adapter: Adapter | None,
    talks: Sequence[Shard],
    settings: Settings,
    tick: Tick = lambda frames: None,
) -> Evaluation:
    """Read every talk in every variant.

    In `shuffled` a talk's donor is the next one, the last one's the first.

    Args:
        lm, adapter: the model, and its memory if it has one.
        talks: of `usable_talks`. One whose loss is not finite in some variant counts in none.
        settings: how.
        tick: told of progress.

    Raises:
        UserError: a talk that cannot be read any more; no talk with a finite loss.
    """
    reader = Reader(lm, settings, tick)
    variants, not_run = choose_variants(adapter, settings, len(talks))
    edges = position_edges(settings.window, max(talk.frames for talk in talks))
    found = Evaluation(settings, edges, {name: [] for name in variants}, not_run)
    for talk, donor in zip(talks, [*talks[1:], talks[0]], strict=True):
        codes, foreign = talk.codes(), donor.codes()
        found.add(talk, donor, {v: reader.score(v, codes, foreign, edges) for v in variants})
    if not found.talks:
        raise UserError(f"no talk has a finite loss; {talks[0].name}: {found.skipped[0][1]}")
    return found
