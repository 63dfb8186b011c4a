"""Measure on recorded talks (shards of `tokenize`) whether a memory helps: loss by position.

In one run: the exact window, with sinks, and with --adapter-path the memory off, on, frozen, and
shuffled between talks. Files that cannot be used are named, counted and left out.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from .common import add_model_arguments, check_folders, load_model, progress_bar

SHOWN = ("words", "codebook 1", "codebooks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="folders of shards, or shards")
    parser.add_argument(
        "--window", type=int, help="keys attention sees (default: the adapter's, or the context)"
    )
    parser.add_argument(
        "--sinks", type=int, default=4, help="first frames that `sinks` keeps visible (default: 4)"
    )
    parser.add_argument(
        "--segment", type=int, default=250, help="frames read at once (default: 250)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw loss by position")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..evaluate.nll import settings_for
    from ..evaluate.report import describe
    from ..evaluate.talks import find_paths, usable_talks

    # Before the model: a typo must not cost its loading.
    _check_outputs(args)
    paths = find_paths(args.shards)
    console = Console(stderr=True, quiet=args.quiet, soft_wrap=True)
    model = load_model(args, console)
    settings = settings_for(model.lm, model.memory, args.window, args.sinks, args.segment)
    talks, skipped = usable_talks(paths, model.lm.cfg)
    found = _evaluate(model, talks, settings, console)
    found.skipped[:0] = skipped
    document = _about(args, model, settings) | describe(found, model.lm.cfg)
    try:
        _write(args, document)
    finally:  # a full disk must not cost what hours of reading have found
        for table in _tables(document):
            Console(soft_wrap=True).print(table)
    for line in _notes(args, document, model):
        Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    check_folders(args.json, args.plot)
    if args.plot and Path(args.plot).suffix != ".png":
        raise UserError(f"--plot {args.plot}: expected a name that ends in .png")
    for path in filter(None, (args.json, args.plot)):
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder: name a file to write")


def _evaluate(model, talks, settings, console: Console):
    from ..evaluate.nll import choose_variants, evaluate, frames_to_read

    variants, _ = choose_variants(model.memory, settings, len(talks))
    with progress_bar(console, "{task.completed:,}/{task.total:,} frames") as bar:
        task = bar.add_task("", total=frames_to_read(talks, variants))
        tick = lambda frames: bar.advance(task, frames)  # noqa: E731
        return evaluate(model.lm, model.memory, talks, settings, tick)


def _about(args: argparse.Namespace, model, settings) -> dict:
    """What the numbers were made with."""
    from .. import __version__, lanes

    config = model.memory.config if model.memory else None
    return {
        "command": shlex.join(["moshi-ttt-mlx", *sys.argv[1:]]),
        "version": __version__,
        "versions": lanes.describe(),
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "adapter": {"path": args.adapter_path, **vars(config)} if config else None,
        "settings": vars(settings),
    }


def _write(args: argparse.Namespace, document: dict) -> None:
    from ..evaluate.plots import plot
    from ..train.checkpoint import replace_file, write_text
    from ..train.plots import can_plot

    if args.json:
        write_text(Path(args.json), json.dumps(document, indent=2, allow_nan=False) + "\n")
    if args.plot and can_plot():
        replace_file(Path(args.plot), lambda path: plot(document, path))


# -- what is shown ----------------------------------------------------------------------------------


def _tables(document: dict) -> list[Table]:
    shown = [name for name in SHOWN if name in document["streams"]]
    return [_overall(document), *(_by_position(document, stream) for stream in shown)]


def _overall(document: dict) -> Table:
    """Every stream, all positions together."""
    table = Table("", *map(_short, document["streams"]), title="Nats a token, all positions")
    for name, variant in document["variants"].items():
        table.add_row(name, *(_value(variant["all"][s], "nll") for s in document["streams"]))
    streams = document["baseline"]["streams"]
    limits = [f"{streams[s]['guessing']:.3f}" if s in streams else "" for s in document["streams"]]
    table.add_row("guessing", *limits, style="dim")
    return table


def _by_position(document: dict, stream: str) -> Table:
    """The exact window as it is, the others as differences from it."""
    title = f"{stream} by position: nats of the exact window, the others minus it (± s.e.)"
    table = Table("", *document["positions"], title=title)
    for name, variant in document["variants"].items():
        value, error = ("nll", "se") if name == "exact" else ("minus_exact", "minus_exact_se")
        entries = [entry[stream] for entry in variant["by_position"].values()]
        table.add_row(name, *(_value(entry, value, error) for entry in entries))
    counts = [f"{variant['by_position'][p][stream]['tokens']:,}" for p in document["positions"]]
    table.add_row("tokens", *counts, style="dim")
    return table


def _short(stream: str) -> str:
    return stream.replace("codebook ", "cb ")


def _value(entry: dict, value: str, error: str | None = None) -> str:
    number, spread = entry[value], entry.get(error)
    if number is None:
        return "-"
    text = f"{number:+.3f}" if value == "minus_exact" else f"{number:.3f}"
    return text if spread is None else f"{text} ±{spread:.3f}"


def _notes(args: argparse.Namespace, document: dict, model) -> list[str]:
    """What a reader of the tables has to know."""
    from ..evaluate.plots import NO_MATPLOTLIB
    from ..evaluate.report import verdict
    from ..train.plots import can_plot

    lines = [f"skipped {entry['path']}: {entry['reason']}" for entry in document["skipped"]]
    lines.append(f"talks: {len(document['talks'])}, files skipped: {len(document['skipped'])}")
    lines += [f"{name}: not run: {reason}" for name, reason in document["not_run"].items()]
    for name, variant in document["variants"].items():
        if broken := variant["memory_broke_in"]:
            lines.append(
                f"{name}: the memory was not finite, and shut out, in: {', '.join(broken)}"
            )
    if model.memory:
        lines += _memory_notes(model.memory, document["settings"])
    if args.plot and not can_plot():
        lines.append(NO_MATPLOTLIB)
    return [*lines, verdict(document)]


def _memory_notes(adapter, settings: dict) -> list[str]:
    lines, window = [], adapter.config.window
    if all(memory.is_closed() for memory in adapter.memories.values()):
        lines.append("every gate of this memory is shut: it was never trained, and changes nothing")
    if window and window < settings["window"]:
        lines.append(f"layers with a memory see {window} keys, as trained: give --window {window}")
    if settings["segment"] == 1 and not adapter.config.rules.causal:
        lines.append("this memory looks ahead inside a call: read one frame at a time, as it talks")
    return lines
