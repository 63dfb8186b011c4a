"""What `/api/info` says about a model."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from .. import __version__
from ..audio import FRAME_SIZE, SAMPLE_RATE
from .limits import Limits

if TYPE_CHECKING:
    from ..model import Model

_LIMITS = (
    "sessions",
    "waiting",
    "resume_seconds",
    "message_bytes",
    "heard_frames",
    "burst_seconds",
    "record_minutes",
)


def describe(model: "Model", listener: "Model | None", defaults: dict, limits: Limits) -> dict:
    """The facts, as JSON; see docs/server.md.

    Args:
        listener: a model for the user's words, or None.
        defaults: `Session`'s keyword arguments for a new talk. Where they are None, the model's own
            value is shown.
    """
    longest = model.lm.cfg.transformer.context
    given = {name: defaults[name] for name in ("temp", "text_temp", "top_k", "text_top_k")}
    text, audio = model.samplers(**given)
    shown = {
        "temp": audio.temp,
        "text_temp": text.temp,
        # None is all of them; on a wire a number says that, too.
        "top_k": audio.top_k or model.lm.cfg.audio_vocab_size - 1,
        "text_top_k": text.top_k or model.lm.cfg.text_out_vocab_size,
        "context": defaults["context"] or longest,
    }
    bounds = asdict(limits)
    return {
        "name": "moshi-ttt-mlx",
        "version": __version__,
        "model": model.name,
        "speaks": model.speaks,
        "user_stt": listener.name if listener else None,
        "sample_rate": SAMPLE_RATE,
        "frame_size": FRAME_SIZE,
        "context": shown["context"],
        "max_context": longest,
        "memory": _memory(model),
        "limits": {name: bounds[name] for name in _LIMITS},
        "defaults": defaults | shown,
    }


def _memory(model: "Model") -> dict | None:
    if model.memory is None:
        return None
    config = model.memory.config
    facts = {name: getattr(config, name) for name in ("placement", "inner", "read", "window")}
    return facts | {"layers": sorted(model.memory.memories)}
