"""Run a recording through a model: Moshi's reply and words, or (stt models) a transcript.

Words go to stdout as they come, or at the end where two speakers' are put in order (--user-stt); the
progress bar and messages go to stderr.
"""

import argparse
import itertools
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..audio import FRAMES_PER_SECOND, SILENCE, FrameReader, WavWriter, iter_frames
from ..errors import UserError
from ..transcript import FORMATS
from ..watches import MEMORY_BROKE
from .common import (
    DEMO_NOTE,
    add_model_arguments,
    add_session_argument,
    add_talk_arguments,
    add_user_stt_argument,
    check_folders,
    load_model,
    load_user_stt,
    open_session,
    progress_bar,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("infile", help="wav, flac, mp3 or ogg at any rate; '-' is stdin")
    parser.add_argument("outfile", nargs="?", help="the reply's sound, as wav")
    parser.add_argument("--stereo", action="store_true", help="left Moshi, right user")
    parser.add_argument("--channel", type=int, help="take one channel of the input, 0 is the left")
    for kind in FORMATS:
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write the words as {kind}")
    add_user_stt_argument(parser)
    add_session_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_arguments(parser)
    add_talk_arguments(parser)


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=True, quiet=args.quiet)
    _check_outputs(args)
    with ExitStack() as stack:
        # The input is opened first: a typo must not cost the loading of a model.
        frames = stack.enter_context(iter_frames(args.infile, channel=args.channel))
        model = load_model(args, console)
        if args.outfile and not model.speaks:
            raise UserError(f"{model.name} only writes: leave out {args.outfile}")
        session = open_session(args, model, console, load_user_stt(args, console))
        # Last of all, so that a failure before it leaves an older file whole.
        sound = WavWriter(args.outfile, 2 if args.stereo else 1) if args.outfile else None
        if sound:
            stack.enter_context(sound)
        if args.hf_repo == "demo":
            console.print(DEMO_NOTE, style="yellow")
        started = time.monotonic()
        heard = session.frame
        _talk(session, frames, sound, args, console)
        _report(session.frame - heard, time.monotonic() - started, console)
    for kind in FORMATS:
        if path := getattr(args, kind):
            session.transcript.write(path, kind)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """No output may be the input, or another output, or lie in a folder that is not there."""
    outputs = [path for name in ("outfile", *FORMATS, "session") if (path := getattr(args, name))]
    check_folders(*outputs)
    taken = {} if args.infile == "-" else {Path(args.infile).resolve(): "the input"}
    for path in outputs:
        resolved = Path(path).resolve()
        if resolved.is_dir():
            raise UserError(f"{path} is a folder: name a file to write")
        if resolved in taken:
            raise UserError(f"{path} is {taken[resolved]} already: name another file")
        taken[resolved] = "an output"
    if args.stereo and not args.outfile:
        raise UserError("--stereo needs an output file")


class _Listener:
    """Steps the session on, prints its words, writes its reply, moves the bar."""

    def __init__(
        self, session, sound: WavWriter | None, bar: Progress, total: int | None, prints: bool
    ):
        self.session, self.sound, self.bar, self.prints = session, sound, bar, prints
        self.task = bar.add_task("", total=total, speed="", clock="")
        self.started, self.heard, self.memory_ok = time.monotonic(), 0, True
        # The user's frames whose reply is still to come; of a resumed talk they are not known.
        self.users = [SILENCE] * min(session.frame, session.generator.max_delay)

    def hear(self, pcm: np.ndarray) -> None:
        spoken = self.session.step(pcm)
        self.write_words(spoken)
        if self.memory_ok and not spoken.memory_ok:
            self.bar.console.print(MEMORY_BROKE, style="yellow")
        self.memory_ok = spoken.memory_ok
        if self.sound:
            self.users.append(pcm)
            if spoken.pcm is not None:
                self._write(spoken.pcm, self.users.pop(0))
        self.heard += 1
        seconds = self.heard / FRAMES_PER_SECOND
        speed = f"{seconds / (time.monotonic() - self.started):.1f}x real time"
        self.bar.update(self.task, completed=self.heard, speed=speed, clock=f"{seconds:.0f} s")

    def write_words(self, spoken) -> None:
        if spoken.text and self.prints:
            _print_words(spoken.text, self.bar)

    def finish(self) -> None:
        """The reply of the last frames is not complete; the user's side is."""
        if self.sound and self.sound.channels == 2:
            for pcm in self.users:
                self._write(SILENCE, pcm)

    def _write(self, reply: np.ndarray, user: np.ndarray) -> None:
        self.sound.write(np.stack([reply, user]) if self.sound.channels == 2 else reply)


def _talk(session, frames: FrameReader, sound, args, console: Console) -> None:
    """Step through the recording; on an interruption keep what there is."""
    from ..codec_thread import hearing_ahead

    before = session.model.silence_frames if session.frame == 0 else 0
    # Two models share one codec's ear or have one each: they stay on this thread.
    hearing = nullcontext(iter) if args.user_stt else hearing_ahead(session)
    bar = progress_bar(console, "{task.fields[speed]}", "{task.fields[clock]}")
    with hearing as ahead, bar:
        listener = _Listener(session, sound, bar, frames.total_frames, not args.user_stt)
        try:
            for pcm in ahead(itertools.chain([SILENCE] * before, frames)):
                listener.hear(pcm)
        except KeyboardInterrupt:
            console.print("\ninterrupted: keeping what was heard so far", style="yellow")
            for pcm in getattr(session.codec, "announced", []):
                listener.hear(pcm)
        if args.session:
            session.save(args.session)
        for words in session.finish():
            listener.write_words(words)
        listener.finish()
    print(session.transcript.to_txt() if args.user_stt else "\n", end="", flush=True)


def _print_words(text: str, bar: Progress) -> None:
    # With both streams on one terminal the bar would otherwise be drawn into the words.
    if bar.console.is_terminal and sys.stdout.isatty():
        bar.console.print(text, end="", soft_wrap=True, markup=False, highlight=False)
    else:
        print(text, end="", flush=True)


def _report(frames: int, seconds: float, console: Console) -> None:
    heard = frames / FRAMES_PER_SECOND
    console.print(
        f"{frames} frames, {heard:.1f} s of sound in {seconds:.1f} s "
        f"({heard / max(seconds, 1e-9):.1f}x real time)",
        style="dim",
    )
