"""The command line: one file per verb, `chat` when none is named."""

import argparse
import importlib
import logging
import sys

from .. import __version__
from ..errors import UserError
from ..lanes import ensure_compile_works, require_moshi_mlx

# Verb -> what it is for. A verb's module has `add_arguments(parser)` and `run(args) -> int | None`.
VERBS = {
    "chat": "talk, live: microphone and loudspeaker (the verb when none is named)",
    "serve": "talk in a browser: a web page and WebSockets, for this machine or others",
    "demo": "play a recorded talk of facts and questions, with the memory and without",
    "transcribe": "run a recording through a model: reply, words, subtitles",
    "sessions": "list, show and remove the talks that --session NAME keeps",
    "tokenize": "recorded talks to shards, once, for train and eval",
    "train": "teach a model's memory on shards",
    "eval": "loss by position on shards: does a memory help past the window",
    "convert": "a PyTorch Moshi-TTT memory to an adapter, or LoRA into a base model",
    "bench": "measure the frame loop beside moshi_mlx's on this machine",
    "doctor": "examine this machine: memory, devices, codec, is it fast enough",
}
DEFAULT_VERB = "chat"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; verbs import MLX only when they run."""
    parser = argparse.ArgumentParser(
        prog="moshi-ttt-mlx",
        description="Talk with Moshi on MLX for as long as you like.",
        epilog="Without a verb: chat. `moshi-ttt-mlx VERB --help` lists a verb's flags.",
    )
    parser.add_argument("--version", action="version", version=f"moshi-ttt-mlx {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, purpose in VERBS.items():
        module = importlib.import_module(f".{verb}", __package__)
        command = verbs.add_parser(verb, help=purpose, description=module.__doc__.split("\n\n")[0])
        module.add_arguments(command)
        command.add_argument(
            "-v", "--verbose", action="store_true", help="details, and tracebacks of errors"
        )
        command.set_defaults(run=module.run)
    return parser


def _with_verb(argv: list[str]) -> list[str]:
    if argv and (argv[0] in VERBS or argv[0] in ("-h", "--help", "--version")):
        return argv
    return [DEFAULT_VERB, *argv]


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Exit status: 0 done, 1 what the verb says, 2 bad input (one line on stderr), 130 interrupted.
    """
    args = build_parser().parse_args(_with_verb(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    try:
        if args.verb != "doctor":  # which says itself what is missing
            require_moshi_mlx()
        ensure_compile_works()
        return args.run(args) or 0
    except UserError as error:
        if args.verbose:
            raise
        print(f"moshi-ttt-mlx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmoshi-ttt-mlx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): that is its right.
        sys.stderr.close()
        return 0
    except Exception as error:
        if args.verbose:
            raise
        print(
            f"moshi-ttt-mlx: unexpected {type(error).__name__}: {error} "
            "(--verbose shows where; please report it)",
            file=sys.stderr,
        )
        return 1
