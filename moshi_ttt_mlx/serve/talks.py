"""All talks of a server: beginning, taking one up again, saving, ending, and what stays of them.

Lives on the event loop; what touches a session is sent to the model thread and awaited.
"""

import asyncio
import logging
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..session_store import session_name
from ..transcript import Transcript
from .limits import Limits
from .model_thread import ModelThread
from .outbox import DONE, GOING_AWAY, INTERNAL
from .places import OnPosition, Places
from .shelf import Shelf
from .sound import KeptSound
from .talk import ServedTalk

if TYPE_CHECKING:
    from ..session import Session

_log = logging.getLogger(__name__)

STOPPED = "the server was stopped"
NOT_KEPT = "this talk had not been saved under a name, so it is gone"

OpenSession = Callable[[dict, Path | None], "Session"]


class Talks:
    """The talks of one server.

    Args:
        thread: the model's.
        open_session: called on it with settings, or with the file of a saved talk.
        shelf: saved talks.
        limits: bounds.
    """

    def __init__(
        self, thread: ModelThread, open_session: OpenSession, shelf: Shelf, limits: Limits
    ):
        self.limits, self.shelf = limits, shelf
        self._thread, self._open_session = thread, open_session
        self._places = Places(limits.sessions, limits.waiting)
        self._talks: dict[str, ServedTalk] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task] = set()
        # One after another: of two beginnings of one talk the second must see the first.
        self._opening = asyncio.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="moshi-ttt-mlx-")

    # -- beginning

    async def begin(self, settings: dict, name: str | None, on_position: OnPosition) -> ServedTalk:
        """Wait for a place and open a session: the saved talk `name`, the usual one, or a new one.

        Raises:
            UserError: no such talk, it is going on already, settings that cannot be, too many wait,
                the server stops.
        """
        if name is not None:
            await _aside(self.shelf.find, name)  # what is not there is not worth waiting for
        await self._places.take(on_position)
        try:
            async with self._opening:
                name, path = await self._choose(name)
                session = await self._on_model(lambda: self._open_session(settings, path))
                return self._register(session, name)
        except BaseException:  # a client that left in between is a CancelledError
            self._places.give_back()
            raise

    async def _choose(self, name: str | None) -> tuple[str | None, Path | None]:
        """The name of the talk to begin, and its file, each None where there is none."""
        if name is None:
            usual = self.shelf.usual
            if usual is None or not await _aside(self.shelf.is_there, usual):
                return usual, None
            name = usual
        path = await _aside(self.shelf.find, name)
        name = session_name(path)
        if self._is_on(name):
            raise UserError(
                f"the talk {name!r} is going on already: end it there, or wait a minute if it was left"
            )
        return name, path

    def _is_on(self, name: str, but: ServedTalk | None = None) -> bool:
        """Whether a talk of this name goes on: a second one would overwrite it when it ends."""
        return any(
            talk.name == name and talk is not but and not talk.ended
            for talk in self._talks.values()
        )

    def _register(self, session: "Session", name: str | None) -> ServedTalk:
        key = secrets.token_urlsafe(16)
        talk = ServedTalk(key, name, session, self.limits, self._thread.wake, self._failed)
        folder = Path(self._folder.name) / key
        talk.sound = KeptSound(folder, self.limits.record_minutes, talk.warn)
        self._talks[key] = talk
        self._thread.call(lambda: talk.sound.begin(session))
        self._thread.add(talk)
        return talk

    def resume(self, key: object) -> ServedTalk:
        """A talk whose client came back, or came anew while the old connection looked alive.

        Raises:
            UserError: no such talk, or it has ended.
        """
        talk = self.find(key)
        if talk.ended:
            raise UserError("this talk has ended")
        if timer := self._timers.pop(talk.key, None):
            timer.cancel()
        return talk

    def find(self, key: object) -> ServedTalk:
        """A talk by its key, running or ended.

        Raises:
            UserError: there is none, or no longer.
        """
        talk = self._talks.get(key) if isinstance(key, str) else None
        if talk is None:
            raise UserError("no talk with this key: it has ended, or the server was restarted")
        return talk

    # -- while it goes on

    async def save(self, talk: ServedTalk, name: object, replace: bool = False) -> str:
        """Save a talk under a name, which it has from then on; returns the name.

        Raises:
            UserError: not a name, another talk's, or the disk is full.
        """
        path = await _aside(self.shelf.room, name)
        name = session_name(path)
        if self._is_on(name, but=talk):
            raise UserError(f"the talk {name!r} is going on elsewhere: choose another name")

        def write() -> None:
            # On the model thread, where no other talk can save in between.
            if path.exists() and name != talk.name and not replace:
                raise UserError(f"there is a talk {name!r} already: choose another name")
            talk.session.save(path)

        await self._on_model(write)
        talk.name = name
        return name

    async def set_memory(self, talk: ServedTalk, mode: object) -> None:
        """Let the memory learn or only be read.

        Raises:
            UserError: a mode that cannot be changed to while a talk goes on.
        """
        await self._on_model(lambda: talk.session.set_memory(mode))
        talk.mode = mode

    def detach(self, talk: ServedTalk) -> None:
        """Its client has gone: let the talk stand still for a while."""
        talk.detach()
        self._timers[talk.key] = asyncio.get_running_loop().call_later(
            self.limits.resume_seconds, self._give_up, talk
        )

    async def transcript(self, talk: ServedTalk) -> Transcript:
        """The words so far, a copy."""
        if talk.words is not None:
            return talk.words

        def copy() -> Transcript:
            kept = talk.words is not None
            return talk.words if kept else Transcript.from_state(talk.session.transcript.state())

        return await self._on_model(copy)

    # -- ending

    async def end(
        self, talk: ServedTalk, reason: str, *, save: bool = True, code: int = DONE
    ) -> None:
        """End a talk: save it if it has a name, tell its client, give its place to the next."""
        if talk.ended:
            return
        talk.ended = True
        self._thread.remove(talk)
        if timer := self._timers.pop(talk.key, None):
            timer.cancel()
        if save and talk.name is not None:
            reason = await self._save_last(talk, reason)
        await self._on_model(lambda: _release(talk, whole=save))
        await _aside(talk.sound.close)
        if talk.outbox is not None:
            talk.outbox.close(reason, code=code)
        self._places.give_back()
        self._forget_oldest()

    async def _save_last(self, talk: ServedTalk, reason: str) -> str:
        """Returns the reason, with what the client should know about a save that did not work."""
        try:
            name = await self.save(talk, talk.name)
        except UserError as error:
            fault = str(error)
        except Exception as error:  # whatever it was, the talk must end and its client hear of it
            _log.exception("a talk could not be saved at its end")
            fault = f"it could not be saved: {error}"
        else:
            talk.emit({"type": "saved", "session": name})
            return reason
        # A client that asked for the end may take its reason for known.
        talk.emit({"type": "error", "message": fault})
        return f"{reason}; {fault}"

    def _failed(self, talk: ServedTalk, reason: str) -> None:
        # Unsaved: a broken state must not replace a whole one.
        self._spawn(self.end(talk, f"the talk failed: {reason}", save=False, code=INTERNAL))

    def _give_up(self, talk: ServedTalk) -> None:
        self._spawn(self.end(talk, "its client did not come back"))

    def _forget_oldest(self) -> None:
        over = [talk for talk in self._talks.values() if talk.ended]
        for talk in over[: max(0, len(over) - self.limits.kept_talks)]:
            talk.sound.delete()
            del self._talks[talk.key]

    async def close(self) -> None:
        """The server stops: end all talks, tell their clients, send those who wait away."""
        self._places.close(STOPPED)
        running = [talk for talk in self._talks.values() if not talk.ended]
        ends = [
            self.end(talk, STOPPED if talk.name else f"{STOPPED}; {NOT_KEPT}", code=GOING_AWAY)
            for talk in running
        ]
        for result in await asyncio.gather(*ends, *self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                _log.error("a talk did not end well", exc_info=result)

    def cleanup(self) -> None:
        """Remove the recordings."""
        self._folder.cleanup()

    # -- helpers

    async def _on_model(self, work: Callable):
        return await asyncio.wrap_future(self._thread.call(work))

    def _spawn(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)


async def _aside(work: Callable, *args):
    """Disks may take their time: on a thread of its own."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)


def _release(talk: ServedTalk, whole: bool) -> None:
    """Let go of the session, on its own thread; its words stay."""
    session, talk.session = talk.session, None
    talk.words = session.transcript
    if whole:
        try:
            session.finish()  # a model that writes the user's words is still behind
        except Exception:
            _log.exception("the user's last words are lost")
