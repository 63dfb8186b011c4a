"""A loaded model: network, text tokenizer and codec. Immutable; sessions share it."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import sentencepiece
from moshi_mlx.models import Lm, LmConfig, MimiConfig
from moshi_mlx.modules.conditioner import LutConditioner
from moshi_mlx.utils import Sampler

from .audio import FRAME_SECONDS, FRAMES_PER_SECOND
from .codec import Backend, Codec, mimi_config_from_dict, open_codec
from .config import build_lm, lm_config
from .errors import UserError
from .hub import MemoryFiles, ModelFiles, Progress, find_files, silent
from .mimi_weights import fingerprint
from .surgery import Adapter, choose_memory, load_adapter
from .weights import load_lm_weights

MIMI_BINS = 2048  # codes of Kyutai's Mimi
NOT_PRINTED = (0, 3)  # end of padding, padding
LAST_WORDS_SECONDS = 1.0  # beyond a model's delay: the last word may have several pieces


@dataclass
class Model:
    """Everything that does not change while talking. Made by `load`."""

    name: str
    lm: Lm
    config: dict[str, Any]
    tokenizer: sentencepiece.SentencePieceProcessor
    codec: Codec | None
    fingerprint: str
    memory: Adapter | None = None
    _codec_taken: bool = field(default=False, repr=False)

    def new_codec(self) -> Codec:
        """A codec of its own for one session.

        Raises:
            UserError: a text-only model has none.
        """
        if self.codec is None:
            raise UserError(f"{self.name} is a text model: it neither listens nor speaks")
        # The one that load() opened to check the file serves the first session.
        codec = self.codec.fresh() if self._codec_taken else self.codec
        self._codec_taken = True
        return codec

    @property
    def speaks(self) -> bool:
        """Whether the model generates audio codes (stt models only write)."""
        return self.lm.cfg.generated_codebooks > 0

    @property
    def audio_delay(self) -> float:
        """Seconds by which the text of an stt model follows the sound."""
        return float(self._stt.get("audio_delay_seconds", 0.0))

    @property
    def silence_frames(self) -> int:
        """Frames of silence an stt model expects before the sound."""
        seconds = float(self._stt.get("audio_silence_prefix_seconds", 0.0))
        return math.ceil(round(seconds / FRAME_SECONDS, 6))  # 0.24 / 0.08 is 3 and a little

    @property
    def trailing_frames(self) -> int:
        """Frames of silence that bring out an stt model's last words."""
        seconds = self.audio_delay + LAST_WORDS_SECONDS
        return math.ceil(round(seconds * FRAMES_PER_SECOND, 6))

    @property
    def silence_prefix(self) -> float:
        """`silence_frames` in seconds."""
        return self.silence_frames * FRAME_SECONDS

    @property
    def _stt(self) -> dict[str, Any]:
        return self.config.get("stt_config") or {}

    def piece(self, token: int) -> str | None:
        """The SentencePiece piece of a text token; None for padding, which nobody says."""
        return None if token in NOT_PRINTED else self.tokenizer.id_to_piece(token)

    def samplers(
        self,
        temp: float | None = None,
        text_temp: float | None = None,
        top_k: int | None = None,
        text_top_k: int | None = None,
    ) -> tuple[Sampler, Sampler]:
        """Text and audio sampling: what is given, else the model's own settings, else moshi_mlx's.

        Raises:
            UserError: a temperature below 0.
        """
        own = self.config.get("lm_gen_config") or {}

        def pick(given, name: str, default):
            return own.get(name, default) if given is None else given

        temp_all = pick(temp, "temp", 0.8)
        temp_text = pick(temp if text_temp is None else text_temp, "temp_text", temp_all)
        if not min(temp_all, temp_text) >= 0:
            raise UserError(f"temp must be 0 (greedy) or more, got {min(temp_all, temp_text)}")
        texts, codes = self.lm.cfg.text_out_vocab_size, self.lm.cfg.audio_vocab_size - 1
        return (
            Sampler(temp=temp_text, top_k=self._fitting(pick(text_top_k, "top_k_text", 25), texts)),
            Sampler(temp=temp_all, top_k=self._fitting(pick(top_k, "top_k", 250), codes)),
        )

    @staticmethod
    def _fitting(top_k: int, vocabulary: int) -> int | None:
        """All of a small vocabulary is no restriction at all."""
        return top_k if 0 < top_k < vocabulary else None

    def condition(self, values: dict[str, str] | None, guided: bool) -> mx.array | None:
        """The sum of the text conditioners' embeddings, `[1, D]`; guided: `[2, D]`, the null second.

        Args:
            values: value by conditioner name. Default: `description=very_good` where the model has it.

        Raises:
            UserError: a conditioner or value that the model does not have.
        """
        provider = self.lm.condition_provider
        conditioners = provider.conditioners if provider is not None else {}
        tables = {n: c for n, c in conditioners.items() if isinstance(c, LutConditioner)}
        if values is None:
            values = {"description": "very_good"} if "description" in tables else {}
        for name, value in values.items():
            if name not in tables:
                raise UserError(f"no condition {name!r}: this model has {sorted(tables) or 'none'}")
            if value not in (known := tables[name].possible_values):
                raise UserError(f"condition {name}: expected one of {list(known)}, got {value!r}")
        if not values:
            return None
        rows = [sum(tables[name].condition(value) for name, value in values.items())]
        if guided:
            rows.append(sum(tables[name].learnt_padding[0] for name in values))
        return mx.concatenate(rows, axis=0)


def _load_tokenizer(path: Path, vocabulary: int) -> sentencepiece.SentencePieceProcessor:
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path.name}: not a SentencePiece model") from error
    if (pieces := tokenizer.get_piece_size()) != vocabulary:
        raise UserError(
            f"{path.name} has {pieces} pieces, the model speaks {vocabulary}: is this the tokenizer "
            "of this model?"
        )
    return tokenizer


def open_model_codec(files: ModelFiles, config: LmConfig, backend: Backend) -> Codec | None:
    """The codec of a model, None of a text model.

    Raises:
        UserError: as `codec.open_codec`; or it is another model's.
    """
    if files.mimi is None:
        return None
    shape = mimi_shape(files)
    bins = shape.quantizer_bins if shape else MIMI_BINS
    if bins != config.audio_vocab_size - 1:
        raise UserError(
            f"{files.name}: the model has {config.audio_vocab_size - 1} codes (card), its codec "
            f"{bins}: is this the codec of this model?"
        )
    codebooks = max(config.generated_codebooks, config.other_codebooks)
    return open_codec(files.mimi, codebooks, backend, shape)


def mimi_shape(files: ModelFiles) -> MimiConfig | None:
    """Of a codec that is not Kyutai's Mimi: this package's own field, as in the demo's config.

    Raises:
        UserError: the field does not hold such a config.
    """
    own = (files.config or {}).get("mimi_config")
    try:
        return None if own is None else mimi_config_from_dict(own)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{files.name}: mimi config: expected an object of objects") from error


def _fingerprint(files: ModelFiles, bits: int | None, memory: MemoryFiles | None) -> str:
    """Tells models apart without reading gigabytes."""
    paths = [files.moshi, files.mimi, files.tokenizer]
    paths += memory or []
    parts = [fingerprint(path) for path in paths if path is not None]
    identity = json.dumps([files.config, bits, parts], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def load(
    hf_repo: str | None = None,
    *,
    moshi_weight: str | Path | None = None,
    mimi_weight: str | Path | None = None,
    tokenizer: str | Path | None = None,
    lm_config_file: str | Path | None = None,
    quantized: int | None = None,
    adapter_path: str | None = None,
    codec: Backend = "auto",
    progress: Progress = silent,
) -> Model:
    """Load a model: `load("kyutai/moshiko-mlx-q4")`, `load("./folder")`, `load("demo")`.

    Args:
        hf_repo, moshi_weight, mimi_weight, tokenizer, lm_config_file, quantized: see
            `hub.find_files`; weights may be in MLX's or PyTorch's layout, plain or quantized.
        adapter_path: a memory for the model: a folder or repository, see `surgery.load_adapter`;
            `none` leaves out the one that comes with it. Default: the one that comes with it, if any.
        codec: `auto`, `rustymimi` or `mlx`; see `codec.open_codec`.
        progress: called with one line before each step that takes time.

    Raises:
        UserError: whatever is missing or does not fit, in one line.
    """
    files = find_files(
        hf_repo,
        moshi_weight=moshi_weight,
        mimi_weight=mimi_weight,
        tokenizer=tokenizer,
        lm_config=lm_config_file,
        quantized=quantized,
        progress=progress,
    )
    return load_files(files, adapter_path, codec, progress)


def load_files(
    files: ModelFiles,
    adapter_path: str | None = None,
    codec: Backend = "auto",
    progress: Progress = silent,
) -> Model:
    """The second half of `load`: read a model from local files.

    Raises:
        UserError: as `load`.
    """
    config = lm_config(files.config, name=files.name, text_only=files.mimi is None)
    # Small files first: a wrong one must not cost the reading of the weights.
    text = _load_tokenizer(files.tokenizer, config.text_out_vocab_size)
    progress("opening the codec")
    audio = open_model_codec(files, config, codec)
    progress(f"reading {files.moshi.name}")
    lm = build_lm(config, files.name)
    bits = load_lm_weights(lm, files.moshi, files.quantized)
    chosen = choose_memory(files, adapter_path)
    memory = load_adapter(lm, chosen) if chosen else None
    identity = _fingerprint(files, bits, chosen)
    return Model(files.name, lm, files.config or {}, text, audio, identity, memory)
