"""The one thread that touches the model, and whose turn it is.

MLX streams belong to the thread that made them, so loading, stepping, saving and reading a memory's
norms all happen here, while the event loop stays free. Jobs come before frames; frames go round: one
of each talk that has one, so that no talk waits for more than one frame of every other.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from ..live import leave_mlx

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0


class Player(Protocol):
    """Someone who takes turns on the model thread."""

    def waiting(self) -> bool:
        """Whether there is a frame to step; quick, and true only until it has been stepped."""

    def turn(self) -> None:
        """Step one frame."""

    def fail(self, error: Exception) -> None:
        """A turn raised; there will be no more."""


class ModelThread:
    """Runs jobs and turns, one at a time."""

    def __init__(self):
        self._jobs: deque[tuple[Callable, Future]] = deque()
        self._players: deque[Player] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def call(self, work: Callable) -> Future:
        """Run `work()` as soon as the current frame is done; a cancelled one is left out."""
        done: Future = Future()
        with self._changed:
            if self._closing:
                done.cancel()
                return done
            self._jobs.append((work, done))
            self._changed.notify()
        return done

    def add(self, player: Player) -> None:
        """Give turns to one more."""
        with self._changed:
            self._players.append(player)
            self._changed.notify()

    def remove(self, player: Player) -> None:
        """No more turns, as soon as the current one is over; unknown ones are no error."""
        with self._changed:
            if player in self._players:
                self._players.remove(player)

    def wake(self) -> None:
        """Look again who waits: a player has got a frame."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Finish the jobs that are there and end; waits for it, for some seconds."""
        with self._changed:
            self._closing = True
            self._players.clear()
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    # -- on the thread

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, tuple):
                self._do_job(*item)
            else:
                self._give_turn(item)
            del item  # whatever it holds must not live until the next one comes
        leave_mlx()

    def _next(self) -> "tuple[Callable, Future] | Player | None":
        """A job, a player with a frame, or None at the end; waits for one of them."""
        with self._changed:
            while True:
                if self._jobs:
                    return self._jobs.popleft()
                if self._closing:
                    return None
                if (player := self._whose_turn()) is not None:
                    return player
                self._changed.wait()

    def _whose_turn(self) -> Player | None:
        for _ in range(len(self._players)):
            player = self._players[0]
            self._players.rotate(-1)
            if player.waiting():
                return player
        return None

    @staticmethod
    def _do_job(work: Callable, done: Future) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(_plain(error))

    def _give_turn(self, player: Player) -> None:
        try:
            player.turn()
        except BaseException as error:  # one talk's failure must not end the others
            _log.warning("a talk failed", exc_info=error)
            self.remove(player)
            player.fail(_plain(error))


def _plain(error: BaseException) -> Exception:
    """An exception that `except Exception` sees: a panic in rustymimi is none."""
    return error if isinstance(error, Exception) else RuntimeError(str(error))
