"""What several verbs share: model and talk flags, loading with a visible step, session files."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..audio import FRAME_SECONDS
from ..errors import UserError
from ..session_store import session_label, session_path

DEMO_NOTE = "a small model of a closed world (docs/voice.md), not Kyutai's Moshi"


def add_model_arguments(
    parser: argparse.ArgumentParser, default: str = "moshiko in 4 bits"
) -> None:
    """Flags that choose a model; moshi_mlx's names and spellings all work.

    Args:
        default: what the verb takes when no model is named, for the help text.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--hf-repo",
        "--model",
        metavar="REPO|DIR|demo",
        help=f"hub repository, local folder, or the bundled demo (default: {default})",
    )
    group.add_argument("--moshi-weight", "--moshi-weights", metavar="FILE", help="model weights")
    group.add_argument("--mimi-weight", "--mimi-weights", metavar="FILE", help="codec weights")
    group.add_argument("--tokenizer", metavar="FILE", help="SentencePiece text tokenizer")
    group.add_argument("--lm-config", metavar="FILE", help="the model's config.json")
    group.add_argument(
        "-q", "--quantized", type=int, choices=[4, 8], help="bits: ready made file, or on load"
    )
    group.add_argument("--codec", choices=["auto", "rustymimi", "mlx"], default="auto")
    group.add_argument(
        "--adapter-path",
        metavar="DIR|REPO",
        help="a memory for the model (memory.safetensors); none: not the one that comes with it",
    )


def add_talk_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that choose how the model talks."""
    group = parser.add_argument_group("talk")
    group.add_argument("--seed", type=int, default=299792458)
    group.add_argument("--temp", type=float, help="sampling temperature; 0 is greedy")
    group.add_argument("--text-temp", type=float, help="its own temperature for the text stream")
    group.add_argument("--top-k", type=int, help="candidates for a code (0: all)")
    group.add_argument("--text-top-k", type=int, help="candidates for a text token (0: all)")
    group.add_argument("--cfg-coef", type=float, default=1.0, help="classifier-free guidance")
    group.add_argument(
        "--condition",
        action="append",
        metavar="NAME=VALUE",
        help="for models with conditioners, e.g. description=very_good",
    )
    group.add_argument(
        "--context", "--max-kv-size", type=int, help="frames attention sees (12.5 a second)"
    )
    group.add_argument("--sinks", type=int, default=0, help="first frames that stay visible")
    group.add_argument(
        "--memory",
        choices=["on", "frozen", "off"],
        default="on",
        help="for a model with one: learn and read, only read, or the base model",
    )
    group.add_argument("--steps", type=int, help="moshi_mlx's limit; not needed: a talk has none")


def add_user_stt_argument(parser: argparse.ArgumentParser) -> None:
    """`--user-stt`; see `load_user_stt`."""
    parser.add_argument(
        "--user-stt",
        metavar="REPO|DIR",
        help="speech-to-text model for your side of the transcript: kyutai/stt-1b-en_fr-mlx",
    )


def add_session_argument(parser: argparse.ArgumentParser) -> None:
    """`--session`; becomes a path."""
    parser.add_argument(
        "--session",
        metavar="NAME|PATH",
        type=_session,
        help="go on with this talk, and save it there; a name is kept among `sessions list`",
    )


def _session(text: str) -> str:
    try:
        return str(session_path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def load_model(args: argparse.Namespace, console: Console):
    """Load the model that the flags name, saying what takes time."""
    from ..hub import find_files
    from ..model import load_files

    _calm_huggingface_hub(args.verbose, console.quiet)
    # No spinner while files are found: huggingface_hub draws its own bars on the same lines.
    files = find_files(
        args.hf_repo,
        moshi_weight=args.moshi_weight,
        mimi_weight=args.mimi_weight,
        tokenizer=args.tokenizer,
        lm_config=args.lm_config,
        quantized=args.quantized,
        progress=_noting(console),
    )
    with console.status("loading") as status:
        return load_files(files, args.adapter_path, args.codec, status.update)


def load_user_stt(args: argparse.Namespace, console: Console):
    """Load the model that `--user-stt` names; None where it names none."""
    from ..hub import find_files
    from ..model import load_files

    if args.user_stt is None:
        return None
    files = find_files(args.user_stt, progress=_noting(console))
    with console.status("loading the model for your words") as status:
        return load_files(files, codec=args.codec, progress=status.update)


def _noting(console: Console) -> Callable[[str], None]:
    return lambda message: console.print(message, style="dim", highlight=False)


def _calm_huggingface_hub(verbose: bool, quiet: bool) -> None:
    from huggingface_hub.utils import disable_progress_bars, logging

    if not verbose:
        logging.set_verbosity_error()  # one clear line of ours, not its five about retries
    if quiet:
        disable_progress_bars()


def talk_settings(args: argparse.Namespace) -> dict:
    """The keyword arguments of `Session`."""
    sampling = ("seed", "temp", "text_temp", "top_k", "text_top_k", "cfg_coef")
    settings = {name: getattr(args, name) for name in (*sampling, "context", "sinks", "memory")}
    return settings | {"conditions": _conditions(args)}


def _conditions(args: argparse.Namespace) -> dict[str, str] | None:
    if not args.condition:
        return None
    wrong = [text for text in args.condition if "=" not in text]
    if wrong:
        raise UserError(f"--condition: expected NAME=VALUE, got {wrong[0]!r}")
    return dict(text.split("=", 1) for text in args.condition)


def open_session(args: argparse.Namespace, model, console: Console, listener=None):
    """A new talk, or the one that `--session` names where there is one.

    Args:
        listener: a model for the user's words: then the talk is a `Dialogue`.
    """
    from ..user_words import open_talk

    if args.steps is not None:
        console.print("--steps is not needed: a talk has no limit here", style="dim")
    if args.session and Path(args.session).exists():
        with console.status(f"resuming {session_label(args.session)}"):
            session = open_talk(model, listener, args.session)
        seconds = session.frame * FRAME_SECONDS
        console.print(f"resumed at {seconds // 60:.0f}:{seconds % 60:04.1f}", style="dim")
        if ignored := _ignored(talk_settings(args), session.settings):
            console.print(
                f"a resumed talk keeps its settings: {', '.join(ignored)} not used", style="yellow"
            )
        return session
    return open_talk(model, listener, **talk_settings(args))


def _ignored(asked: dict, kept) -> list[str]:
    """Flags that ask for something else than a resumed talk was begun with."""
    usual = type(kept)()
    return [
        "--condition" if name == "conditions" else f"--{name.replace('_', '-')}"
        for name, value in asked.items()
        if value not in (getattr(usual, name), getattr(kept, name))
    ]


def progress_bar(console: Console, before: str, after: str | None = None) -> Progress:
    """A bar between two texts, with the times gone by and left; it vanishes at its end.

    Args:
        before, after: formats with a `task`, as `rich.progress.TextColumn` takes them.
    """
    texts = [TextColumn(text) for text in (before, after) if text is not None]
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    return Progress(texts[0], BarColumn(), *texts[1:], *times, console=console, transient=True)


def leave_at_once() -> NoReturn:
    """End the program where its worker may be inside MLX, where no exception reaches it."""
    print("\nmoshi-ttt-mlx: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def check_folders(*paths: str | None) -> None:
    """Refuse outputs into folders that do not exist, before a model is loaded.

    Raises:
        UserError: naming the first such folder.
    """
    for path in filter(None, paths):
        if not (folder := Path(path).resolve().parent).is_dir():
            raise UserError(f"no folder {folder} to write {path} into")
