"""What is examined: a model by its names and flags. No weights are downloaded, none loaded twice."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hub import ModelFiles
    from ..model import Model


class NotDownloaded(Exception):
    """A repository whose weights are not on this machine: an examination does not fetch gigabytes."""

    def __init__(self, repo: str):
        super().__init__(
            f"{repo} is not downloaded yet: the first talk does that (or name a folder, or demo)"
        )
        self.repo = repo


@dataclass
class Chosen:
    """One model that the user chose.

    Args:
        flags: keyword arguments of `hub.find_files`.
        adapter_path: of a memory, or None.
        codec: backend, see `codec.open_codec`.
    """

    flags: dict[str, Any]
    adapter_path: str | None = None
    codec: str = "auto"

    @property
    def name(self) -> str:
        """What the user calls it."""
        from ..hub import DEFAULT_REPO

        bits = self.flags.get("quantized")
        default = f"kyutai/moshiko-mlx-q{bits}" if bits else DEFAULT_REPO
        return str(self.flags.get("moshi_weight") or self.flags.get("hf_repo") or default)

    @cached_property
    def files(self) -> "ModelFiles":
        """Its files on this machine.

        Raises:
            UserError: one is missing.
            NotDownloaded: it is a repository that was never used here.
        """
        from ..hub import find_files

        is_hubs = not self.flags.get("moshi_weight") and _is_repository(self.name)
        if is_hubs and not _is_cached(self.name, not self.flags.get("mimi_weight")):
            raise NotDownloaded(self.name)
        return find_files(**self.flags)

    @cached_property
    def model(self) -> "Model":
        """The loaded model.

        Raises:
            UserError, NotDownloaded: as `files`, and whatever does not fit.
        """
        from ..model import load_files

        return load_files(self.files, self.adapter_path, self.codec)


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _is_cached(repo: str, needs_mimi: bool) -> bool:
    """Whether a repository's large files are in the hub's cache: weights, and those of its codec."""
    from ..hub import MIMI_NAME, MOSHI_NAMES

    config = _cached_config(repo)
    weights = [*MOSHI_NAMES, config.get("moshi_name")]
    mimi = config.get("mimi_name", MIMI_NAME)
    has_codec = not needs_mimi or config.get("n_q") == 0 or _cached(repo, mimi) is not None
    return has_codec and any(name and _cached(repo, name) for name in weights)


def _cached_config(repo: str) -> dict[str, Any]:
    from ..config import read_json

    path = _cached(repo, "config.json")
    return {} if path is None else read_json(path)


def _cached(repo: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None  # else: not there, or known not to be


@dataclass
class Case:
    """Everything that an examination looks at.

    Args:
        chosen: the model that talks.
        user_stt: the model that writes the user's words down, or None.
        context: frames attention sees; None takes the model's own.
        input_device, output_device: names or numbers; None takes the system's choice.
        audio: whether devices are opened.
        progress: called with one line before what takes time.
    """

    chosen: Chosen
    user_stt: Chosen | None = None
    context: int | None = None
    input_device: str | None = None
    output_device: str | None = None
    audio: bool = True
    progress: Callable[[str], None] = field(default=lambda message: None)

    @property
    def models(self) -> list[Chosen]:
        """One or both."""
        return [self.chosen] if self.user_stt is None else [self.chosen, self.user_stt]
