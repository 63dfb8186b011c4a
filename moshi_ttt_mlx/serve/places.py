"""Who may talk now, and who waits in line."""

import asyncio
from collections import deque
from collections.abc import Callable

from ..errors import UserError

OnPosition = Callable[[int], None]


class Places:
    """A number of places; who finds none waits, first come first served.

    Args:
        count: places.
        waiting: length of the line at most.
    """

    def __init__(self, count: int, waiting: int):
        self._free, self._waiting = count, waiting
        self._line: deque[tuple[asyncio.Future, OnPosition]] = deque()

    async def take(self, on_position: OnPosition) -> None:
        """Take a place, now or when one is free. Cancelled, it leaves the line.

        Args:
            on_position: called with 1 for the next in line, and so on, whenever it changes.

        Raises:
            UserError: the line is too long, or the server stops.
        """
        if self._free:
            self._free -= 1
            return
        if len(self._line) >= self._waiting:
            raise UserError("all places are taken and many wait: come back later")
        turn = asyncio.get_running_loop().create_future()
        self._line.append((turn, on_position))
        on_position(len(self._line))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the place came at the same moment
                self.give_back()
            else:
                self._leave(turn)
            raise

    def give_back(self) -> None:
        """A place is free: the first in line gets it."""
        if not self._line:
            self._free += 1
            return
        turn, _ = self._line.popleft()
        turn.set_result(None)
        self._tell()

    def close(self, reason: str) -> None:
        """Send everyone in line away."""
        while self._line:
            turn, _ = self._line.popleft()
            turn.set_exception(UserError(reason))

    def _leave(self, turn: asyncio.Future) -> None:
        self._line = deque(entry for entry in self._line if entry[0] is not turn)
        self._tell()

    def _tell(self) -> None:
        for position, (_, on_position) in enumerate(self._line, 1):
            on_position(position)
