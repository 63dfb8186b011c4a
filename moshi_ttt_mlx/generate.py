"""The unbounded frame loop of one talk: token history, temporal transformer, depformer.

One frame is one call of `FrameGenerator.step`. All that changes from frame to frame is arrays (the
token history, the random key, the caches) plus a few Python counters, so a talk can go on for ever,
be saved, and be traced: once the caches exist, a frame is one `mx.compile`d function. Nothing in here
waits for the device; the caller reads a frame's tokens with `Frame.read`, once.

The same tokens as `moshi_mlx.models.LmGen`, up to the step where that one goes wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce

import mlx.core as mx
import numpy as np
from moshi_mlx.models import Lm
from moshi_mlx.models.lm import ScaledEmbedding
from moshi_mlx.modules.transformer import LayerCache
from moshi_mlx.utils import Sampler

from . import device_memory
from .kv_cache import HybridKVCache, StepAt, TracedStep
from .layers import end_step, make_memory_cache, use_window_attention
from .memory import Mode
from .sampling import draw
from .trees import under

BOS = 1
UNGENERATED = -2  # in forced tokens: let the model draw this one
Hook = Callable[[mx.array], None]


@dataclass(frozen=True)
class Frame:
    """What one step produced, still on the device.

    Attributes:
        index: number of the frame, from 0.
        tokens: int32 `[B, 1 + K + 1]`: the text token of this frame, the `K` generated codes of the
            frame `max_delay` earlier (they are complete now), and 1 while the memory is finite.
        has_audio: whether those codes exist yet; always False for models without a depformer.
        transformer_out: `[B, 1, D]` (`[2B, 1, D]` under classifier-free guidance).
    """

    index: int
    tokens: mx.array
    has_audio: bool
    transformer_out: mx.array

    @cached_property
    def _host(self) -> np.ndarray:
        return np.array(self.tokens)

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The one host read of a frame: text int32 `[B]` and codes int32 `[B, K]` or None."""
        return self._host[:, 0], self._host[:, 1:-1] if self.has_audio else None

    @property
    def memory_ok(self) -> bool:
        """Whether all memories of all rows are finite (a broken one is shut out by itself)."""
        return bool(self._host[:, -1].all())


class DepformerCache:
    """Keys and values of the few codebooks of one frame (moshi_mlx allocates 256 slots for each)."""

    def __init__(self, context: int):
        self.context, self.offset = context, 0
        self.keys = self.values = None

    def attend(self, q, k, v, scale: float, virtual=None) -> mx.array:
        """As `WindowKVCache.attend`, for `T = 1` and no memory."""
        if self.offset:
            k = mx.concatenate([self.keys, k], axis=2)
            v = mx.concatenate([self.values, v], axis=2)
        # As many as moshi_mlx's attention sees, which is one more than the context.
        if self.offset > self.context:
            k, v = k[..., 1:, :], v[..., 1:, :]
        self.keys, self.values = k, v
        self.offset += 1
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


def embed(embedding, tokens: mx.array) -> mx.array:
    """Embed tokens, token -1 as zeros (`nn.quantize` drops moshi_mlx's `ScaledEmbedding`, which did)."""
    if isinstance(embedding, ScaledEmbedding):
        return embedding(tokens)
    rows = embedding(mx.maximum(tokens, 0))
    return mx.where((tokens == -1)[..., None], 0, rows)


def embed_frame(model: Lm, tokens: mx.array) -> mx.array:
    """Sum of the embeddings of all streams: int `[B, 1 + n_q, T]` -> `[B, T, D]`."""
    xs = embed(model.text_emb, tokens[:, 0])[:, None]
    if not model.audio_embs:
        return xs.squeeze(1)
    # As `embed`, with the codes of all streams prepared at once.
    codes = mx.split(mx.maximum(tokens[:, 1:], 0), len(model.audio_embs), axis=1)
    silent = mx.split(tokens[:, 1:, :, None] == -1, len(model.audio_embs), axis=1)
    for embedding, code, nothing in zip(model.audio_embs, codes, silent, strict=True):
        xs = xs + mx.where(nothing, 0, _rows(embedding, code))
    return xs.squeeze(1)


def _rows(embedding, tokens: mx.array) -> mx.array:
    if isinstance(embedding, ScaledEmbedding):
        return embedding.weight[tokens]
    return embedding(tokens)


def guide(logits: mx.array, coef: float) -> mx.array:
    """Classifier-free guidance (Ho & Salimans 2022): rows are conditioned, then unconditioned."""
    if coef == 1:
        return logits
    conditioned, free = logits.split(2, axis=0)
    return coef * conditioned - (coef - 1) * free


class FrameGenerator:
    """Steps a moshi_mlx `Lm` frame by frame, without a limit.

    Args:
        model: shared with other generators and never changed, except that its attention learns to
            read through this package's caches.
        text_sampler, audio_sampler: moshi_mlx's sampling settings.
        batch_size: rows, each its own talk in lockstep.
        cfg_coef: classifier-free guidance; 1 turns it off.
        window: keys attention sees. Default: the model's context.
        sinks: first tokens kept visible for ever, counted inside the window.
        memory: `on`, `frozen` (read, never learn) or `off`, for models that have one.
        seed: of the random key.
        condition: added to every frame's embedding, `[1 | B, D]`; under guidance also `[2B, D]`,
            conditioned rows first.
        cross_attention_src: for models with cross-attention, `[B, N, D]` (`[2B, N, D]` guided).
        on_text_hook, on_audio_hook: called with the drawn tokens, which they may change in place
            (`[B, 1]` and `[B, K, 1]`). With hooks a frame is not compiled.
        compile: trace a frame once and replay it.
    """

    def __init__(
        self,
        model: Lm,
        text_sampler: Sampler,
        audio_sampler: Sampler,
        *,
        batch_size: int = 1,
        cfg_coef: float = 1.0,
        window: int | None = None,
        sinks: int = 0,
        memory: Mode = "on",
        seed: int = 0,
        condition: mx.array | None = None,
        cross_attention_src: mx.array | None = None,
        on_text_hook: Hook | None = None,
        on_audio_hook: Hook | None = None,
        compile: bool = True,
    ):
        for transformer in (model.transformer, *(s.transformer for s in model.depformer.slices)):
            use_window_attention(transformer)
        device_memory.prepare(model.parameters())
        self.model, self.cfg = model, model.cfg
        self.text_sampler, self.audio_sampler = text_sampler, audio_sampler
        self.batch_size, self.cfg_coef = batch_size, cfg_coef
        self.window, self.sinks, self.memory, self.seed = window, sinks, memory, seed
        self.condition, self.cross_attention_src = condition, cross_attention_src
        self.on_text_hook, self.on_audio_hook = on_text_hook, on_audio_hook
        delays = [0, *self.cfg.audio_delays]
        self.max_delay = max(delays)
        self.codebooks = self.cfg.generated_codebooks
        self._lay_out_history(np.array(delays))
        hooked = on_text_hook is not None or on_audio_hook is not None
        self._traces = compile and not hooked
        self._trace_anew()
        self.reset()

    def _trace_anew(self) -> None:
        self._traced = mx.compile(self._traced_frame) if self._traces else None

    def _lay_out_history(self, delays: np.ndarray) -> None:
        """Where in the history each stream is read and written; column `-1` is the frame to come.

        Stream `s` is fed its token of `1 + delay` frames ago. A generated token belongs `delay`
        frames back; the user's codes, and the text, belong to the frame itself.
        """
        columns = self.max_delay + 2
        self._read_at = mx.array(columns - 2 - delays)[None, :, None]
        write_delay = np.where(np.arange(len(delays)) <= self.codebooks, delays, 0)
        self._write_delay = write_delay
        self._write_at = (np.arange(columns) == (columns - 1 - write_delay)[:, None])[None]

    def reset(self) -> None:
        """Begin a new talk; equal to a fresh generator."""
        start = np.full((self.batch_size, 1 + self.cfg.audio_codebooks, self.max_delay + 2), 0)
        # Helium has no row for "nothing said yet": a text begins with SentencePiece's BOS.
        has_start = self.cfg.text_in_vocab_size > self.cfg.text_out_vocab_size
        start[:, 0] = self.cfg.text_out_vocab_size if has_start else BOS
        start[:, 1:] = self.cfg.audio_padding_token
        self.history = mx.array(start.astype(np.int32))
        self.key = mx.random.key(self.seed)
        self.caches = make_memory_cache(
            self.model.transformer,
            self.window,
            self.sinks,
            batch=self.batch_size * (1 if self.cfg_coef == 1 else 2),
            mode=self.memory,
        )
        self.frame = 0
        self._write_mask = None

    def set_memory(self, mode: Mode) -> None:
        """Let the memory learn (`on`) or only be read (`frozen`) from the next frame on.

        Raises:
            ValueError: from or to `off`, where the windows of the memory's layers differ.
        """
        if "off" in (mode, self.memory):
            raise ValueError("[FrameGenerator] a talk is with a memory or without from its start")
        state = self.state()
        self.memory = mode
        self._trace_anew()  # a trace does not look at the mode again
        self.load_state(*state)

    # -- one frame ----------------------------------------------------------------------------

    def step(
        self,
        user_codes: mx.array | np.ndarray | None = None,
        text: mx.array | np.ndarray | None = None,
        audio: mx.array | np.ndarray | None = None,
    ) -> Frame:
        """Advance by one frame (80 ms).

        Args:
            user_codes: the user's codes of this frame, `[B, K_user]`; -1 gives a stream no input.
            text: force the text token, `[B, 1]`; `UNGENERATED` lets the model draw.
            audio: force codes as the depformer emits them in this frame, `[B, K]`: codebook `k`'s is
                the code of frame `index - delay_k`; `UNGENERATED` lets the model draw.

        Raises:
            ValueError: a shape that does not fit the model.
        """
        forced = {
            name: self._tokens(name, given, width)
            for name, given, width in (("text", text, 1), ("audio", audio, self.codebooks))
            if given is not None
        }
        user = self._tokens("user_codes", user_codes, self.cfg.other_codebooks)
        key_in = (self.history, user, self._written(), self.key, forced)
        if self._traced is not None and all(c.self_attn.begin_step() for c in self.caches):
            self.history, self.key, tokens, out = self._run_traced(*key_in)
        else:
            self.history, self.key, tokens, out = self._frame(*key_in, self.caches)
        self.frame += 1
        device_memory.after_frame(self.frame)
        has_audio = self.codebooks > 0 and self.frame > self.max_delay
        return Frame(self.frame - 1, tokens, has_audio, out)

    def _tokens(self, name: str, given, width: int) -> mx.array:
        if given is None:
            given = np.zeros((self.batch_size, 0))
        given = mx.array(given).astype(mx.int32)
        if given.shape != (self.batch_size, width):
            raise ValueError(
                f"[FrameGenerator] {name} must be [{self.batch_size}, {width}], "
                f"got {list(given.shape)}"
            )
        return given

    def _written(self) -> mx.array:
        """Which cells of the history this frame writes: none before the talk began."""
        if self._write_mask is None or self.frame <= self.max_delay:
            begun = (self._write_delay <= self.frame)[None, :, None]
            self._write_mask = mx.array(self._write_at & begun)
        return self._write_mask

    def _run_traced(self, *key_in):
        # Layers with windows or memories of another shape have step numbers of their own.
        kinds = {c.self_attn.step_shape: c.self_attn for c in self.caches}
        numbers = mx.array([cache.step_numbers for cache in kinds.values()])
        full = tuple(c.keys.shape[2] == c.step_numbers[3] == c.window for c in kinds.values())
        kind = {shape: i for i, shape in enumerate(kinds)}
        kind_of = tuple(kind[c.self_attn.step_shape] for c in self.caches)
        layers = [self._layer_arrays(c) for c in self.caches]
        *result, layers = self._traced(*key_in, numbers, layers, kind_of=kind_of, full=full)
        for layer, cache, arrays in zip(
            self.model.transformer.layers, self.caches, layers, strict=True
        ):
            end_step(layer, cache, arrays)
        return result

    @staticmethod
    def _layer_arrays(cache: LayerCache) -> dict[str, mx.array]:
        arrays = dict(cache.self_attn.state)
        if cache.cross_attn is not None:
            arrays["cross_k"], arrays["cross_v"] = cache.cross_attn
        return arrays

    def _traced_frame(self, history, user, written, key, forced, numbers, layers, *, kind_of, full):
        rows = {kind: arrays["keys"].shape[2] for kind, arrays in zip(kind_of, layers, strict=True)}
        at = [StepAt.of(numbers[i], rows[i], full[i]) for i in range(len(full))]
        caches = []
        for cache, arrays, kind in zip(self.caches, layers, kind_of, strict=True):
            arrays = dict(arrays)
            cross = (arrays.pop("cross_k"), arrays.pop("cross_v")) if "cross_k" in arrays else None
            caches.append(LayerCache(TracedStep(cache.self_attn, arrays, at[kind]), cross))
        result = self._frame(history, user, written, key, forced, caches)
        return *result, [c.self_attn.state for c in caches]

    def _frame(self, history, user, written, key, forced, caches):
        """One frame as a pure function of arrays and caches."""
        history = mx.concatenate([history[:, :, 1:], history[:, :, -1:]], axis=2)
        out = self._transform(mx.take_along_axis(history, self._read_at, axis=2), caches)
        logits = guide(self.model.text_linear(out), self.cfg_coef)
        text, key = draw(self.text_sampler, logits, key)
        text = _force(text, forced.get("text"))
        if self.on_text_hook is not None:
            self.on_text_hook(text)
        codes, key = self._depformer(out, text, key, forced.get("audio"))
        new = mx.concatenate([text, codes, user], axis=1)[:, :, None]
        history = mx.where(written, new, history)
        # The frame whose last delayed codebook has just been written.
        ready = history[:, 1 : 1 + self.codebooks, 1]
        tokens = mx.concatenate([text, ready, self._memory_ok(caches)], axis=1)
        return history, key, tokens, out

    def _memory_ok(self, caches: list[LayerCache]) -> mx.array:
        """1 where every memory of a row is finite, else 0: int32 `[B, 1]`."""
        memories = [getattr(c.self_attn, "memory", None) for c in caches]
        flags = [memory.ok for memory in memories if memory is not None]
        if not flags:
            return mx.ones((self.batch_size, 1), mx.int32)
        ok = reduce(mx.logical_and, flags)
        return ok.reshape(-1, self.batch_size).all(axis=0)[:, None].astype(mx.int32)

    def _transform(self, tokens: mx.array, caches: list[LayerCache]) -> mx.array:
        xs = embed_frame(self.model, tokens)
        condition = self.condition
        guided = self.cfg_coef != 1
        if guided and condition is not None and condition.shape[0] == 2 * self.batch_size:
            xs, guided = mx.tile(xs, (2, 1, 1)), False
        if condition is not None:
            xs = xs + condition[:, None].astype(xs.dtype)
        if guided:
            xs = mx.tile(xs, (2, 1, 1))
        xs = self.model.transformer(xs, cache=caches, cross_attention_src=self.cross_attention_src)
        return self.model.out_norm(xs)

    def _depformer(self, out, text, key, forced):
        """Draw the `K` codes of this frame one after another: `[B, K]`."""
        slices = self.model.depformer.slices
        if not slices:
            return mx.zeros((self.batch_size, 0), mx.int32), key
        first = slices[0].transformer
        caches = [LayerCache(DepformerCache(first.cfg.context)) for _ in first.layers]
        token, codes = text, []
        for i, piece in enumerate(slices):
            last = token if self.cfg_coef == 1 else mx.tile(token, (2, 1))
            xs = piece.linear_in(out) + embed(piece.emb, last)
            logits = piece.linear_out(piece.transformer(xs, cache=caches))
            token, key = draw(self.audio_sampler, guide(logits, self.cfg_coef), key)
            token = _force(token, None if forced is None else forced[:, i : i + 1])
            codes.append(token)
        codes = mx.stack(codes, axis=1)
        if self.on_audio_hook is not None:
            self.on_audio_hook(codes)
        return codes.squeeze(2), key

    # -- state --------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, mx.array], dict[str, int]]:
        """All that the next frame depends on besides model and settings: arrays and counters."""
        arrays = {"history": self.history, "key": self.key}
        meta = {"frame": self.frame}
        for i, cache in enumerate(self.caches):
            arrays |= {f"layers.{i}.{name}": a for name, a in self._layer_arrays(cache).items()}
            meta |= {f"layers.{i}.{name}": n for name, n in cache.self_attn.meta_state.items()}
        return arrays, meta

    def load_state(self, arrays: dict[str, mx.array], meta: dict[str, int]) -> None:
        """Go on from `state()` of a generator with the same model and settings, bit for bit."""
        self.reset()
        self.history, self.key, self.frame = arrays["history"], arrays["key"], int(meta["frame"])
        for i, cache in enumerate(self.caches):
            own = under(f"layers.{i}.", arrays)
            if "cross_k" in own:
                cache.cross_attn = own["cross_k"], own["cross_v"]
            cache.self_attn.load_state(own, under(f"layers.{i}.", meta))

    def warm_up(self) -> None:
        """Trace and build a frame's kernels now; the talk stays where it is, bit for bit.

        Only for models that hear: a frame of silence is stepped and taken back.
        """
        state = self.state()
        silence = np.full((self.batch_size, self.cfg.other_codebooks), -1)
        for _ in range(self.sinks + 3):  # the first ones are not traced: see `begin_step`
            mx.eval(self.step(silence).tokens)
        self.load_state(*state)

    # -- beside the frame ---------------------------------------------------------------------

    def prefill_text(self, tokens: mx.array) -> None:
        """Read a prompt at once; for models without audio streams.

        Args:
            tokens: int `[B, T]`; the last one is fed by the next `step`.

        Raises:
            ValueError: for a model with audio streams.
        """
        if self.cfg.audio_codebooks:
            raise ValueError("[FrameGenerator] prefill_text needs a text-only model")
        if tokens.shape[1] > 1:
            self._transform(tokens[:, None, :-1], self.caches)
        self.history = mx.broadcast_to(tokens[:, None, -1:], self.history.shape)

    def memory_report(self) -> dict[int, dict[str, float | int]]:
        """See `Session.memory_report`."""
        layers = enumerate(zip(self.model.transformer.layers, self.caches, strict=True))
        return {
            i: layer.self_attn.memory.report(cache.self_attn.memory)
            for i, (layer, cache) in layers
            if isinstance(cache.self_attn, HybridKVCache)
        }

    def extra_heads(self, frame: Frame) -> list[mx.array]:
        """Probabilities of the model's extra heads for a frame, `[B, 1, extra_heads_dim]` each."""
        heads = self.model.extra_heads
        return [mx.softmax(head(frame.transformer_out), axis=-1) for head in heads]


def _force(drawn: mx.array, forced: mx.array | None) -> mx.array:
    return drawn if forced is None else mx.where(forced == UNGENERATED, drawn, forced)
