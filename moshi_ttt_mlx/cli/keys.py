"""Single keys of a terminal, without Enter and without an echo; the terminal gets back what it had.

What lives here: :class:`Keys`. What does not: what a key does (`chat.py`).
"""

import os
import select
import signal
import termios
from collections.abc import Callable

_ESCAPE = "\x1b"


def foreground_terminal(stream) -> int | None:
    """A stream's descriptor where it is a terminal that this program may read from."""
    try:
        fd = stream.fileno()
        # Reading or changing the terminal from the background would stop the program.
        return fd if os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp() else None
    except (AttributeError, OSError, ValueError):  # none, closed, or something in its place
        return None


class Keys:
    """Reads keys while it is entered.

    Ctrl-C still interrupts. Ctrl-Z and Ctrl-\\ act as ever, on a terminal that is as it was before;
    after Ctrl-Z and `fg` keys are read again.

    Args:
        fd: of a terminal, see `foreground_terminal`; None reads nothing.
        show_cursor: called with True when the program is stopped, with False when it goes on.
    """

    def __init__(self, fd: int | None, show_cursor: Callable[[bool], object] = lambda shown: None):
        self.fd, self._show_cursor = fd, show_cursor
        self._before: list | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "Keys":
        if self.fd is not None:
            self._before = termios.tcgetattr(self.fd)
            for number in (signal.SIGTSTP, signal.SIGQUIT):
                self._handlers[number] = signal.signal(number, self._leave_for)
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def restore(self) -> None:
        """Give the terminal back as it was; harmless when it is gone, and more than once."""
        if self._before is not None:
            try:
                termios.tcsetattr(self.fd, termios.TCSADRAIN, self._before)
            except termios.error:  # the window was closed
                self._before = None

    def read(self) -> str:
        """The keys pressed since the last call; arrows and the like are left out."""
        if self.fd is None or not select.select([self.fd], [], [], 0)[0]:
            return ""
        try:
            pressed = os.read(self.fd, 64).decode(errors="ignore")
        except OSError:  # the window was closed
            return ""
        return "" if pressed.startswith(_ESCAPE) else pressed

    def _listen(self) -> None:
        mode = termios.tcgetattr(self.fd)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(self.fd, termios.TCSADRAIN, mode)

    def _leave_for(self, number: int, _frame) -> None:
        """Do what a signal does by itself, without us."""
        self.restore()
        self._show_cursor(True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # Here after `fg`.
        signal.signal(number, self._leave_for)
        self._show_cursor(False)
        self._listen()
