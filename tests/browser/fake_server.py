"""A server that speaks docs/server.md's contract without a model, so that faults can be made to order.

Its reply to a frame is that frame, halved; every fourth frame it says a word, and hears one in between.
"""

import asyncio
import itertools
import json
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
from aiohttp import WSMsgType, web

import moshi_ttt_mlx

STATIC = Path(moshi_ttt_mlx.__file__).parent / "serve" / "static"
CSP = "default-src 'self'; connect-src 'self' ws: wss:"
FRAME = 1920

INFO = {
    "name": "moshi-ttt-mlx",
    "version": "0.0.0",
    "model": "fake",
    "speaks": True,
    "user_stt": "fake-stt",
    "sample_rate": 24000,
    "frame_size": FRAME,
    "context": 3000,
    "max_context": 3000,
    "memory": {"placement": "cache", "inner": "mlp", "read": "query", "layers": [1], "window": 50},
    "limits": {"sessions": 1, "resume_seconds": 60},
    "defaults": {
        "temp": 0.8,
        "text_temp": 0.7,
        "top_k": 250,
        "seed": 299792458,
        "context": 3000,
        "memory": "on",
    },
    "session": None,
    "needs_token": False,
}


class FakeTalk:
    """What outlives a connection: words, heard sound, and where the talk stands."""

    def __init__(self, key, start):
        self.key, self.start = key, start
        self.settings = {**INFO["defaults"], **(start.get("settings") or {})}
        self.session = start.get("session")
        self.heard, self.words, self.frame, self.paused = [], [], 0, False
        self.mode = self.settings["memory"]

    def step(self, samples):
        """The reply to a frame, and the piece of a word it completes, or None."""
        self.heard.append(samples)
        self.frame += 1
        piece = None
        if self.frame % 2 == 0:
            speaker = "moshi" if self.frame % 4 == 0 else "user"
            start = round(self.frame * 0.08, 3)
            text = f" {speaker[0]}{self.frame}<b>"
            piece = {"text": text, "speaker": speaker, "start": start, "end": start + 0.08}
            self.words.append(piece)
        return samples / 2, piece

    def meter(self):
        return {
            "type": "meter",
            "age": self.frame * 0.08,
            "lag_ms": 80.0,
            "frame_ms": 31.0,
            "dropped": 3,
            "skipped": 0,
            "window_fill": min(1.0, self.frame / 3000),
            "levels": {"user": -30.0, "moshi": -36.0},
            "paused": self.paused,
            "memory": {
                "mode": self.mode,
                "ok": True,
                "layers": 1,
                "tokens": self.frame,
                "updates": self.frame // 5,
                "step": 0.002,
                "drift": 0.001 * self.frame,
                "gate": 0.5,
            },
        }


class FakeServer:
    """`with FakeServer() as server:` then `server.url`.

    Attributes for tests: `talks` by key, `first_messages`, `info` (the answer of /api/info), `deaf` (no
    connection is taken), `places` (0: all are taken), `refusal` (why no talk begins), `quiet` (says
    nothing by itself but sound), `farewell` (a message before the end that was asked for).
    """

    _numbers: ClassVar = itertools.count(1)

    def __init__(self, port=0):
        self.port = port
        self.info = {**INFO}
        self.talks, self.saved, self.first_messages = {}, {}, []
        self.sockets, self.deaf, self.places, self.quiet = {}, False, 1, False
        self.refusal = self.farewell = None

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(120)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def cut(self):
        """Drop every connection without a goodbye, as a network does."""
        self._loop.call_soon_threadsafe(self._abort)

    def _abort(self):
        for socket in list(self.sockets):
            self.sockets[socket].abort()

    def send(self, message):
        """Send a JSON message on every connection."""
        for socket in list(self.sockets):
            asyncio.run_coroutine_threadsafe(socket.send_json(message), self._loop).result(10)

    @property
    def talk(self):
        """The latest talk."""
        return list(self.talks.values())[-1]

    def _serve(self, started):
        asyncio.run(self._main(started))

    async def _main(self, started):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.on_response_prepare.append(self._secure)
        app.router.add_get("/", self._page)
        app.router.add_static("/static", STATIC)
        app.router.add_get("/api/info", self._info)
        app.router.add_get("/api/sessions", self._sessions)
        app.router.add_get("/api/talks/{key}/{file}", self._download)
        app.router.add_get("/api/talk", self._talk)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        self._abort()
        await runner.cleanup()

    async def _secure(self, _, response):
        response.headers["Content-Security-Policy"] = CSP

    async def _page(self, _):
        return web.FileResponse(STATIC / "index.html")

    async def _info(self, _):
        return web.json_response(self.info)

    async def _sessions(self, _):
        saved = self.saved.items()
        found = [{"session": name, "age": t.frame * 0.08, "fits": True} for name, t in saved]
        return web.json_response(found)

    async def _download(self, request):
        talk = self.talks[request.match_info["key"]]
        words = [{**word, "text": word["text"].strip()} for word in talk.words]
        return web.json_response({"words": words, "file": request.match_info["file"]})

    async def _talk(self, request):
        if self.deaf:
            raise web.HTTPServiceUnavailable
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[socket] = request.transport
        try:
            await self._converse(socket)
        finally:
            del self.sockets[socket]
        return socket

    async def _converse(self, socket):
        start = json.loads((await socket.receive()).data)
        self.first_messages.append(start)
        if self.refusal:
            await socket.send_json({"type": "ended", "reason": self.refusal, "again": False})
            return
        if self.places == 0:
            await socket.send_json({"type": "wait", "message": "1 of 1 talks", "position": 1})
            while self.places == 0 and not socket.closed:
                await asyncio.sleep(0.05)
        talk = self._open(start)
        await socket.send_json(
            {
                "type": "ready",
                "key": talk.key,
                "model": "fake",
                "settings": talk.settings,
                "session": talk.session,
                "age": talk.frame * 0.08,
                "resumed": talk.frame > 0,
            }
        )
        async for message in socket:
            if message.type == WSMsgType.BINARY:
                await self._hear(socket, talk, np.frombuffer(message.data, "<f4"))
            elif await self._obey(socket, talk, json.loads(message.data)):
                break

    def _open(self, start):
        if start.get("resume"):
            return self.talks[start["resume"]]
        talk = FakeTalk(f"key{next(self._numbers)}", start)
        if start.get("session"):
            before = self.saved[start["session"]]
            talk.frame, talk.words = before.frame, list(before.words)
        self.talks[talk.key] = talk
        return talk

    async def _hear(self, socket, talk, samples):
        if talk.paused:
            return
        pcm, piece = talk.step(samples)
        await socket.send_bytes(pcm.astype("<f4").tobytes())
        if piece and not self.quiet:
            await socket.send_json({"type": "word", **piece})
        if talk.frame % 4 == 0 and not self.quiet:
            await socket.send_json(talk.meter())

    async def _obey(self, socket, talk, request):
        """Answer one request; True when it was the last."""
        kind = request["type"]
        if kind in ("pause", "resume"):
            talk.paused = kind == "pause"
            await socket.send_json({"type": "paused", "paused": talk.paused})
        elif kind == "save":
            self.saved[request["session"]] = talk
            await socket.send_json({"type": "saved", "session": request["session"]})
        elif kind == "memory":
            talk.mode = request["mode"]
            await socket.send_json({"type": "memory", "mode": talk.mode})
        elif kind == "end":
            if self.farewell:
                await socket.send_json(self.farewell)
            await socket.send_json({"type": "ended", "reason": "you ended it", "again": False})
        return kind == "end"
