"""Routes of the server (docs/server.md), and its end."""

import asyncio
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from aiohttp import WSCloseCode, web

from ..errors import UserError
from ..transcript import FORMATS
from .guard import Guard, refusal
from .limits import Limits
from .link import Link
from .model_thread import ModelThread
from .opus import ChatWire, start_request
from .shelf import Shelf
from .talk import ServedTalk
from .talks import OpenSession, Talks
from .wire import TalkWire, Wire

STATIC = Path(__file__).parent / "static"

HEARTBEAT_SECONDS = 20
"""A client that does not answer a ping within half of it has vanished."""

_TYPES = {"txt": "text/plain", "json": "application/json", "srt": "text/plain", "vtt": "text/vtt"}


class Server:
    """Handlers around one model.

    Args:
        info: of the model, for `/api/info`; see `describe`.
        defaults: settings of a new talk.
        guard: who may connect.
        limits: bounds.
    """

    def __init__(self, info: dict, defaults: dict, guard: Guard, limits: Limits):
        self._info, self._defaults, self._guard, self._limits = info, defaults, guard, limits
        self._sockets: weakref.WeakSet[web.WebSocketResponse] = weakref.WeakSet()

    def app(self, thread: ModelThread, open_session: OpenSession, shelf: Shelf) -> web.Application:
        """The application; its end closes the thread.

        Args:
            thread: the model's; closed when the application ends.
            open_session: makes a session, on the thread; see `Talks`.
            shelf: saved talks.
        """

        async def run(app: web.Application):
            self._talks = Talks(thread, open_session, shelf, self._limits)
            yield
            await asyncio.get_running_loop().run_in_executor(None, thread.close)
            self._talks.cleanup()

        app = web.Application(middlewares=[self._guard.middleware])
        app.cleanup_ctx.append(run)
        app.on_shutdown.append(self._shut_down)
        app.on_response_prepare.append(self._guard.add_headers)
        app.add_routes(
            [
                web.get("/", self._page),
                web.static("/static", STATIC),
                web.get("/api/info", self._get_info),
                web.get("/api/talk", self._talk),
                web.get("/api/chat", self._chat),
                web.get("/api/sessions", self._sessions),
                web.get("/api/talks/{key}/audio.wav", self._audio),
                web.get("/api/talks/{key}/transcript.{format}", self._transcript),
            ]
        )
        return app

    async def _shut_down(self, app: web.Application) -> None:
        await self._talks.close()
        for socket in set(self._sockets):
            await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server was stopped")

    # -- pages and facts

    async def _page(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(STATIC / "index.html")

    async def _get_info(self, request: web.Request) -> web.Response:
        of_server = {"session": self._talks.shelf.usual, "needs_token": self._guard.needs_token}
        return web.json_response(self._info | of_server)

    async def _sessions(self, request: web.Request) -> web.Response:
        self._check_token(request)
        listed = await asyncio.get_running_loop().run_in_executor(None, self._talks.shelf.list)
        return web.json_response(listed)

    # -- talks

    async def _talk(self, request: web.Request) -> web.WebSocketResponse:
        in_query = self._guard.admits_request(request)
        return await self._serve(
            request,
            TalkWire(self._limits),
            lambda token: in_query or self._guard.admits(token),
        )

    async def _chat(self, request: web.Request) -> web.WebSocketResponse:
        self._check_token(request)
        start = start_request(request.query)
        return await self._serve(request, ChatWire(self._limits), lambda token: True, start)

    async def _serve(
        self,
        request: web.Request,
        wire: Wire,
        admits: Callable[[object], bool],
        start: dict | None = None,
    ) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_SECONDS, max_msg_size=self._limits.message_bytes, compress=False
        )
        await socket.prepare(request)
        self._sockets.add(socket)
        await Link(socket, wire, self._talks, self._defaults, admits).serve(start)
        return socket

    # -- downloads

    async def _transcript(self, request: web.Request) -> web.Response:
        talk, kind = self._find(request), request.match_info["format"]
        if kind not in FORMATS:
            raise web.HTTPNotFound
        words = await self._talks.transcript(talk)
        text = await asyncio.get_running_loop().run_in_executor(None, getattr(words, f"to_{kind}"))
        return web.Response(
            text=text, content_type=_TYPES[kind], charset="utf-8", headers=_as_file(talk, kind)
        )

    async def _audio(self, request: web.Request) -> web.StreamResponse:
        talk = self._find(request)
        if (path := talk.sound.path) is None:
            return refusal(404, "no sound is kept of this talk")
        headers = {"Content-Type": "audio/wav", **_as_file(talk, "wav")}
        return web.FileResponse(path, headers=headers)

    def _find(self, request: web.Request) -> ServedTalk:
        self._check_token(request)
        try:
            return self._talks.find(request.match_info["key"])
        except UserError as error:
            raise web.HTTPNotFound(reason=str(error)) from error

    def _check_token(self, request: web.Request) -> None:
        if not self._guard.admits_request(request):
            raise web.HTTPForbidden(reason="this server needs its token")


def _as_file(talk: ServedTalk, ending: str) -> dict[str, str]:
    name = time.strftime("moshi-%Y%m%d-%H%M%S", time.localtime(talk.began))
    return {"Content-Disposition": f'attachment; filename="{name}.{ending}"'}
