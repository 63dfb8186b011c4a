"""Who may connect, what a browser is told, downloads, and files: all that is plain HTTP."""

import asyncio
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from aiohttp import WSServerHandshakeError
from fake_talk import voice
from serve_client import Opener, Talker, async_test, serving

from moshi_ttt_mlx import UserError
from moshi_ttt_mlx.serve import app as app_module
from moshi_ttt_mlx.serve import guard as guard_module
from moshi_ttt_mlx.serve.guard import Guard, choose_token, is_loopback

TOKEN = "open sesame"

GET_PATHS = [
    "/",
    "/static/app.js",
    "/api/info",
    "/api/sessions",
    "/api/talk",
    "/api/chat",
    "/api/talks/KEY/audio.wav",
    "/api/talks/KEY/transcript.txt",
    "/nothing",
]


async def raw(client, path, *headers):
    """A request as it stands, with nothing tidied up; returns status, headers, body."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    lines = [f"GET {path} HTTP/1.1", *headers, "Connection: close"]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *rest = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in rest), body


# ---- hosts and origins


@pytest.mark.parametrize("path", GET_PATHS)
@async_test
async def test_a_foreign_name_or_page_gets_nothing(tmp_path, path):
    async with serving(tmp_path) as client:
        own = f"127.0.0.1:{client.port}"
        upgrade = [
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: " + "A" * 22,
        ]
        for headers in (
            [f"Host: evil.example:{client.port}"],
            [],
            [f"Host: {own}", "Host: evil.example"],
            [f"Host: {own}", "Origin: https://evil.example"],
            [f"Host: {own}", "Origin: null"],
            [f"Host: {own}", f"Origin: http://127.0.0.1:{client.port + 1}"],
        ):
            status, _, body = await raw(client, path, *headers, *upgrade)
            # With no Host, or two, newer versions of aiohttp refuse by themselves.
            one = sum(header.startswith("Host:") for header in headers) == 1
            assert status in ((403,) if one else (400, 403)), headers
            assert b"error" in body or status == 400


@async_test
async def test_the_own_page_and_programs_may_connect(tmp_path):
    async with serving(tmp_path) as client:
        for host in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
            name = f"{host}:{client.port}"
            for origin in ([], [f"Origin: http://{name}"], [f"Origin: https://{name}"]):
                status, _, _ = await raw(client, "/api/info", f"Host: {name}", *origin)
                assert status == 200, (host, origin)


@async_test
async def test_a_foreign_page_gets_no_socket(tmp_path):
    async with serving(tmp_path) as client:
        for path in ("/api/talk", "/api/chat"):
            with pytest.raises(WSServerHandshakeError) as caught:
                await client.ws_connect(path, headers={"Origin": "https://evil.example"})
            assert caught.value.status == 403
        own = {"Origin": f"http://127.0.0.1:{client.port}"}
        await client.ws_connect("/api/talk", headers=own)


@pytest.mark.parametrize(
    ("host", "known", "foreign"),
    [
        (
            "localhost",
            ["localhost", "localhost:1", "127.0.0.1:8998", "[::1]:8998", "127.8.8.8"],
            [
                "192.168.1.5",
                "box",
                "box.local",
                "localhost.evil.example",
                "evil.example",
                "",
                "[::1",
            ],
        ),
        (
            "0.0.0.0",
            ["localhost", "192.168.1.5:8998", "[fe80::1]", "box:8998", "Box.local", "127.0.0.1"],
            ["evil.example", "box.evil.example", "192.168.1.5.evil.example", ""],
        ),
        ("talk.home", ["talk.home:8998", "192.168.1.5"], ["home", "evil.example"]),
    ],
)
def test_names_of_a_server(monkeypatch, host, known, foreign):
    monkeypatch.setattr(guard_module.socket, "gethostname", lambda: "Box")
    guard = Guard(host, None)
    assert [name for name in known if not guard.knows_host(name)] == []
    assert [name for name in foreign if guard.knows_host(name)] == []


def test_which_addresses_others_can_reach():
    own = ["localhost", "LocalHost", "127.0.0.1", "127.1.2.3", "::1"]
    others = ["0.0.0.0", "::", "192.168.1.5", "talk.home", "", "localhost.evil.example"]
    assert all(map(is_loopback, own)) and not any(map(is_loopback, others))


# ---- tokens


def test_others_need_a_token():
    assert choose_token("localhost", None) is None
    assert choose_token("localhost", TOKEN) == TOKEN
    made = {choose_token("0.0.0.0", None) for _ in range(5)}
    assert len(made) == 5 and all(len(token) >= 20 for token in made)
    assert choose_token("0.0.0.0", TOKEN) == TOKEN
    for easy in ("", "1234567"):
        with pytest.raises(UserError, match="8 characters"):
            choose_token("localhost", easy)


@pytest.mark.parametrize("token", [None, "", "open sesam", TOKEN + "e", "Open sesame", 5, ["a"]])
@async_test
async def test_without_the_token_there_is_no_talk(tmp_path, token):
    opener = Opener()
    async with serving(tmp_path, opener, token=TOKEN) as client:
        talker = await Talker.connect(client, token=token)
        assert "needs its token" in (await talker.rest())["reason"]
        assert opener.sessions == []
        assert (await (await client.get("/api/info")).json())["needs_token"] is True


@async_test
async def test_the_token_opens_talks_and_downloads(tmp_path):
    async with serving(tmp_path, token=TOKEN, sessions=3) as client:
        talker = await Talker.begin(client, token=TOKEN)
        by_query = await Talker.connect(client, "?token=open%20sesame")
        await by_query.hears("ready")
        for path in ("/api/sessions", f"/api/talks/{talker.ready['key']}/transcript.txt"):
            assert (await client.get(path)).status == 403
            assert (await client.get(path, params={"token": "wrong token"})).status == 403
            assert (await client.get(path, params={"token": TOKEN})).status == 200
            bearer = {"Authorization": f"Bearer {TOKEN}"}
            assert (await client.get(path, headers=bearer)).status == 200
        with pytest.raises(WSServerHandshakeError):
            await client.ws_connect("/api/chat")
        # Kyutai's page has a field of its own for it.
        chat = await client.ws_connect("/api/chat", params={"worker_auth_id": TOKEN})
        assert (await chat.receive_bytes())[0] == 0


@async_test
async def test_a_key_alone_does_not_take_a_talk_up(tmp_path):
    async with serving(tmp_path, token=TOKEN) as client:
        talker = await Talker.begin(client, token=TOKEN)
        thief = await Talker.connect(client, resume=talker.ready["key"])
        assert "needs its token" in (await thief.rest())["reason"]


# ---- what browsers are told


@pytest.mark.parametrize("path", [*GET_PATHS, "/static/no.js"])
@async_test
async def test_every_answer_carries_the_headers(tmp_path, path):
    async with serving(tmp_path) as client:
        status, headers, _ = await raw(client, path, f"Host: localhost:{client.port}")
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert f"connect-src 'self' ws://localhost:{client.port} wss://" in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        if path in ("/nothing", "/static/no.js"):
            assert status == 404


@async_test
async def test_a_refused_request_has_them_too_and_reflects_nothing(tmp_path):
    async with serving(tmp_path) as client:
        for host in ("evil.example", "localhost; script-src *", "localhost:8998 *", "localhost:x"):
            status, headers, _ = await raw(client, "/", f"Host: {host}")
            assert status == 403, host
            assert "evil" not in str(headers) and "*" not in headers["Content-Security-Policy"]


# ---- files


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e%2f%2e%2e%2fsession.py",
        "/static/..\\app.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/./../guard.py",
        "/static/",
        "/static",
        "/../app.py",
        "//etc/passwd",
        "/static/index.html%00.js",
    ],
)
@async_test
async def test_nothing_outside_its_folder_is_served(tmp_path, path):
    async with serving(tmp_path) as client:
        status, _, body = await raw(client, path, f"Host: localhost:{client.port}")
        assert status in (400, 403, 404)
        assert b"import" not in body and b"root:" not in body


@async_test
async def test_a_link_out_of_the_folder_is_not_followed(tmp_path, monkeypatch):
    static = tmp_path / "static"
    static.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (static / "inside.txt").write_text("inside")
    (static / "link.txt").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setattr(app_module, "STATIC", static)
    async with serving(tmp_path / "sessions") as client:
        assert await (await client.get("/static/inside.txt")).text() == "inside"
        assert (await client.get("/static/link.txt")).status in (403, 404)


@async_test
async def test_the_page_and_its_files_are_served(tmp_path):
    async with serving(tmp_path) as client:
        page = await client.get("/")
        assert page.status == 200 and page.content_type == "text/html"
        for file in app_module.STATIC.iterdir():
            assert (await client.get(f"/static/{file.name}")).status == 200


# ---- downloads


@async_test
async def test_words_and_sound_during_a_talk_and_after_it(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        base = f"/api/talks/{talker.ready['key']}"
        await talker.speak(*(voice(0.1 * n) for n in range(5)))
        await talker.replies(5)
        assert await (await client.get(f"{base}/transcript.txt")).text() == "w0 w1 w2 w3 w4\n"
        await talker.ask("end")
        await talker.rest()
        for kind, has in {"json": '"w4"', "srt": "-->", "vtt": "WEBVTT"}.items():
            answer = await client.get(f"{base}/transcript.{kind}")
            assert has in await answer.text() and answer.charset == "utf-8"
            assert answer.headers["Content-Disposition"].startswith("attachment;")
        answer = await client.get(f"{base}/audio.wav")
        assert answer.content_type == "audio/wav"
        sound, rate = soundfile.read(io.BytesIO(await answer.read()), dtype="float32")
        assert rate == 24000 and sound.shape == (5 * 1920, 2)
        moshi, user = sound[::1920].T
        np.testing.assert_allclose(user, np.arange(5) * 0.1, atol=1 / 32768)
        np.testing.assert_allclose(moshi, np.arange(5) * 0.05, atol=1 / 32768)


@async_test
async def test_sound_is_there_while_the_talk_goes_on(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice(), voice())
        await talker.replies(2)
        while True:  # the disk has a thread of its own
            answer = await client.get(f"/api/talks/{talker.ready['key']}/audio.wav")
            sound, _ = soundfile.read(io.BytesIO(await answer.read()))
            if len(sound) == 2 * 1920:
                break


@async_test
async def test_no_key_no_talk_no_such_format(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        key = talker.ready["key"]
        for path in (f"{key[:-1]}/audio.wav", "x/transcript.txt", f"{key}/transcript.exe"):
            answer = await client.get(f"/api/talks/{path}")
            assert answer.status == 404 and "error" in json.loads(await answer.text())


@async_test
async def test_a_recording_is_bounded_and_says_so(tmp_path):
    async with serving(tmp_path, record_minutes=3 * 0.08 / 60) as client:
        talker = await Talker.begin(client)
        await talker.speak(*[voice()] * 5)
        await talker.replies(5)
        await talker.ask("end")
        await talker.rest()
        warnings = [event["message"] for event in talker.events if event["type"] == "warning"]
        assert len(warnings) == 1 and "recording is full" in warnings[0]
        answer = await client.get(f"/api/talks/{talker.ready['key']}/audio.wav")
        assert len(soundfile.read(io.BytesIO(await answer.read()))[0]) == 3 * 1920


@async_test
async def test_no_recording_where_none_is_wanted(tmp_path):
    async with serving(tmp_path, record_minutes=0) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice())
        await talker.replies(1)
        answer = await client.get(f"/api/talks/{talker.ready['key']}/audio.wav")
        assert answer.status == 404 and "no sound is kept" in await answer.text()


@async_test
async def test_only_the_latest_talks_are_kept(tmp_path):
    async with serving(tmp_path, kept_talks=2) as client:
        folder, keys = Path(client.talks()._folder.name), []
        for _ in range(4):
            talker = await Talker.begin(client)
            keys.append(talker.ready["key"])
            await talker.speak(voice())
            await talker.replies(1)
            await talker.ask("end")
            await talker.rest()
        running = await Talker.begin(client)
        found = [(await client.get(f"/api/talks/{key}/audio.wav")).status for key in keys]
        assert found == [404, 404, 200, 200]
        kept = {path.name for path in folder.iterdir()} - {running.ready["key"]}
        assert kept == set(keys[2:])


@async_test
async def test_a_disk_that_cannot_record_is_said_and_the_talk_goes_on(tmp_path):
    async with serving(tmp_path) as client:
        client.talks()._folder.cleanup()
        talker = await Talker.begin(client)
        await talker.speak(voice())
        await talker.replies(1)
        assert "unrecorded" in talker.events[1]["message"]
