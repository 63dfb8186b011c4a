"""A server in this process, sessions without a model, and a client that remembers what it was sent."""

import asyncio
import functools
import json
from contextlib import asynccontextmanager

import numpy as np
from aiohttp import WSMsgType
from aiohttp.test_utils import TestClient, TestServer
from fake_talk import FakeSession

from moshi_ttt_mlx import UserError
from moshi_ttt_mlx.serve.app import Server
from moshi_ttt_mlx.serve.guard import Guard
from moshi_ttt_mlx.serve.limits import Limits
from moshi_ttt_mlx.serve.model_thread import ModelThread
from moshi_ttt_mlx.serve.shelf import Shelf
from moshi_ttt_mlx.session import Settings
from moshi_ttt_mlx.session_store import SessionStore
from moshi_ttt_mlx.transcript import Transcript

PATIENCE = 240  # seconds after which a test is stuck; nothing depends on how fast it is


def async_test(test):
    """Run a coroutine test, and end it if it is stuck."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), PATIENCE))

    return run


class ServedSession(FakeSession):
    """`FakeSession` with what a server needs; `name`: of a saved talk it stands for."""

    def __init__(self, settings, path=None, **fake):
        super().__init__(**fake)
        self.settings = Settings(**settings)
        self.model.name = "fake"
        self.transcript = Transcript({self.speaker: self.model.silence_prefix})
        self.path = path

    def warm_up(self):
        pass

    def save(self, path):
        super().save(path)
        path.write_text(f"{self.frame} frames")

    def set_memory(self, mode):
        if mode not in ("on", "frozen"):
            raise UserError("no such mode")
        self.settings = Settings(memory=mode)


class Opener:
    """Opens fake sessions and remembers them; `fakes` are arguments for the first ones."""

    def __init__(self, *fakes):
        self.fakes, self.sessions = list(fakes), []

    def __call__(self, settings, path):
        fake = self.fakes.pop(0) if self.fakes else {}
        if isinstance(fake, BaseException):
            raise fake
        self.sessions.append(ServedSession(settings, path, **fake))
        return self.sessions[-1]


@asynccontextmanager
async def serving(
    folder,
    open_session=None,
    *,
    host="localhost",
    token=None,
    defaults=None,
    fits="",
    usual=None,
    **limits,
):
    """A client of a running server.

    Args:
        folder: of saved sessions.
        fits: fingerprint of the model.
        usual: name of the talk that is meant where none is named.
        limits: fields of `Limits`.
    """
    limits = Limits(**limits)
    server = Server({"model": "fake"}, defaults or {}, Guard(host, token), limits)
    shelf = Shelf(SessionStore(folder), fits, usual)
    app = server.app(ModelThread(), open_session or Opener(), shelf)
    async with TestClient(TestServer(app)) as client:
        client.talks = lambda: server._talks
        yield client


class Talker:
    """One connection to `/api/talk`."""

    def __init__(self, socket):
        self.socket, self.events, self.frames, self.words = socket, [], [], ""

    @classmethod
    async def connect(cls, client, query="", **start):
        """Connect and send `start`, unless told `start=None`."""
        talker = cls(await client.ws_connect(f"/api/talk{query}"))
        if start != {"start": None}:
            await talker.ask("start", **start)
        return talker

    @classmethod
    async def begin(cls, client, **start):
        """Connect and wait until the talk has begun."""
        talker = await cls.connect(client, **start)
        talker.ready = await talker.hears("ready")
        return talker

    async def ask(self, kind, **fields):
        await self.socket.send_json({"type": kind, **fields})

    async def speak(self, *frames):
        for frame in frames:
            await self.socket.send_bytes(np.asarray(frame, "<f4").tobytes())

    async def hears(self, kind, where=lambda event: True):
        """Read up to the next event of a kind."""
        while True:
            event = await self.read()
            assert event is not None, f"the connection ended before {kind}: {self.events[-3:]}"
            if event["type"] == kind and where(event):
                return event

    async def replies(self, count):
        """Read until so many reply frames have come in all."""
        while len(self.frames) < count:
            assert await self.read() is not None, f"ended: {self.events[-3:]}"
        return self.frames

    async def rest(self):
        """Read to the end; returns the last event."""
        while await self.read() is not None:
            pass
        return self.events[-1]

    async def read(self):
        """One message: an event, `{"type": "sound"}`, or None at the end."""
        message = await self.socket.receive()
        if message.type is WSMsgType.BINARY:
            self.frames.append(np.frombuffer(message.data, "<f4"))
            return {"type": "sound"}
        if message.type is not WSMsgType.TEXT:
            return None
        event = json.loads(message.data, parse_constant=_refuse_constant)
        self.events.append(event)
        if event["type"] == "word":
            self.words += event["text"]
        return event

    async def leave(self):
        """Close the connection without a word."""
        await self.socket.close()

    def vanish(self):
        """The network is gone: no closing handshake."""
        self.socket._response.connection.transport.abort()


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON: no browser reads it")
