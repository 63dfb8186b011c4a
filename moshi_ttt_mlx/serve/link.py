"""One WebSocket: its first message, its place in line, its talk, its end; in either protocol."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict

import numpy as np
from aiohttp import web

from ..audio import SAMPLE_RATE
from ..errors import UserError
from .limits import Bucket
from .outbox import INTERNAL, POLICY, Outbox
from .settings import parse_settings
from .talk import ServedTalk
from .talks import Talks
from .wire import Wire

METER_SECONDS = 1 / 3

LEAST_SAMPLES = 64
"""A message counts as so much sound at least: many small ones cost time, too."""

_NOTHING = np.empty(0, np.float32)

_log = logging.getLogger(__name__)


class Link:
    """Serves one connection from its opening to its end.

    Args:
        socket: already accepted.
        wire: its protocol.
        talks: of the server.
        defaults: settings of a new talk.
        admits: whether a token lets its owner in; asked at `start`.
    """

    def __init__(
        self,
        socket: web.WebSocketResponse,
        wire: Wire,
        talks: Talks,
        defaults: dict,
        admits: Callable[[object], bool],
    ):
        self._socket, self._wire, self._talks = socket, wire, talks
        self._defaults, self._admits = defaults, admits
        self._outbox = Outbox(talks.limits)
        self._talk: ServedTalk | None = None
        self._opening: asyncio.Task | None = None
        self._can_return = False  # not before it knows its talk's key
        burst = talks.limits.burst_seconds * SAMPLE_RATE
        self._sound = Bucket(burst, 2 * SAMPLE_RATE)
        self._requests = Bucket(talks.limits.requests, talks.limits.requests)

    async def serve(self, start: dict | None = None) -> None:
        """Until the talk or the connection ends.

        Args:
            start: the first request, for protocols that have none.
        """
        if start is not None:
            self._begin(start)
        deadline = asyncio.get_running_loop().call_later(
            self._talks.limits.start_seconds, self._check_begun
        )
        parts = [asyncio.create_task(part()) for part in (self._read, self._write, self._measure)]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            deadline.cancel()
            await _stop(*parts, self._opening)
            await self._leave()
        await self._socket.close(code=self._outbox.code, message=_short(self._outbox.reason))

    # -- three loops; the first to end ends the connection

    async def _read(self) -> None:
        async for message in self._socket:
            try:
                await self._take(self._wire.decode(message))
            except UserError as error:
                self._refuse(str(error))
            except Exception as error:
                _log.exception("a request failed")
                self._outbox.close(f"the server failed: {error}", again=True, code=INTERNAL)

    async def _write(self) -> None:
        while (event := await self._outbox.get()) is not None:
            data = self._wire.encode(event)
            if isinstance(data, str):
                await self._socket.send_str(data)
            elif data is not None:
                await self._socket.send_bytes(data)
            if isinstance(event, dict) and event["type"] == "ready":
                self._can_return = self._wire.resumable

    async def _measure(self) -> None:
        while True:
            await asyncio.sleep(METER_SECONDS)
            if self._talk is not None:
                self._outbox.put(self._talk.meter())

    # -- what the client sends

    async def _take(self, message: np.ndarray | dict | None) -> None:
        if isinstance(message, dict):
            await self._do(message)
        else:
            self._hear(_NOTHING if message is None else message)

    def _hear(self, samples: np.ndarray) -> None:
        if not self._sound.take(max(len(samples), LEAST_SAMPLES)):
            self._throw_out("sound came faster than it can be heard")
        elif self._talk is not None:
            self._talk.hear(samples)

    def _refuse(self, message: str) -> None:
        """Answer a bad message, which counts as a request."""
        if self._allow_request():
            self._outbox.put({"type": "error", "message": message})

    def _allow_request(self) -> bool:
        allowed = self._requests.take(1)
        if not allowed:
            self._throw_out("too many requests a second")
        return allowed

    def _throw_out(self, reason: str) -> None:
        self._outbox.close(reason, again=self._talk is not None, code=POLICY)

    async def _do(self, request: dict) -> None:
        if not self._allow_request():
            return
        kind = request["type"]
        if kind == "start":
            self._begin(request)
        elif kind == "end" and self._talk is None:
            self._outbox.close("ended by the client")
        elif kind not in _REQUESTS:
            raise UserError(f"unknown request {kind[:40]!r}")
        elif self._talk is None:
            raise UserError(f'"{kind}" before the talk has begun')
        elif not self._talk.ended:
            await _REQUESTS[kind](self, request)

    async def _pause(self, request: dict) -> None:
        paused = request["type"] == "pause"
        self._talk.pause(paused)
        self._outbox.put({"type": "paused", "paused": paused})

    async def _save(self, request: dict) -> None:
        name = await self._talks.save(
            self._talk, request.get("session"), request.get("replace") is True
        )
        self._outbox.put({"type": "saved", "session": name})

    async def _set_memory(self, request: dict) -> None:
        await self._talks.set_memory(self._talk, request.get("mode"))
        self._outbox.put({"type": "memory", "mode": self._talk.mode})

    async def _end(self, request: dict) -> None:
        await self._talks.end(self._talk, "ended by the client")

    # -- beginning and leaving

    def _begin(self, request: dict) -> None:
        if self._opening is not None:
            raise UserError("this connection has begun a talk already")
        self._opening = asyncio.get_running_loop().create_task(self._open(request))

    def _check_begun(self) -> None:
        if self._opening is None:
            self._outbox.close('no "start" came', code=POLICY)

    async def _open(self, request: dict) -> None:
        try:
            if not self._admits(request.get("token")):
                raise UserError("this server needs its token, as printed where it was started")
            key = request.get("resume")
            talk = await self._new_talk(request) if key is None else self._talks.resume(key)
        except UserError as error:
            self._outbox.close(str(error), code=POLICY)
            return
        except Exception as error:
            _log.exception("a talk could not begin")
            self._outbox.close(f"the talk could not begin: {error}", code=INTERNAL)
            return
        self._can_return = key is not None
        self._outbox.put(_ready(talk, resumed=key is not None or talk.age > 0))
        talk.attach(self._outbox)
        self._talk = talk

    async def _new_talk(self, request: dict) -> ServedTalk:
        name = request.get("session")
        if name is not None and request.get("settings"):
            raise UserError("a saved talk keeps its settings: send none")
        settings = parse_settings(request.get("settings"), self._defaults)
        return await self._talks.begin(settings, name, self._wait)

    def _wait(self, position: int) -> None:
        message = (
            f"all places are taken: {position - 1} before you; you are connected when one is free"
        )
        self._outbox.put({"type": "wait", "message": message, "position": position})

    async def _leave(self) -> None:
        talk = self._talk
        if talk is None or talk.ended or talk.outbox is not self._outbox:
            return
        if self._can_return:
            self._talks.detach(talk)
        else:
            await self._talks.end(talk, "its client left")


_REQUESTS: dict[str, Callable[[Link, dict], Awaitable[None]]] = {
    "pause": Link._pause,
    "resume": Link._pause,
    "save": Link._save,
    "memory": Link._set_memory,
    "end": Link._end,
}


def _short(reason: str) -> bytes:
    """As much as a closing frame holds (RFC 6455: 125 bytes with its code)."""
    return reason.encode()[:123].decode(errors="ignore").encode()


def _ready(talk: ServedTalk, resumed: bool) -> dict:
    return {
        "type": "ready",
        "key": talk.key,
        "model": talk.session.model.name,
        "settings": asdict(talk.session.settings),
        "session": talk.name,
        "age": talk.age,
        "resumed": resumed,
    }


async def _stop(*tasks: asyncio.Task | None) -> None:
    for task in filter(None, tasks):
        task.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await task
