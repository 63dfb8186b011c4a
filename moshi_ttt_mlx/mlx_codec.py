"""Mimi on MLX as a codec: moshi_mlx's modules, with exact attention and state that can be read.

What lives here: how moshi_mlx's Mimi is run one stream at a time. What does not: its layers
(moshi_mlx), its window (`kv_cache.py`, `layers.py`), its weights file (`mimi_weights.py`).

moshi_mlx's modules keep their stream's state in attributes. Here state is a value of its own: it is
put into the modules before a step and taken out after it, so that any number of streams run on one
set of weights, a stream can be saved, and nothing is left behind by a reset.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from moshi_mlx.models.mimi import Mimi, MimiConfig, mimi_202407
from moshi_mlx.modules.conv import ConvTranspose1d, StreamableConv1d, StreamableConvTranspose1d
from moshi_mlx.modules.transformer import LayerCache, MlpNoGating, ProjectedTransformer

from .codec_checks import check_codes, check_pcm, check_state
from .layers import make_window_cache, use_window_attention
from .mimi_weights import fingerprint, load_mimi_weights

# Where moshi_mlx's modules keep the tail of a stream. (`StreamingAdd` keeps nothing between whole
# frames: every convolution beside it gives as many samples as it takes.)
_KEPT = {StreamableConv1d: "_prev_xs", StreamableConvTranspose1d: "_prev_ys"}


class _ExactGelu(MlpNoGating):
    """The feed-forward with the GELU that Mimi was trained with; moshi_mlx has the tanh one."""

    def __call__(self, xs: mx.array) -> mx.array:
        return self.linear2(nn.gelu(self.linear1(xs)))


class _ConvTranspose(nn.Module):
    """moshi_mlx's `ConvTranspose1d` as matrix products and an overlap-add; the same parameters.

    On the CPU MLX's own is a plain loop: Kyutai's Mimi decodes a frame in 217 ms with it, in 38 with
    this. It is taken on every device, so that a Mac runs what the tests run: it multiplies no more
    than MLX's own, and for the depthwise one, which moshi_mlx spreads over a dense kernel, far less.
    """

    def __init__(self, layer: ConvTranspose1d):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._stride, self._depthwise = layer._stride, layer._groups > 1

    def __call__(self, xs: mx.array) -> mx.array:
        """`[B, in, n]` -> `[B, out, (n - 1) * stride + kernel]`; the stride divides the kernel."""
        if self._depthwise:
            ys = xs[..., None] * self.weight.transpose(2, 0, 1)
        else:
            ys = xs.swapaxes(1, 2)[:, None] @ self.weight.swapaxes(1, 2)
        ys = self._overlap_add(ys)
        return ys if self.bias is None else ys + self.bias[:, None]

    def _overlap_add(self, ys: mx.array) -> mx.array:
        """Kernels `[B, out, n, kernel]`, each a stride after the one before, in one row."""
        later = ys.shape[-1] // self._stride - 1
        ys = mx.unflatten(ys, -1, (later + 1, self._stride))
        none = (0, 0)
        shifted = [
            mx.pad(ys[..., part, :], (none, none, (part, later - part), none))
            for part in range(later + 1)
        ]
        return sum(shifted[1:], shifted[0]).flatten(2)


def _correct(projected: ProjectedTransformer) -> None:
    use_window_attention(projected.transformer)
    for layer in projected.transformer.layers:
        if isinstance(layer.gating, MlpNoGating):
            layer.gating = _ExactGelu(layer.cfg)


@dataclass
class _Stream:
    """One direction's state: frames so far, tails of convolutions, attention windows."""

    caches: list[LayerCache]
    frames: int = 0
    tails: dict[str, mx.array] = field(default_factory=dict)

    def arrays(self) -> dict[str, mx.array]:
        windows = {
            f"window.{layer}.{name}": array
            for layer, cache in enumerate(self.caches)
            for name, array in cache.self_attn.state.items()
        }
        return self.tails | windows

    def load(self, arrays: dict[str, mx.array], window: dict[str, int], frames: int) -> None:
        self.frames = frames
        self.tails = {name: a for name, a in arrays.items() if not name.startswith("window.")}
        for layer, cache in enumerate(self.caches):
            prefix = f"window.{layer}."
            own = {n[len(prefix) :]: a for n, a in arrays.items() if n.startswith(prefix)}
            cache.self_attn.load_state(own, window)


class _Side:
    """The modules of one direction and where they keep state."""

    def __init__(self, modules: dict[str, nn.Module], projected: ProjectedTransformer):
        self.transformer = projected.transformer
        self._convs: list[StreamableConv1d] = []
        self._kept: dict[str, tuple[nn.Module, str]] = {}
        for root, top in modules.items():
            for name, module in top.named_modules():
                if isinstance(module, StreamableConv1d):
                    self._convs.append(module)
                if (attribute := _KEPT.get(type(module))) is not None:
                    self._kept[f"{root}.{name}"] = (module, attribute)

    def new_stream(self) -> _Stream:
        # rustymimi sees its own key and `context` before it, so `context + 1` in all.
        return _Stream(make_window_cache(self.transformer, self.transformer.cfg.context + 1))

    def run(self, stream: _Stream, step: Callable[[], mx.array], frames: int) -> mx.array:
        """Run `step` on this stream's state; the state is evaluated with the result."""
        self._put(stream)
        out = step()
        stream.frames += frames
        stream.tails = self._take()
        mx.eval(out, stream.arrays())
        return out

    def _put(self, stream: _Stream) -> None:
        for name, (module, attribute) in self._kept.items():
            setattr(module, attribute, stream.tails.get(name))
        for conv in self._convs:
            conv._left_pad_applied = stream.frames > 0

    def _take(self) -> dict[str, mx.array]:
        kept = {name: getattr(*where) for name, where in self._kept.items()}
        return {name: tail for name, tail in kept.items() if tail is not None and tail.size}


class _Model:
    """Mimi's weights with exact attention, for any number of streams on one thread."""

    def __init__(self, config: MimiConfig):
        self.config = config
        self.mimi = mimi = Mimi(config)
        for projected in (mimi.encoder_transformer, mimi.decoder_transformer):
            _correct(projected)
        for module in mimi.modules():
            if isinstance(module, StreamableConvTranspose1d):
                module.convtr.convtr = _ConvTranspose(module.convtr.convtr)
        self.into = _Side(
            {"encoder": mimi.encoder, "downsample": mimi.downsample}, mimi.encoder_transformer
        )
        self.out_of = _Side(
            {"decoder": mimi.decoder, "upsample": mimi.upsample}, mimi.decoder_transformer
        )

    def latents(self, stream: _Stream, pcm: mx.array) -> mx.array:
        """What is quantized: `[1, 1, n * frame_size]` -> `[1, D, n]`."""
        mimi = self.mimi
        xs = mimi.encoder_transformer(mimi.encoder.step(pcm), cache=stream.caches)[0]
        return mimi.downsample.step(xs)

    def encode(self, stream: _Stream, pcm: mx.array) -> mx.array:
        """`[1, 1, n * frame_size]` -> `[1, K, n]`."""
        return self.mimi.quantizer.encode(self.latents(stream, pcm))

    def decode(self, stream: _Stream, codes: mx.array) -> mx.array:
        """`[1, K', n]` -> `[1, 1, n * frame_size]`."""
        mimi = self.mimi
        # moshi_mlx's quantizer cannot add up the rest when there is none.
        quantizer = mimi.quantizer if codes.shape[1] > 1 else mimi.quantizer.rvq_first
        xs = mimi.upsample.step(quantizer.decode(codes))
        return mimi.decoder.step(mimi.decoder_transformer(xs, cache=stream.caches)[0])


class MlxCodec:
    """`codec.Codec` on MLX, for Mimi of any size.

    Memory is flat once the window is full. Streams made by `fresh` share the weights.
    """

    name = "mlx"

    def __init__(self, model: _Model, weights: str):
        config = model.config
        self.sample_rate = int(config.sample_rate)
        self.frame_size = round(config.sample_rate / config.frame_rate)
        self.num_codebooks = config.quantizer_nq
        self._model, self._weights = model, weights
        self.reset()

    @classmethod
    def open(
        cls, path: str | Path, num_codebooks: int = 8, config: MimiConfig | None = None
    ) -> "MlxCodec":
        """Read Mimi's weights. Arguments and errors as in `codec.open_codec`."""
        config = mimi_202407(num_codebooks) if config is None else config
        model = _Model(replace(config, quantizer_nq=num_codebooks))
        load_mimi_weights(model.mimi, path)
        return cls(model, fingerprint(path))

    def reset(self) -> None:
        """Forget both streams: equal to a fresh codec, bit for bit."""
        self._into = self._model.into.new_stream()
        self._out_of = self._model.out_of.new_stream()

    def fresh(self) -> "MlxCodec":
        """Another stream on the same weight arrays."""
        return MlxCodec(self._model, self._weights)

    def encode(self, pcm: np.ndarray) -> np.ndarray:
        """One frame: float32 `[frame_size]` -> int32 `[K]`."""
        check_pcm(self, pcm)
        return self.encode_block(pcm)[:, 0]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """One frame: int `[K']`, `1 <= K' <= K` -> float32 `[frame_size]`."""
        check_codes(self, codes, self._model.config.quantizer_bins)
        return self.decode_block(codes[:, None])

    def encode_block(self, pcm: np.ndarray) -> np.ndarray:
        """The next `n` frames at once: float32 `[n * frame_size]` -> int32 `[K, n]`."""
        frames, rest = divmod(len(pcm), self.frame_size)
        if rest:
            raise ValueError(
                f"[{self.name}] encode_block takes whole frames of {self.frame_size}, "
                f"got {len(pcm)} samples"
            )
        xs = mx.array(pcm, dtype=mx.float32)[None, None]
        side, stream = self._model.into, self._into
        codes = side.run(stream, lambda: self._model.encode(stream, xs), frames)
        return np.array(codes.astype(mx.int32))[0]

    def decode_block(self, codes: np.ndarray) -> np.ndarray:
        """The next `n` frames at once: int `[K', n]` -> float32 `[n * frame_size]`."""
        xs = mx.array(codes, dtype=mx.int32)[None]
        side, stream = self._model.out_of, self._out_of
        pcm = side.run(stream, lambda: self._model.decode(stream, xs), codes.shape[1])
        return np.array(pcm)[0, 0]

    # -- state --------------------------------------------------------------------------------

    @property
    def _streams(self) -> dict[str, _Stream]:
        return {"in": self._into, "out": self._out_of}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """All arrays of both streams, and string metadata."""
        meta = {"backend": self.name, "weights": self._weights}
        meta["num_codebooks"] = str(self.num_codebooks)
        arrays = {}
        for name, stream in self._streams.items():
            arrays |= {f"{name}.{key}": np.array(a) for key, a in stream.arrays().items()}
            meta[f"{name}.frames"] = str(stream.frames)
            meta[f"{name}.window"] = json.dumps(stream.caches[0].self_attn.meta_state)
        return arrays, meta

    def load_state(self, arrays: dict[str, np.ndarray], meta: dict[str, str]) -> None:
        """Go on from `state()` bit for bit.

        Raises:
            UserError: the state of another backend, other weights or another number of codebooks.
        """
        check_state(meta, backend=self.name, weights=self._weights, codebooks=self.num_codebooks)
        for name, stream in self._streams.items():
            prefix = f"{name}."
            own = {k[len(prefix) :]: mx.array(a) for k, a in arrays.items() if k.startswith(prefix)}
            stream.load(own, json.loads(meta[f"{name}.window"]), int(meta[f"{name}.frames"]))
