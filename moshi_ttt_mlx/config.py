"""A model's `config.json`: read, checked before anything is downloaded or built, made into an `Lm`.

moshi_mlx reads the fields that it wants and trusts them; here a field that is missing, of another
kind or of a size that does not go with the others is named in one line.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moshi_mlx.models import Lm, LmConfig, config_helium_1_preview_2b, config_v0_1

from .errors import UserError

Config = dict[str, Any]

_SIZES = ["dim", "num_heads", "num_layers", "context", "text_card", "card"]
_DEPFORMER_SIZES = [
    "depformer_dim",
    "depformer_num_heads",
    "depformer_num_layers",
    "depformer_dim_feedforward",
]
_ALWAYS = (
    *(*_SIZES, *_DEPFORMER_SIZES),
    *("n_q", "dep_q", "delays", "causal", "layer_scale", "max_period"),
    *("positional_embedding", "depformer_pos_emb"),
)
_COUNTS = ["n_q", "dep_q", "extra_heads_num_heads"]
_OPTIONAL_SIZES = ["depformer_low_rank_embeddings", "extra_heads_dim"]
_NAMES = ["moshi_name", "mimi_name", "tokenizer_name", "memory_path"]
_NUMBERS = {
    "stt_config": ("audio_delay_seconds", "audio_silence_prefix_seconds"),
    "lm_gen_config": ("temp", "temp_text", "top_k", "top_k_text"),
}


def read_config(path: Path) -> Config:
    """Read and check a `config.json`.

    Raises:
        UserError: not a JSON object, or not the config of a model that moshi_mlx can build.
    """
    config = read_json(path)
    check_config(config, str(path))
    return config


def read_json(path: Path) -> Config:
    """Read a JSON object.

    Raises:
        UserError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON model config ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_config(config: Config, where: str) -> None:
    """Every field that `LmConfig.from_config_dict` reads is there and goes with the others.

    Raises:
        UserError: the first complaint, with the field's name.
    """
    if missing := [name for name in _ALWAYS if name not in config]:
        raise UserError(f"{where}: not a Moshi config, it has no {', '.join(missing)}")
    for complaint in itertools.chain(_kinds(config), _relations(config)):
        raise UserError(f"{where}: {complaint}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kinds(config: Config) -> Iterator[str]:
    """What is wrong with single fields."""
    speaks = config["dep_q"] != 0  # a model without a depformer may fill its fields with anything
    for name in (*_SIZES, *(_DEPFORMER_SIZES if speaks else ())):
        if not _whole(config[name], 1):
            yield f"{name} should be a whole number above 0, found {config[name]!r}"
    for name in _COUNTS:
        if not _whole(config.get(name, 0), 0):
            yield f"{name} should be a whole number, found {config[name]!r}"
    for name in _OPTIONAL_SIZES:
        if config.get(name) is not None and not _whole(config[name], 1):
            yield f"{name} should be a whole number above 0, found {config[name]!r}"
    for name in _NAMES:
        if not isinstance(config.get(name, ""), str):
            yield f"{name} should be a file name, found {config[name]!r}"
    for group, names in _NUMBERS.items():
        values = config.get(group) or {}
        if not isinstance(values, dict) or not all(_number(values.get(n, 0)) for n in names):
            yield f"{group} should hold numbers by name, found {values!r}"
    if not _number(config["max_period"]) or not 0 < config["max_period"] < math.inf:
        yield f"max_period should be a number above 0, found {config['max_period']!r}"
    for name in ("positional_embedding", *(("depformer_pos_emb",) if speaks else ())):
        if config[name] not in ("rope", "none"):
            yield f"{name} is {config[name]!r}; moshi_mlx has rope and none"


def _relations(config: Config) -> Iterator[str]:
    """What does not go together."""
    n_q, dep_q, delays = config["n_q"], config["dep_q"], config["delays"]
    if not isinstance(delays, list) or not all(_whole(delay, 0) for delay in delays):
        yield f"delays should be a list of whole numbers, found {delays!r}"
    elif len(delays) != 1 + n_q:
        yield f"{len(delays)} delays for {n_q} codebooks and the text"
    if dep_q > n_q:
        yield f"the depformer makes {dep_q} codebooks (dep_q), the model has {n_q} (n_q)"
    for prefix in ("", "depformer_") if dep_q else ("",):
        dim, heads = config[f"{prefix}dim"], config[f"{prefix}num_heads"]
        if dim % (2 * heads):
            yield f"{prefix}dim {dim} does not split into {heads} heads of even width"
    schedule = config.get("depformer_weights_per_step_schedule")
    if schedule is not None and (
        not isinstance(schedule, list)
        or len(schedule) != dep_q
        or sorted(set(schedule)) != list(range(len(set(schedule))))
    ):
        yield (
            f"depformer_weights_per_step_schedule should give each of {dep_q} codebooks the number "
            f"of its weights, found {schedule!r}"
        )


def lm_config(config: Config | None, *, name: str, text_only: bool = False) -> LmConfig:
    """The network's config: from `config.json`, or what Kyutai's repositories without one hold.

    Args:
        config: a checked config, or None.
        name: of the model, for messages.
        text_only: without a config: helium rather than moshiko.

    Raises:
        UserError: optional fields (conditioners) that moshi_mlx cannot read.
    """
    if config is None:
        return config_helium_1_preview_2b() if text_only else config_v0_1()
    try:
        return LmConfig.from_config_dict(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{name}: config.json: {what}") from error


def build_lm(config: LmConfig, name: str) -> Lm:
    """An `Lm` with unset weights; nothing is allocated before they are read.

    Raises:
        UserError: conditioners that moshi_mlx cannot build.
    """
    try:
        return Lm(config)
    except (ArithmeticError, AssertionError, ValueError, TypeError) as error:
        raise UserError(f"{name}: config.json cannot be built: {error}") from error
