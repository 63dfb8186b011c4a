"""What a name means: a repository on the hub, a local folder, single files, or the bundled demo.

What lives here: from names and flags to the paths of a model's files. What does not: what a config
means (`config.py`), reading weights (`weights.py`), building a model from the files (`model.py`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from .config import Config, read_config
from .errors import UserError

DEMO = Path(__file__).parent / "models" / "demo"
DEFAULT_REPO = "kyutai/moshiko-mlx-q4"
# The names in Kyutai's repositories that carry no config.json.
MOSHI_NAMES = ("model.safetensors", "model.q4.safetensors", "model.q8.safetensors")
MIMI_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_NAME = "tokenizer_spm_32k_3.model"
# Helium's repository has no codec either.
HELIUM_NAMES = {
    "moshi_name": "helium-1-preview-2b-bf16.safetensors",
    "tokenizer_name": "tokenizer_spm_48k_multi6_2.model",
}

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """The default of `progress`."""


@dataclass(frozen=True)
class ModelFiles:
    """Local paths of one model.

    Attributes:
        name: what the user called it.
        config: the parsed and checked `config.json`, or None where there is none.
        mimi: None for a text-only model.
        quantized: the bits asked for, 4 or 8, or None.
        memory: config and weights of the memory that comes with the model, or None.
    """

    name: str
    config: Config | None
    moshi: Path
    mimi: Path | None
    tokenizer: Path
    quantized: int | None
    memory: "MemoryFiles | None" = None


class MemoryFiles(NamedTuple):
    """Local paths of a memory."""

    config: Path
    weights: Path


# A memory in its folder, or in the folder that a model's config names (`memory_path`).
MEMORY_NAMES = MemoryFiles(Path("memory_config.json"), Path("memory.safetensors"))


def _explain(repo: str, name: str, error: Exception) -> UserError:
    """One line for each way the hub says no."""
    if isinstance(error, hub_errors.GatedRepoError):
        return UserError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then log in with "
            "`hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return UserError(
            f"no repository {repo} on the hub (or it is private): expected something like "
            f"{DEFAULT_REPO}, a local folder, or demo"
        )
    if isinstance(error, hub_errors.HFValidationError):
        return UserError(f"{repo!r} is neither a folder nor a repository name (OWNER/NAME)")
    # The hub's own message only says that something happened; what did is its cause.
    cause = error.__cause__ or error
    if "no space left" in str(cause).lower():
        return UserError(
            f"the disk is full: no room for {name} of {repo} in {hub_constants.HF_HUB_CACHE} "
            "(HF_HOME chooses another place)"
        )
    if hub_constants.HF_HUB_OFFLINE:
        return UserError(
            f"{name} of {repo} has not been downloaded yet and HF_HUB_OFFLINE forbids it: unset it"
        )
    if (response := getattr(cause, "response", None)) is not None:
        hint = "is your token valid (`hf auth login`, HF_TOKEN)?"
        return UserError(
            f"the hub answered {response.status_code} for {name} of {repo}: "
            + (hint if response.status_code in (401, 403) else "try again later")
        )
    return UserError(
        f"could not download {name} of {repo}, and no earlier download is there to use: is the "
        f"network up? ({type(cause).__name__})"
    )


def _download(repo: str, name: str) -> Path | None:
    """A repository's file from the cache or the hub; None where the repository has no such file."""
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except hub_errors.LocalEntryNotFoundError as error:  # also an EntryNotFoundError
        raise _explain(repo, name, error) from error
    except hub_errors.EntryNotFoundError:
        return None
    except Exception as error:  # requests, httpx and hf_xet raise what shares no base class
        raise _explain(repo, name, error) from error


def resolve_file(given: str | Path) -> Path:
    """A file flag's value: a path, `file://PATH` or `hf://OWNER/NAME/FILE` as in moshi_mlx.

    Raises:
        UserError: the file does not exist, or cannot be downloaded.
    """
    text = str(given)
    if text.startswith("hf://"):
        parts = text.removeprefix("hf://").split("/", 2)
        if len(parts) != 3 or not all(parts):
            raise UserError(f"{text}: expected hf://OWNER/NAME/FILE")
        return _Repository("/".join(parts[:2])).get(parts[2])
    path = Path(text.removeprefix("file://")).expanduser()
    if not path.is_file():
        raise UserError(f"no file {path}" + (": it is a folder" if path.is_dir() else ""))
    return path


class _Source:
    """Where files come from by name."""

    name: str

    def find(self, name: str) -> Path | None:
        """The file's local path, None if the source has no such file."""
        # A config from elsewhere may name any file: it must not lead out of its folder. Files
        # inside may be links (the hub's cache is made of them), so only the name is judged.
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{self.name}: the config names a file outside its folder: {name!r}")
        return self._find(name)

    def get(self, name: str, instead: str = "") -> Path:
        """The file's local path.

        Raises:
            UserError: there is no such file; `instead` says what else the user can do.
        """
        path = self.find(name)
        if path is None:
            raise UserError(f"{self.name} has no file {name}{self._found()}{instead}")
        return path

    def _find(self, name: str) -> Path | None:
        raise NotImplementedError

    def _found(self) -> str:
        return ""


class _Repository(_Source):
    def __init__(self, name: str, progress: Progress = silent):
        self.name, self.progress = name, progress

    def _find(self, name: str) -> Path | None:
        self.progress(f"{self.name}: {name}")
        return _download(self.name, name)


class _Folder(_Source):
    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path

    def _find(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None

    def _found(self) -> str:
        names = sorted(path.name for path in self.path.iterdir())[:8]
        return f" (found: {', '.join(names) or 'nothing'})"


def open_source(name: str, progress: Progress = silent) -> _Source:
    """What a name means: `demo`, a folder that is there, or a repository on the hub.

    Raises:
        UserError: it can be none of them.
    """
    path = DEMO if name == "demo" else Path(name).expanduser()
    if name and path.is_dir():
        return _Folder(name, path)
    if path.is_file():
        raise UserError(
            f"{name} is a file: expected OWNER/NAME, a folder or demo (--moshi-weight?)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "~")):
        raise UserError(f"no folder {name}: expected OWNER/NAME on the hub, a folder, or demo")
    return _Repository(name, progress)


def _moshi_file(source: _Source, config: Config | None, quantized: int | None) -> Path:
    """The LM's file: the config's, else what `-q` asks for where it is ready made, else any."""
    instead = "; name one with --moshi-weight"
    if config and "moshi_name" in config:
        return source.get(config["moshi_name"], instead)
    ready = [f"model.q{quantized}.safetensors"] if quantized else []
    for name in (*ready, *MOSHI_NAMES):
        if found := source.find(name):
            return found
    if config is None and _is_helium(source):
        return source.get(HELIUM_NAMES["moshi_name"], instead)
    raise UserError(f"{source.name} has no {', '.join(MOSHI_NAMES)}{source._found()}{instead}")


def _is_helium(source: _Source | None) -> bool:
    return source is not None and "helium" in Path(source.name).name


def find_files(
    hf_repo: str | None = None,
    *,
    moshi_weight: str | Path | None = None,
    mimi_weight: str | Path | None = None,
    tokenizer: str | Path | None = None,
    lm_config: str | Path | None = None,
    quantized: int | None = None,
    progress: Progress = silent,
) -> ModelFiles:
    """Resolve names to local files, downloading what is missing.

    Args:
        hf_repo: `owner/name` on the hub, a local folder, or `demo`. Default: moshiko, in the bits
            that `quantized` asks for (4 if it asks for none).
        moshi_weight, mimi_weight, tokenizer, lm_config: single files instead of the repository's.
        quantized: 4 or 8: take the ready made file, or quantize on load.
        progress: called with a line before each request to the hub, which may be a download.

    Raises:
        UserError: anything that is missing, in one line.
    """
    if hf_repo is None and not (moshi_weight and mimi_weight and tokenizer):
        hf_repo = f"kyutai/moshiko-mlx-q{quantized}" if quantized else DEFAULT_REPO
    source = open_source(hf_repo, progress) if hf_repo is not None else None
    config = _config(source, lm_config)
    text_only = config["n_q"] == 0 if config else _is_helium(source)
    names = config or (HELIUM_NAMES if text_only else {})

    def file(given: str | Path | None, flag: str, field: str, usual: str) -> Path:
        name = names.get(field, usual)
        return resolve_file(given) if given else source.get(name, f"; name one with {flag}")

    # Small files first: what is wrong with them must not cost the download of a large one.
    text = file(tokenizer, "--tokenizer", "tokenizer_name", TOKENIZER_NAME)
    mimi = None if text_only else file(mimi_weight, "--mimi-weight", "mimi_name", MIMI_NAME)
    moshi = resolve_file(moshi_weight) if moshi_weight else _moshi_file(source, config, quantized)
    # A memory belongs to the weights beside it, not to others.
    within = config.get("memory_path") if config and source and not moshi_weight else None
    memory = find_memory_files(source, within) if within else None
    return ModelFiles(str(moshi_weight or hf_repo), config, moshi, mimi, text, quantized, memory)


def find_memory_files(source: _Source, folder: str | Path = "") -> MemoryFiles:
    """A memory's two files.

    Raises:
        UserError: either is missing.
    """
    return MemoryFiles(*(source.get(str(Path(folder) / name)) for name in MEMORY_NAMES))


def _config(source: _Source | None, given: str | Path | None) -> Config | None:
    path = resolve_file(given) if given else source and source.find("config.json")
    return read_config(path) if path else None
