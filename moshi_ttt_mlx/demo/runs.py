"""Several talks on the same sound at once, each a `Session` in a process of its own.

The codec hears once, here, and every talk gets the codes. Processes, because one MLX process keeps one
core busy: its streams are bound to threads, and on a CPU they take turns.

    with Runs(load, {"with memory": {"memory": "on"}, "without": {"memory": "off"}}) as runs:
        for step in runs.hear(codec, frames):
            print(step.run, step.spoken.text)
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from ..codec import Codec, finite
from ..errors import UserError
from ..lanes import ensure_compile_works
from ..model import Model
from ..session import Session, SpokenFrame

AHEAD = 32
"""Frames that may wait for the slowest talk. Codes of so many fit into a pipe: sending never blocks."""

READ_FRAMES = 16
"""The memory's norms are read once in so many frames, or at the first fold after them."""

_CLOSE_SECONDS = 5.0

Report = dict[int, dict[str, float | int]]


@dataclass(frozen=True)
class Step:
    """What one frame brought in one of the talks.

    Attributes:
        run: its name.
        spoken: of its session.
        report: `Session.memory_report`, where it was read after this frame; else None.
    """

    run: str
    spoken: SpokenFrame
    report: Report | None


@dataclass
class _Run:
    """One talk: its process, the pipe to it, and frames that it was sent and has not answered."""

    name: str
    process: Any
    pipe: Connection
    waiting: int = 0


class Runs(AbstractContextManager):
    """Talks that are held side by side.

    Args:
        load: makes the model, in each process anew, so it has to pickle.
        settings: by name of a talk, those of its `Session`.
    """

    def __init__(self, load: Callable[[], Model], settings: Mapping[str, Mapping[str, Any]]):
        context = multiprocessing.get_context("spawn")  # MLX does not survive a fork
        self._runs = []
        for name, own in settings.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_hold, args=(theirs, load, dict(own)), daemon=True)
            with _interrupts_ignored():
                process.start()
            theirs.close()
            self._runs.append(_Run(name, process, ours))

    def hear(self, codec: Codec, frames: Iterable[np.ndarray]) -> Iterator[Step]:
        """Let all talks hear the user.

        Args:
            codec: encodes, once for all.
            frames: float32 `[1920]`.

        Yields:
            Every frame of every talk; a talk's frames are in order.

        Raises:
            UserError: a session's, or its process was ended from outside.
        """
        for pcm in frames:
            codes = codec.encode(finite(pcm))
            for run in self._runs:
                self._send(run, codes)
            yield from self._answers(AHEAD)
        yield from self._answers(0)

    def _send(self, run: _Run, codes: np.ndarray) -> None:
        # A process that has gone is told of where its answers are read.
        with suppress(BrokenPipeError):
            run.pipe.send(codes)
        run.waiting += 1

    def _answers(self, most: int) -> Iterator[Step]:
        """What is there, and more, until every talk has at most so many frames to answer."""
        while open_runs := [run for run in self._runs if run.waiting]:
            late = any(run.waiting > most for run in open_runs)
            ready = wait([run.pipe for run in open_runs], None if late else 0)
            if not ready:
                return
            for run in open_runs:
                if run.pipe in ready:
                    yield self._answer(run)

    def _answer(self, run: _Run) -> Step:
        try:
            answer = run.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise UserError(
                f"the process that held the talk {run.name!r} was ended from outside: "
                "is there memory enough for two?"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        run.waiting -= 1
        return Step(run.name, *answer)

    def __exit__(self, *_: object) -> None:
        """End the processes; frames that were not answered are lost."""
        for run in self._runs:
            run.pipe.close()
        for run in self._runs:
            run.process.join(_CLOSE_SECONDS)
            if run.process.is_alive():
                run.process.terminate()
                run.process.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal; one that is started now leaves it to this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _hold(pipe: Connection, load: Callable[[], Model], settings: dict[str, Any]) -> None:
    """One talk, in its own process: a frame's codes in, a step out, until the pipe is closed."""
    # The other end has gone: nobody waits for an answer.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            ensure_compile_works()
            session = Session(load(), **settings)
            every = _reading_interval(session)
            while True:
                spoken = session.step(pipe.recv())
                due = session.frame % every == 0
                pipe.send((spoken, session.memory_report() if due else None))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except UserError as error:
            pipe.send(error)
        except Exception as error:  # any class of it may not pickle
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _reading_interval(session: Session) -> int:
    """Frames between two looks at the memory: each is just after a fold."""
    memory = session.model.memory
    fold = memory.config.mini_batch if memory is not None else READ_FRAMES
    return -(-READ_FRAMES // fold) * fold
