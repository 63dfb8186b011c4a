"""Run a recording through a model: Moshi's reply and words, or (stt models) a transcript.

Words go to stdout as they come; the progress bar and messages go to stderr.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..audio import FRAME_SIZE, SAMPLE_RATE, FrameReader, WavWriter, iter_frames
from ..errors import UserError
from ..transcript import FORMATS
from .common import DEMO_NOTE, add_model_arguments, add_talk_arguments, load_model, open_session

FRAMES_PER_SECOND = SAMPLE_RATE / FRAME_SIZE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("infile", help="wav, flac, mp3 or ogg at any rate; '-' is stdin")
    parser.add_argument("outfile", nargs="?", help="the reply's sound, as wav")
    parser.add_argument("--stereo", action="store_true", help="left Moshi, right user")
    parser.add_argument("--channel", type=int, help="take one channel of the input, 0 is the left")
    for kind in FORMATS:
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write the words as {kind}")
    parser.add_argument("--session", metavar="FILE", help="go on with this talk, and save it there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_arguments(parser)
    add_talk_arguments(parser)


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=True, quiet=args.quiet)
    _check_outputs(args)
    with ExitStack() as stack:
        # Input and outputs are opened first: a typo must not cost the loading of a model.
        frames = stack.enter_context(iter_frames(args.infile, channel=args.channel))
        channels = 2 if args.stereo else 1
        sound = WavWriter(args.outfile, channels) if args.outfile else None
        if sound:
            stack.enter_context(sound)
        model = load_model(args, console)
        if sound and not model.speaks:
            raise UserError(f"{model.name} only writes: leave out {args.outfile}")
        session = open_session(args, model, console)
        if args.hf_repo == "demo":
            console.print(DEMO_NOTE, style="yellow")
        started = time.monotonic()
        heard = session.frame
        _talk(session, frames, sound, args, console)
        _report(session.frame - heard, time.monotonic() - started, console)
    _write_words(session, args, console)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    for name in ("outfile", *FORMATS, "session"):
        path = getattr(args, name)
        if path and not Path(path).resolve().parent.is_dir():
            raise UserError(f"no folder {Path(path).resolve().parent} to write {path} into")
    both = [Path(p) for p in (args.infile, args.outfile) if p and Path(p).exists()]
    if len(both) == 2 and both[0].samefile(both[1]):
        raise UserError(f"{args.outfile} is the input: name another file for the reply")
    if args.stereo and not args.outfile:
        raise UserError("--stereo needs an output file")


def _padded(session, frames: FrameReader) -> Iterator[np.ndarray]:
    """The recording, with the silence that an stt model needs before and after it."""
    model = session.model
    silence = np.zeros(FRAME_SIZE, np.float32)
    before = round(model.silence_prefix * FRAMES_PER_SECOND) if session.frame == 0 else 0
    after = 0 if model.speaks else round((model.audio_delay + 1.0) * FRAMES_PER_SECOND)
    yield from [silence] * before
    yield from frames
    yield from [silence] * after


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[speed]}"),
        BarColumn(),
        TextColumn("{task.fields[clock]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _talk(session, frames, sound, args, console) -> None:
    """Step through the recording; on an interruption keep what there is."""
    started = time.monotonic()
    with _progress(console) as bar:
        task = bar.add_task("", total=frames.total_frames, speed="", clock="")
        users = []
        try:
            for n, pcm in enumerate(_padded(session, frames), 1):
                spoken = session.step(pcm)
                if spoken.text:
                    _print_words(spoken.text, bar)
                if sound:
                    users.append(pcm)
                    if spoken.pcm is not None:
                        _write_sound(sound, spoken.pcm, users.pop(0))
                speed = n / FRAMES_PER_SECOND / (time.monotonic() - started)
                clock = f"{n / FRAMES_PER_SECOND:.0f} s"
                bar.update(task, completed=n, speed=f"{speed:.1f}x real time", clock=clock)
        except KeyboardInterrupt:
            console.print("\ninterrupted: keeping what was heard so far", style="yellow")
        # The reply of the last frames is not complete; the user's side is.
        for pcm in users if args.stereo else ():
            _write_sound(sound, np.zeros(FRAME_SIZE, np.float32), pcm)
    print(flush=True)


def _print_words(text: str, bar: Progress) -> None:
    # With both streams on one terminal the bar would otherwise be drawn into the words.
    if bar.console.is_terminal and sys.stdout.isatty():
        bar.console.print(text, end="", soft_wrap=True, markup=False, highlight=False)
    else:
        print(text, end="", flush=True)


def _write_sound(sound: WavWriter, reply: np.ndarray, user: np.ndarray) -> None:
    sound.write(np.stack([reply, user]) if sound.channels == 2 else reply[None])


def _report(frames: int, seconds: float, console: Console) -> None:
    heard = frames / FRAMES_PER_SECOND
    console.print(
        f"{frames} frames, {heard:.1f} s of sound in {seconds:.1f} s "
        f"({heard / max(seconds, 1e-9):.1f}x real time)",
        style="dim",
    )


def _write_words(session, args, console: Console) -> None:
    for kind in FORMATS:
        if path := getattr(args, kind):
            session.transcript.write(path, kind)
    if args.session:
        with console.status(f"saving {args.session}"):
            session.save(args.session)
