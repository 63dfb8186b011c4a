"""One stretch of a talk, forward and backward; the state goes on to the next one without gradient.

What lives here: the functional core of training. Everything that a gradient is taken of comes in as
an argument, everything that changes goes out as a result: parameters, the caches' arrays and their
Python counters. What does not: which talk comes next (`plan.py`), optimizer, files.

A talk of any length is cut into segments of `T` frames (truncated back-propagation through time).
The keys and values of attention's window and the memory's inner weights are carried from one to the
next as plain numbers, so what a gradient can reach is one segment; only the first segment of a talk
starts from the memory's learned initial weights, and there they get their gradient.

Layers are recomputed in the backward pass (`mx.checkpoint`, Chen et al. 2016, arXiv 1604.06174): a
moshi_mlx layer changes its cache, so each is wrapped into a pure function of its input and its
cache's arrays.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from moshi_mlx.models import Lm
from moshi_mlx.modules.transformer import LayerCache

from ..errors import UserError
from ..layers import MemoryAttention, make_memory_cache
from ..surgery import Adapter
from .kept import left_out
from .lately import Lately
from .loss import (
    LossWeights,
    audio_losses,
    hidden_states,
    prepare,
    stream_sums,
    target_weights,
    text_losses,
    totals,
    weighted_loss,
    weighted_sums,
)

Phase = Literal["memory", "all", "base"]
PHASES = get_args(Phase)
Params = dict[str, dict]
"""Parameter trees by group, float32: `memory`, in phases `all` and `base` also `base`, and there with
`LossWeights.lately` its head, `lately`."""

# The depformer's activations of so many frames are kept at a time; frames know nothing of each other.
DEPFORMER_FRAMES = 128


class Carried(NamedTuple):
    """What goes from one segment of a batch to the next: each layer's arrays and counters."""

    arrays: list[dict[str, mx.array]]
    meta: list[dict[str, int]]


class Segment(NamedTuple):
    """What a segment gives.

    Attributes:
        loss: its share of the batch's loss, a scalar.
        sums: `loss.stream_sums`, `[2, 2 + K]`.
        parts: `loss.weighted_sums`, `[2]`.
        carried: for the next segment.
    """

    loss: mx.array
    sums: mx.array
    parts: mx.array
    carried: Carried


@dataclass(frozen=True)
class Attention:
    """What attention sees while training.

    Args:
        window: keys, in every layer, at most the model's context; None takes that. Less than what
            recall needs, so that the memory has work to do.
        sinks: first tokens kept visible, counted in the window.
    """

    window: int | None = None
    sinks: int = 0


FULL_ATTENTION, USUAL_WEIGHTS = Attention(), LossWeights()


def recomputed(modules: Sequence[nn.Module], run: Callable, on: bool = True) -> Callable:
    """`run`, with its inner results computed again in the backward pass instead of kept.

    Args:
        modules: whose trainable parameters `run` uses; gradients reach them because they are passed
            as arguments. Everything else that needs a gradient must be an argument of `run`.
        run: pure, apart from that; arrays and trees of arrays in and out.
        on: False keeps everything: the same numbers.
    """
    if not on:
        return run

    def explicit(params, *args):
        for module, own in zip(modules, params, strict=True):
            module.update(own)
        return run(*args)

    checkpointed = mx.checkpoint(explicit)
    return lambda *args: checkpointed([m.trainable_parameters() for m in modules], *args)


class Learner:
    """A model with a memory, as a function of the parameters that learn.

    Args:
        lm: the model; its parameters are frozen in phase `memory`, and may be quantized there.
        adapter: its memories; in phase `base` it has none.
        phase: `memory` trains the adapter, `all` the base too, `base` a model without memory.
        attention: what attention sees.
        weights: of the loss.
        recompute: see `recomputed`.

    Raises:
        UserError: a phase that trains the base, for a quantized model; a model with cross-attention; a
            memory that looks ahead.
    """

    def __init__(
        self,
        lm: Lm,
        adapter: Adapter,
        phase: Phase = "memory",
        attention: Attention = FULL_ATTENTION,
        weights: LossWeights = USUAL_WEIGHTS,
        recompute: bool = True,
    ):
        if lm.cfg.transformer.cross_attention:
            raise UserError("models with cross-attention cannot be trained: shards hold no source")
        if not adapter.config.rules.causal:
            raise UserError(
                "this memory also learns from later frames of the same call, so in training it would "
                "see what it is to foretell: convert the checkpoint again with --causal"
            )
        prepare(lm)
        self.lm, self.adapter, self.phase = lm, adapter, phase
        self.attention, self.weights, self.recompute = attention, weights, recompute
        adapter.unfreeze()
        lm.freeze()
        if phase != "memory":
            _refuse_quantized(lm)
            lm.unfreeze()
        self.lately = None
        if phase != "memory" and weights.lately:
            self.lately = Lately(lm.cfg.transformer.d_model, lm.cfg.text_out_vocab_size)
        self._base_dtypes = tree_map(lambda a: a.dtype, lm.trainable_parameters())

    def parameters(self) -> Params:
        """The parameters that learn, as the modules hold them now: float32 (float64 stays).

        Where the base learns these are its master copy: a step of 1e-6 would round away in bfloat16.
        """
        params = {"memory": self.adapter.trainable_parameters()}
        if self.phase != "memory":
            params["base"] = self.lm.trainable_parameters()
        if self.lately:
            params["lately"] = self.lately.trainable_parameters()
        return tree_map(lambda a: a if a.dtype == mx.float64 else a.astype(mx.float32), params)

    def install(self, params: Params) -> None:
        """Let the modules compute with these parameters, the base in its own dtype."""
        self.adapter.update(params["memory"])
        if self.phase != "memory":
            cast = tree_map(lambda a, d: a.astype(d), params["base"], self._base_dtypes)
            self.lm.update(cast)
        if self.lately:
            self.lately.update(params["lately"])

    def total(self, targets: mx.array) -> mx.array:
        """What the losses of these targets are divided by, if they are the whole batch: `[2]`."""
        return totals(target_weights(self._learned(targets), self.lm.cfg, self.weights))

    def _learned(self, targets: mx.array) -> mx.array:
        """Without codebooks that do not count at all: the depformer is not run for them."""
        return targets if self.weights.audio else targets[:, :1]

    def forward(
        self,
        params: Params,
        carried: Carried | None,
        inputs: mx.array,
        targets: mx.array,
        total: mx.array,
    ) -> Segment:
        """A segment without gradients.

        Args:
            params: of `parameters`.
            carried: from the segment before; None begins a talk.
            inputs, targets: see `loss.cut`.
            total: what the losses are divided by: sum of `total(targets)` over all pieces of the batch.
        """
        segment = self._run(params, carried, inputs, targets, total)
        self.install(params)
        return segment

    def gradients(
        self,
        params: Params,
        carried: Carried | None,
        inputs: mx.array,
        targets: mx.array,
        total: mx.array,
    ) -> tuple[Segment, Params]:
        """A segment, and its gradient: a tree like `params`. Arguments as of `forward`."""
        counters = []

        def loss(params):
            segment = self._run(params, carried, inputs, targets, total)
            counters[:] = segment.carried.meta
            return segment.loss, segment.sums, segment.parts, segment.carried.arrays

        (*numbers, arrays), grads = mx.value_and_grad(loss)(params)
        # The modules hold what was traced; give them numbers again.
        self.install(params)
        return Segment(*numbers, Carried(arrays, list(counters))), grads

    def _run(self, params, carried, inputs, targets, total) -> Segment:
        self.install(params)
        caches = self._caches(carried, inputs.shape[0])
        arrays, meta, between = [{}] * len(caches), [{}] * len(caches), []

        def layers(xs):
            for i, cache in enumerate(caches):
                if i == len(caches) // 2:
                    between.append(xs)
                xs, arrays[i], meta[i] = self._layer(i, cache, xs)
            return xs

        hidden = hidden_states(self.lm, inputs, layers)
        targets = self._learned(targets)
        nll = self._losses(hidden, inputs, targets)
        weights = target_weights(targets, self.lm.cfg, self.weights)
        known = mx.stop_gradient(nll)
        loss = weighted_loss(nll, weights, total, self.weights.audio)
        if self.lately:
            lately = weights[:, 0] * self.lately.losses(between[0], inputs[:, 0])
            loss += self.weights.lately * mx.sum(lately) / mx.maximum(total[0], 1e-6)
        return Segment(
            loss,
            stream_sums(known, targets, self.lm.cfg),
            weighted_sums(known, weights),
            Carried(arrays, meta),
        )

    def _caches(self, carried: Carried | None, batch: int) -> list[LayerCache]:
        context = self.lm.cfg.transformer.context
        caches = make_memory_cache(
            self.lm.transformer,
            min(self.attention.window or context, context),
            self.attention.sinks,
            batch=batch,
            closed_too=True,
        )
        if carried is not None:
            for cache, arrays, meta in zip(caches, *carried, strict=True):
                cache.self_attn.load_state(arrays, meta)
        return caches

    def _layer(self, index: int, cache: LayerCache, xs: mx.array):
        """A layer's output, and its cache's arrays and counters behind the segment."""
        layer, before, counters = self.lm.transformer.layers[index], cache.self_attn, []
        modules = [layer]
        if isinstance(layer.self_attn, MemoryAttention):
            modules.append(layer.self_attn.memory)
        meta = before.meta_state

        def run(xs, arrays):
            own = copy.copy(before)  # the backward pass comes here again, from the same start
            own.load_state(arrays, meta)
            out = layer(xs, cache=LayerCache(own))
            counters[:] = [own.meta_state]
            return out, own.state

        out, arrays = recomputed(modules, run, self.recompute)(xs, before.state)
        return out, arrays, counters[0]

    def _losses(self, hidden: mx.array, inputs: mx.array, targets: mx.array) -> mx.array:
        kept = self.weights.kept
        vocabulary = self.lm.cfg.text_out_vocab_size
        rivals = left_out(inputs[:, 0], kept, vocabulary) if kept else None
        losses = text_losses(self.lm, hidden, targets, rivals)
        if targets.shape[1] == 1:
            return losses
        parts = []
        for start in range(0, hidden.shape[1], DEPFORMER_FRAMES):
            some = slice(start, start + DEPFORMER_FRAMES)
            true = targets[:, :, some]
            run = recomputed(
                [self.lm.depformer],
                lambda xs, true=true: audio_losses(self.lm, xs, true),
                self.recompute,
            )
            parts.append(run(hidden[:, some]))
        return mx.concatenate([losses, mx.concatenate(parts, axis=2)], axis=1)


def _refuse_quantized(lm: Lm) -> None:
    for name, module in lm.named_modules():
        if hasattr(module, "bits"):
            raise UserError(
                f"this phase trains the base, and {name} is quantized to {module.bits} bits: name "
                "weights in bfloat16, or train the memory alone (--phase memory)"
            )
