"""Play a talk of facts and questions from a recording: with the memory and without it, side by side.

Both sides go to stdout with their times, passage by passage; the progress bar and messages to stderr
when stdout is no terminal. Files go into a folder: stereo wav (left Moshi, right the user), words, and
a page with a picture of all.
"""

import argparse
import functools
import time

from rich.console import Console

from ..errors import UserError
from ..transcript import clock
from .common import add_model_arguments, load_model, progress_bar
from .demo_screen import Page

ON, OFF, ALONE = "with memory", "without memory", "Moshi"
PICTURE = "demo.png"
NO_MATPLOTLIB = f"no {PICTURE}: pip install matplotlib (or moshi-ttt-mlx[plots])"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recording",
        metavar="FILE",
        help="the user's side: wav, flac, mp3 or ogg, with a json of the same name beside it that "
        "says what is said when (docs/demo.md; default: the bundled talk)",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="demo_output", help="folder for the files (demo_output)"
    )
    parser.add_argument("--seed", type=int, default=299792458)
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_arguments(parser, default="demo")
    parser.set_defaults(hf_repo="demo")


def run(args: argparse.Namespace) -> None:
    from ..demo.record import Record, make_folder
    from ..demo.turns import read_recording

    out, notes = Console(highlight=False), Console(stderr=True, quiet=args.quiet)
    # Files first: a typo must not cost the loading of a model.
    recording, folder = read_recording(args.recording), make_folder(args.out)
    model = load_model(args, notes)
    if not model.speaks:
        raise UserError(f"{model.name} only writes: the demo needs a model that speaks")
    settings = {"seed": args.seed, "temp": args.temp}
    runs = {ALONE: settings}
    if model.memory is not None:
        runs = {ON: settings | {"memory": "on"}, OFF: settings | {"memory": "off"}}
    page = Page(out, list(runs))
    page.head()
    if model.memory is None:
        page.note(f"{model.name} has no memory: one run only (--adapter-path brings one)")
    with Record(recording, list(runs), _window(model), folder) as record:
        seconds = _talk(args, model.new_codec(), runs, record, page, notes)
        for passage in record.finish():
            page.passage(passage)
        page.summary(record, seconds)
        _draw(record, page)
    page.files(folder)


def _window(model):
    from ..demo.story import Window

    return Window(model.lm.cfg.transformer.context, max(model.lm.cfg.audio_delays) + 1)


def _load_quietly(args: argparse.Namespace):
    return load_model(args, Console(quiet=True))


def _talk(args, codec, runs, record, page: Page, notes: Console) -> float:
    """Hold all talks and print what is over; on an interruption keep what there is.

    Returns:
        Seconds since the slowest talk began.
    """
    from ..demo.runs import Runs

    # On one terminal a bar of another console would be drawn into the words.
    console = page.console if page.console.is_terminal and not args.quiet else notes
    frames = record.recording.frames
    talks = Runs(functools.partial(_load_quietly, args), runs)
    bar = progress_bar(console, "{task.fields[clock]}", "{task.fields[speed]}")
    bar.disable = not console.is_terminal  # rich ends a bar with an empty line, into files too
    with talks, bar:
        task = bar.add_task("", total=len(frames), clock="loading", speed="")
        started = time.monotonic()
        try:
            for step in talks.hear(codec, frames):
                if record.frames == 0:
                    started = time.monotonic()
                _take(step, record, page)
                shown = _progress(record.seconds, time.monotonic() - started)
                bar.update(task, completed=record.frames, **shown)
        except KeyboardInterrupt:
            page.note("interrupted: keeping what was heard so far")
    return time.monotonic() - started


def _take(step, record, page: Page) -> None:
    from ..watches import MEMORY_BROKE

    if record.talks[step.run].memory_ok and not step.spoken.memory_ok:
        page.note(f"{step.run}: {MEMORY_BROKE}")
    for passage in record.take(step):
        page.passage(passage)


def _progress(talked: float, seconds: float) -> dict[str, str]:
    if not talked:
        return {}
    return {"clock": clock(talked), "speed": f"{talked / max(seconds, 1e-9):.1f}x real time"}


def _draw(record, page: Page) -> None:
    from ..demo.picture import draw
    from ..train.checkpoint import replace_file
    from ..train.plots import can_plot

    if not can_plot():
        page.note(NO_MATPLOTLIB)
    elif record.frames:
        replace_file(record.folder / PICTURE, lambda path: draw(record, path))
