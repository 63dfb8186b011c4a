"""What a name means: a repository on the hub, a local folder, single files, or the bundled demo.

What lives here: from names and flags to the paths of four files. What does not: reading weights
(`weights.py`), building a model from the files (`model.py`).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from .errors import UserError

DEMO = Path(__file__).parent / "models" / "demo"
DEFAULT_REPO = "kyutai/moshiko-mlx-q4"
# The names Kyutai's Moshi repositories use; they carry no config.json.
MIMI_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_NAME = "tokenizer_spm_32k_3.model"
# Helium's repository has neither a config.json nor a codec.
HELIUM_NAMES = {
    "moshi_name": "helium-1-preview-2b-bf16.safetensors",
    "tokenizer_name": "tokenizer_spm_48k_multi6_2.model",
}


@dataclass(frozen=True)
class ModelFiles:
    """Local paths of one model. `config` is the parsed `config.json`, or None where there is none."""

    name: str
    config: dict[str, Any] | None
    moshi: Path
    mimi: Path | None
    tokenizer: Path
    quantized: int | None


def _explain(repo: str, name: str, error: Exception) -> UserError:
    """One line for each way the hub says no."""
    if isinstance(error, hub_errors.GatedRepoError):
        return UserError(
            f"{repo} is gated: accept its terms on huggingface.co/{repo} and run "
            "`huggingface-cli login`"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return UserError(
            f"no repository {repo} on the hub (or it is private): expected something like "
            f"{DEFAULT_REPO}, a local folder, or 'demo'"
        )
    if isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(
        error, hub_errors.LocalEntryNotFoundError
    ):
        return UserError(f"{repo} has no file {name}: name the file yourself, e.g. --moshi-weight")
    if isinstance(error, hub_errors.HFValidationError):
        return UserError(f"{repo!r} is neither a folder nor a repository name (owner/name)")
    return UserError(
        f"could not download {name} from {repo} and it is not in the cache: is the network up? "
        f"({type(error).__name__})"
    )


def _download(repo: str, name: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise _explain(repo, name, error) from error


def _download_optional(repo: str, name: str) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except hub_errors.LocalEntryNotFoundError as error:
        raise _explain(repo, name, error) from error
    except hub_errors.EntryNotFoundError:
        return None
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise _explain(repo, name, error) from error


def resolve_file(given: str | Path) -> Path:
    """A file flag's value: a path, `file://PATH` or `hf://OWNER/NAME/FILE` as in moshi_mlx.

    Raises:
        UserError: the file does not exist, or cannot be downloaded.
    """
    text = str(given)
    if text.startswith("hf://"):
        parts = text.removeprefix("hf://").split("/", 2)
        if len(parts) != 3:
            raise UserError(f"{text}: expected hf://OWNER/NAME/FILE")
        return _download("/".join(parts[:2]), parts[2])
    path = Path(text.removeprefix("file://")).expanduser()
    if not path.is_file():
        raise UserError(f"no file {path}" + (": it is a folder" if path.is_dir() else ""))
    return path


def read_config(path: Path) -> dict[str, Any]:
    """Parse a `config.json`.

    Raises:
        UserError: not JSON, or not an object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON model config ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


class _Source:
    """Where files come from by name: a local folder or a repository."""

    def __init__(self, name: str):
        self.name = name
        self.folder = DEMO if name == "demo" else Path(name).expanduser()
        if not self.folder.is_dir():
            if _looks_local(name):
                raise UserError(f"no folder {name}")
            self.folder = None

    def get(self, name: str) -> Path:
        if self.folder is None:
            return _download(self.name, name)
        path = self._inside(name)
        if not path.is_file():
            found = ", ".join(sorted(p.name for p in self.folder.iterdir())[:8]) or "nothing"
            raise UserError(f"{self.folder} has no file {name} (found: {found})")
        return path

    def get_optional(self, name: str) -> Path | None:
        if self.folder is None:
            return _download_optional(self.name, name)
        path = self._inside(name)
        return path if path.is_file() else None

    def _inside(self, name: str) -> Path:
        # A config from elsewhere may name any file: it must not lead out of its folder. Files inside
        # may be links (the hub's cache is made of them), so only the name is judged.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{self.folder}: the config names a file outside its folder: {name}")
        return self.folder / name


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)


def _weights_name(
    source: _Source, config: dict[str, Any] | None, quantized: int | None
) -> tuple[Path, int | None]:
    """The LM's file: what `-q` asks for if it exists ready made, else the plain one."""
    if config and "moshi_name" in config:
        return source.get(config["moshi_name"]), quantized
    if quantized:
        ready = source.get_optional(f"model.q{quantized}.safetensors")
        if ready:
            return ready, quantized
    for name in ("model.safetensors", "model.q4.safetensors", "model.q8.safetensors"):
        found = source.get_optional(name)
        if found:
            return found, quantized
    if "helium" in source.name:
        return source.get(HELIUM_NAMES["moshi_name"]), quantized
    raise UserError(
        f"{source.name} has no model.safetensors, model.q4.safetensors or model.q8.safetensors"
    )


def find_files(
    hf_repo: str | None = None,
    *,
    moshi_weight: str | Path | None = None,
    mimi_weight: str | Path | None = None,
    tokenizer: str | Path | None = None,
    lm_config: str | Path | None = None,
    quantized: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> ModelFiles:
    """Resolve names to local files, downloading what is missing.

    Args:
        hf_repo: `owner/name` on the hub, a local folder, or `demo`. Default: moshiko, in the bits
            that `quantized` asks for (4 if it asks for none).
        moshi_weight, mimi_weight, tokenizer, lm_config: single files instead of the repository's.
        quantized: 4 or 8: take the ready made file, or quantize on load.
        progress: called with a line about each file.

    Raises:
        UserError: anything that is missing, in one line.
    """
    if hf_repo is None and not (moshi_weight and mimi_weight and tokenizer):
        hf_repo = f"kyutai/moshiko-mlx-q{quantized}" if quantized else DEFAULT_REPO
    source = _Source(hf_repo) if hf_repo is not None else None

    def pick(what: str, given, name: str | None) -> Path:
        progress(f"{what}: {given or name}")
        return resolve_file(given) if given else source.get(name)

    if lm_config:
        config = read_config(resolve_file(lm_config))
    else:
        found = source.get_optional("config.json") if source else None
        config = read_config(found) if found else None
    names = config or (HELIUM_NAMES if source and "helium" in source.name else {})
    if moshi_weight:
        moshi = pick("model", moshi_weight, None)
    else:
        progress(f"model: {source.name}")
        moshi, quantized = _weights_name(source, config, quantized)
    has_codec = names is not HELIUM_NAMES and (config is None or config.get("n_q", 0) > 0)
    mimi = pick("codec", mimi_weight, names.get("mimi_name", MIMI_NAME)) if has_codec else None
    text = pick("tokenizer", tokenizer, names.get("tokenizer_name", TOKENIZER_NAME))
    name = hf_repo or str(moshi_weight)
    return ModelFiles(name, config, moshi, mimi, text, quantized)
