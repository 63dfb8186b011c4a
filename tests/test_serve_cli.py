"""`moshi-ttt-mlx serve` as a user starts and stops it."""

import asyncio
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager

import aiohttp
import pytest
from fake_talk import voice
from serve_client import Talker, async_test
from tiny import SMALL

from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.cli.common import DEMO_NOTE
from moshi_ttt_mlx.cli.serve import _own_address
from moshi_ttt_mlx.session_store import SessionStore


@asynccontextmanager
async def started(*flags):
    """A server process and the address that it prints."""
    command = [sys.executable, "-m", "moshi_ttt_mlx", "serve", "--model", SMALL, *flags]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        line = (await process.stdout.readline()).decode()
        found = re.search(r"talk at (\S+)", line)
        assert found, line + (await process.stderr.read()).decode()
        yield process, found[1]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextmanager
def taken_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def free_port():
    with taken_port() as port:
        return port


@async_test
async def test_start_talk_stop(tmp_path):
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--sessions-dir", str(tmp_path)]
    async with (
        started(*flags, "--seed", "3", "--context", "20", "--max-sessions", "2") as (server, url),
        aiohttp.ClientSession(url) as client,
    ):
        assert url == f"http://127.0.0.1:{port}/"
        info = await (await client.get("/api/info")).json()
        assert (info["model"], info["context"], info["needs_token"]) == (SMALL, 20, False)
        assert (info["defaults"]["seed"], info["limits"]["sessions"]) == (3, 2)
        named, nameless = await Talker.begin(client), await Talker.begin(client)
        assert named.ready["settings"]["seed"] == 3
        await named.speak(*[voice(0.1)] * 4)
        await named.replies(3)
        await named.ask("save", session="monday")
        await named.hears("saved")
        await named.speak(*[voice(0.1)] * 4)
        await named.replies(7)
        server.send_signal(signal.SIGINT)
        assert (await named.rest())["reason"] == "the server was stopped"
        assert "so it is gone" in (await nameless.rest())["reason"]
        assert await server.wait() == 0
        assert await server.stderr.read() == b""
    assert SessionStore(tmp_path).info("monday").seconds == pytest.approx(8 * 0.08)


@async_test
async def test_the_demo_says_what_it_is(tmp_path):
    flags = ["--model", "demo", "--port", str(free_port()), "--sessions-dir", str(tmp_path)]
    async with started(*flags) as (server, _):
        server.send_signal(signal.SIGINT)
        assert DEMO_NOTE in " ".join((await server.stderr.read()).decode().split())
        assert await server.wait() == 0


@async_test
async def test_a_talk_goes_on_after_a_restart(tmp_path):
    flags = ["--host", "127.0.0.1", "--sessions-dir", str(tmp_path), "--session", "monday"]
    ages = []
    for _ in range(2):
        async with (
            started(*flags, "--port", str(free_port())) as (server, url),
            aiohttp.ClientSession(url) as client,
        ):
            talker = await Talker.begin(client)
            ages.append(talker.ready["age"])
            await talker.speak(*[voice(0.1)] * 4)
            await talker.replies(3)
            server.send_signal(signal.SIGINT)
            await talker.rest()
            assert await server.wait() == 0
    assert ages == [0, pytest.approx(4 * 0.08)]


def test_a_talk_that_cannot_be_resumed_stops_the_start(tmp_path, capsys):
    (tmp_path / "monday.session").write_text("junk")
    flags = ["--model", SMALL, "--sessions-dir", str(tmp_path), "--session", "monday"]
    assert main(["serve", *flags]) == 2
    assert "the talk 'monday' cannot be resumed" in capsys.readouterr().err


def test_a_machine_without_a_network_has_no_address_in_it(monkeypatch):
    def connect(self, address):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert _own_address() is None


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
@async_test
async def test_other_devices_need_the_token_and_get_tls(tmp_path):
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout key.pem -out cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*make.split(), *names], cwd=tmp_path, check=True, capture_output=True)
    trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    flags = ["--host", "0.0.0.0", "--port", str(free_port()), "--ssl", str(tmp_path)]
    async with started(*flags) as (server, url):
        page, _, token = url.partition("#token=")
        assert page.startswith("https://localhost:") and len(token) >= 20
        if own := _own_address():
            line = (await server.stdout.readline()).decode()
            assert line == f"on other devices: {url.replace('localhost', own)}\n"
        connector = aiohttp.TCPConnector(ssl=trust)
        async with aiohttp.ClientSession(page, connector=connector) as client:
            assert (await client.get("/api/sessions")).status == 403
            stranger = await Talker.connect(client)
            assert "needs its token" in (await stranger.rest())["reason"]
            talker = await Talker.begin(client, token=token)
            await talker.speak(voice(0.1), voice(0.1))
            await talker.replies(1)
        async with aiohttp.ClientSession(page) as client:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await client.get("/api/info")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0


def test_a_port_that_is_taken_is_one_line(capsys):
    with taken_port() as port:
        flags = ["--model", SMALL, "--host", "127.0.0.1", "--port", str(port), "--no-browser"]
        assert main(["serve", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot listen on 127.0.0.1 port {port}" in error and "--port" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-sessions", "0"], "--max-sessions is 1 or more"),
        (["--record-minutes", "-1"], "--record-minutes 0 or more"),
        (["--port", "0"], "--port is 1..65535"),
        (["--port", "70000"], "--port is 1..65535"),
        (["--token", "short"], "8 characters"),
        (["--ssl-cert", "cert.pem"], "go together"),
        (["--ssl", "no-such-folder"], "cannot use no-such-folder/cert.pem"),
        (["--model", SMALL, "--context", "101"], "context must be 1..100"),
        (["--session", "monday", "--max-sessions", "2"], "goes with --max-sessions 1"),
        (["--session", "./monday"], "expected a session's name"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, said):
    assert main(["serve", *flags]) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1], error


def test_without_aiohttp_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main(["serve", "--model", SMALL]) == 2
    assert "pip install 'moshi-ttt-mlx[web]'" in capsys.readouterr().err
