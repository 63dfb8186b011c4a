"""Turn recorded talks into shards, which `train` and `eval` read.

A manifest in moshi-finetune's format (jsonl, stereo sound, alignments) is read as it is. Rows that
cannot be used are named and left out; a second run goes on where the first one stopped.
"""

import argparse

from rich.console import Console

from ..errors import UserError
from .common import add_model_arguments, load_model, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="MANIFEST", help="a .jsonl file, or a folder of them")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the shards")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..train.tokenize import read_manifest, tokenize_manifest

    console = Console(stderr=True, quiet=args.quiet, soft_wrap=True)
    # Before the model: a typo must not cost its loading.
    rows, _ = read_manifest(args.manifest)
    model = load_model(args, console)
    with progress_bar(console, "{task.completed:.0f} s of sound") as bar:
        task = bar.add_task("", total=sum(max(row.seconds, 0) for row in rows))
        summary = tokenize_manifest(
            args.manifest, args.out, model, lambda seconds: bar.advance(task, seconds)
        )
    for line in summary.lines():
        Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)
    if not summary.written + summary.present:
        raise UserError(f"{args.manifest}: not one usable talk")
    return 0
