"""The codec: sound <-> codes, one frame of 80 ms at a time, for as long as anyone talks.

What lives here: the protocol every codec keeps, how a codec is opened, and Mimi configs as plain
dicts. The two backends are `rusty_codec.py` (Kyutai's rustymimi) and `mlx_codec.py` (Mimi on MLX).
"""

import importlib.util
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from moshi_mlx.models.mimi import MimiConfig, mimi_202407
from moshi_mlx.modules import SeanetConfig, TransformerConfig

from .errors import UserError

Backend = Literal["auto", "rustymimi", "mlx"]


class Codec(Protocol):
    """One stream of sound in and one out; all state inside; one frame of 80 ms at a time.

    The two directions are independent: either may be used alone or ahead of the other.
    """

    name: str  # "rustymimi" or "mlx"
    sample_rate: int  # Hz
    frame_size: int  # samples a frame
    num_codebooks: int  # K

    def encode(self, pcm: np.ndarray) -> np.ndarray:
        """The next frame in: float32 `[frame_size]`, finite, in -1..1 -> int32 `[K]`.

        A NaN would stay in the attention window of the stream; the caller keeps it out.
        """
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The next frame out: int `[K']`, `K' <= K` -> float32 `[frame_size]`."""
        ...

    def reset(self) -> None:
        """Forget both streams: equal to a fresh codec, bit for bit."""
        ...

    def fresh(self) -> "Codec":
        """Another, independent codec on the same weights; shares memory where it can be shared."""
        ...

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """All that `load_state` needs to go on bit for bit: arrays, and string metadata."""
        ...

    def load_state(self, arrays: dict[str, np.ndarray], meta: dict[str, str]) -> None:
        """Go on from `state()` of a codec on the same weights, bit for bit.

        Raises:
            UserError: the state of another backend or of other weights.
        """
        ...


def finite(pcm: np.ndarray) -> np.ndarray:
    """Sound as `Codec.encode` takes it: float32, with silence for samples that are not finite."""
    return np.nan_to_num(pcm.astype(np.float32), posinf=0.0, neginf=0.0)


def open_codec(
    path: str | Path,
    num_codebooks: int = 8,
    backend: Backend = "auto",
    config: MimiConfig | None = None,
) -> Codec:
    """Open Mimi from its weights file.

    Args:
        path: a `.safetensors` file in Kyutai's layout.
        num_codebooks: codebooks of `encode`; the file may hold more. Default: 8.
        backend: `auto` takes rustymimi for Kyutai's Mimi where it is installed (it has no wheel for
            Python 3.14 yet), and MLX for any other config.
        config: the codec's shape. Default: Kyutai's Mimi.

    Raises:
        UserError: the file is missing, broken or does not fit; or as `choose_backend`.
    """
    if choose_backend(backend, config) == "mlx":
        from .mlx_codec import MlxCodec

        return MlxCodec.open(path, num_codebooks, config)
    from .rusty_codec import RustyCodec

    return RustyCodec(path, num_codebooks)


def choose_backend(backend: Backend, config: MimiConfig | None) -> Literal["rustymimi", "mlx"]:
    """The backend that `open_codec` takes; arguments as there.

    Raises:
        UserError: the backend cannot run the config, is not installed, or is none.
    """
    standard = config is None or config == mimi_202407(config.quantizer_nq)
    if backend not in ("auto", "rustymimi", "mlx"):
        raise UserError(f"codec backend: expected auto, rustymimi or mlx, got {backend}")
    if backend == "rustymimi" and not standard:
        raise UserError("codec backend: rustymimi runs Kyutai's Mimi only; use --codec mlx")
    installed = importlib.util.find_spec("rustymimi") is not None
    if backend == "rustymimi" and not installed:
        raise UserError("codec backend: rustymimi is not installed; pip install it or --codec mlx")
    return "mlx" if backend == "mlx" or not standard or not installed else "rustymimi"


def mimi_config_to_dict(config: MimiConfig) -> dict[str, Any]:
    """A `MimiConfig` as plain numbers, strings and lists, ready for JSON."""
    return asdict(config)


def _filled(cls: type, given: dict[str, Any], what: str) -> Any:
    names = {field.name for field in fields(cls)}
    wrong = sorted(names ^ set(given))
    if wrong:
        raise UserError(
            f"{what}: missing {sorted(names - set(given))}, unknown {sorted(set(given) - names)}"
        )
    return cls(**given)


def mimi_config_from_dict(config: dict[str, Any]) -> MimiConfig:
    """The inverse of `mimi_config_to_dict`.

    Raises:
        UserError: fields that are missing or unknown, by name.
    """
    nested = {"seanet": SeanetConfig, "transformer": TransformerConfig}
    given = {
        key: _filled(nested[key], value, f"mimi config, {key}") if key in nested else value
        for key, value in config.items()
    }
    return _filled(MimiConfig, given, "mimi config")


def small_mimi(num_codebooks: int = 8) -> MimiConfig:
    """A Mimi of 0.65 M parameters with Kyutai's frame, ratios and window: for tests."""
    config = mimi_config_to_dict(mimi_202407(num_codebooks))
    config["seanet"] |= {"nfilters": 8, "dimension": 64}
    config["transformer"] |= {
        "d_model": 64,
        "num_heads": 4,
        "num_layers": 2,
        "dim_feedforward": 128,
    }
    return mimi_config_from_dict(config | {"quantizer_bins": 256, "quantizer_dim": 32})
