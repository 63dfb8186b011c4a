"""Talk with Moshi, live: microphone in, loudspeaker out, for as long as you like.

Keys: m mute, p pause, s save, q quit. Ctrl-C ends the talk, too, and offers to keep it; a second one
quits at once. Into a pipe only words go to stdout and warnings to stderr. A device that is unplugged
is waited for; exit status 1 when it stays away; all is saved then, too.
"""

import argparse
import queue
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console

from ..devices import Loudspeaker, Microphone, describe_devices, find_again, find_device
from ..errors import UserError
from ..keep import Keeper
from ..live import MAX_WAIT_SECONDS, Ended, Noted, Ready, Said, Saved, Status, Talk, Warned
from ..session_store import session_label, session_path
from ..transcript import FORMATS, clock
from .common import (
    DEMO_NOTE,
    add_model_arguments,
    add_session_argument,
    add_talk_arguments,
    add_user_stt_argument,
    check_folders,
    leave_at_once,
    load_model,
    load_user_stt,
    open_session,
)
from .screen import make_screen

REFRESH_SECONDS = 0.125


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sound")
    group.add_argument(
        "--input-device", metavar="NAME|N", help="microphone: number or part of name"
    )
    group.add_argument("--output-device", metavar="NAME|N", help="loudspeaker, likewise")
    group.add_argument("--list-devices", action="store_true", help="show the devices and leave")
    group.add_argument(
        "--max-wait",
        type=float,
        default=MAX_WAIT_SECONDS,
        metavar="S",
        help="wait so long for a device that was unplugged (default: %(default).0f)",
    )
    group.add_argument(
        "--record", metavar="DIR", help="keep wav (left Moshi, right you) and words there"
    )
    group.add_argument(
        "--no-greeting", action="store_true", help="nothing is said before you speak"
    )
    for kind in FORMATS:
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write the words as {kind}")
    add_user_stt_argument(parser)
    add_session_argument(parser)
    parser.add_argument(
        "--max-seconds", type=float, metavar="S", help="end by itself, for scripts: asks nothing"
    )
    add_model_arguments(parser)
    add_talk_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.list_devices:
        print(describe_devices())
        return 0
    # All that can be wrong without a model is checked first: loading one takes minutes.
    check_folders(args.session, *(getattr(args, kind) for kind in FORMATS))
    microphone = Microphone(find_device("input", args.input_device))
    loudspeaker = Loudspeaker(find_device("output", args.output_device))
    transcripts = {kind: path for kind in FORMATS if (path := getattr(args, kind))}
    keeper = Keeper(args.record, transcripts, lambda message: talk.events.put(Warned(message)))
    screen, console, keys = make_screen()
    talk = Talk(
        lambda: _begin(args, console, keeper),
        microphone,
        loudspeaker,
        on_frame=keeper.put,
        on_words=keeper.put_words,
        max_seconds=args.max_seconds,
        find_again=lambda: find_again(microphone, loudspeaker),
        max_wait=args.max_wait,
        quiet_start=args.no_greeting,
    )
    try:
        return _chat(args, talk, keeper, screen, console, keys)
    except KeyboardInterrupt:
        console.show_cursor()
        keys.restore()
        leave_at_once()
    finally:
        talk.close()


def _begin(args, console: Console, keeper: Keeper):
    """The session, ready for its first frame; on the talk's own thread."""
    models = load_model(args, console), load_user_stt(args, console)
    session = open_session(args, models[0], console, models[1])
    if args.no_greeting and not session.model.speaks:
        raise UserError(f"{session.model.name} only writes: leave out --no-greeting")
    with console.status("warming up"):
        session.warm_up()
    keeper.begin(session)
    return session


def _chat(args, talk, keeper, screen, console, keys) -> int:
    with _stopping(talk) as asked:
        try:
            talk.start()
            ended = _follow(args, talk, screen, keys)
        except OSError:
            # The terminal, or the reader of a pipe, is gone; that is no reason to lose a talk.
            if args.session and talk.started:
                talk.save(args.session)
            raise
        finally:
            talk.stop()
            keeper.close()
        if ended.error is not None:
            raise ended.error
        if ended.reason:
            screen.warn(f"{ended.reason}: the talk is over")
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        may_ask = interactive and bool(ended.reason or asked == {signal.SIGINT})
        _keep(args.session, talk, screen, console if may_ask else None)
    return 1 if ended.reason else 0


@contextmanager
def _stopping(talk) -> Iterator[set[int]]:
    """Ctrl-C, SIGTERM and a closed terminal end the talk; yields the signals that came.

    A second Ctrl-C, or any of them before the talk or after it, is a KeyboardInterrupt.
    """
    asked: set[int] = set()

    def handle(number: int, _frame) -> None:
        if number != signal.SIGINT and asked - {signal.SIGINT}:
            return  # a terminal that closes sends two, a shutdown one of each
        if asked or talk.ended or not talk.started:
            raise KeyboardInterrupt
        asked.add(number)
        talk.stop()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(args, talk, screen, keys) -> Ended:
    """Show what happens, and do what the keys ask for, until the talk is over; returns its `Ended`."""
    with keys, screen:
        while True:
            event = None
            with suppress(queue.Empty):
                event = talk.events.get(timeout=REFRESH_SECONDS)
            if isinstance(event, Ended):
                break
            _tell(event, args, screen)
            for key in keys.read():
                try:
                    _press(key, args, talk)
                except UserError as error:
                    screen.warn(str(error))
            if talk.started:
                screen.show(talk.status())
    if talk.started:
        screen.note(_summary(talk.status()))
    return event


def _tell(event, args, screen) -> None:
    if isinstance(event, Ready):
        _greet(args, screen)
    elif isinstance(event, Said):
        screen.said(event.text, event.time, event.speaker)
    elif isinstance(event, Warned):
        screen.warn(event.message)
    elif isinstance(event, Noted):
        screen.tell(event.message)
    elif isinstance(event, Saved):
        screen.tell(f"saved as {session_label(event.path)}")


def _press(key: str, args, talk) -> None:
    """Do what a key of `screen.KEYS` says; others do nothing."""
    if key == "q":
        signal.raise_signal(signal.SIGINT)
    elif not talk.started:
        return
    elif key == "m":
        talk.muted = not talk.muted
    elif key == "p":
        talk.paused = not talk.paused
    elif key == "s":
        # From here on the talk has a name, under which it is also saved when it ends.
        args.session = args.session or str(session_path(_new_name()))
        talk.save_soon(args.session)


def _new_name() -> str:
    return time.strftime("talk-%Y%m%d-%H%M%S")


def _summary(status: Status) -> str:
    losses = f"{status.dropped} frames dropped, {status.underruns} underruns"
    return f"talked {clock(status.sitting)} ({clock(status.age)} in all), {losses}"


def _greet(args, screen) -> None:
    if args.hf_repo == "demo":
        screen.warn(DEMO_NOTE)
    screen.note("talk now, best with headphones; Ctrl-C ends")


def _keep(path: str | None, talk, screen, console: Console | None) -> None:
    """Save the talk: where it came from, or (with a console) where the user says.

    Raises:
        UserError: it cannot be written, and there is nobody to name another place.
    """
    while path or console:
        path = path or _ask(console)
        if not path:
            return
        try:
            talk.save(path)
        except UserError as error:
            if not console:
                raise
            screen.warn(str(error))
            path = None
        else:
            screen.note(f"kept: go on with --session {session_label(path)}")
            return


def _ask(console: Console) -> str | None:
    """Where to keep the talk; None for no."""
    proposed = _new_name()
    question = f"keep this talk? [y/N or a name; y is {proposed}] "
    while True:
        try:
            answer = console.input(question, markup=False).strip()
        except EOFError:
            console.print()
            return None
        if answer.lower() in ("", "n", "no"):
            return None
        try:
            path = session_path(proposed if answer.lower() in ("y", "yes") else answer)
        except UserError as error:
            console.print(str(error), style="yellow", markup=False, highlight=False)
            continue
        if not path.exists():
            return str(path)
        console.print(f"{answer} exists: choose another name", style="yellow", markup=False)
