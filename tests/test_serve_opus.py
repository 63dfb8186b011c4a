"""`/api/chat` with a client written from Kyutai's description of their protocol."""

import asyncio
import struct

import numpy as np
import pytest
import sphn
from aiohttp import WSMessage, WSMsgType
from fake_talk import voice
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_client import Opener, Talker, async_test, serving

from moshi_ttt_mlx import UserError
from moshi_ttt_mlx.serve.limits import Limits
from moshi_ttt_mlx.serve.opus import ChatWire, start_request

TONE = (0.5 * np.sin(np.arange(24_000) * 2 * np.pi * 440 / 24_000)).astype(np.float32)


class ChatClient:
    """Byte 0 handshake, 1 Ogg/Opus, 2 text, 5 error; others are ignored."""

    def __init__(self, socket):
        self.socket = socket
        self.writer, self.reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
        self.sound, self.text, self.errors = np.empty(0, np.float32), "", []

    @classmethod
    async def connect(cls, client, **query):
        self = cls(await client.ws_connect("/api/chat", params=query))
        self.handshake = await self.socket.receive_bytes()
        return self

    async def speak(self, samples):
        for start in range(0, len(samples), 1920):
            await self.send(1, self.writer.append_pcm(samples[start : start + 1920]))

    async def send(self, kind, payload=b""):
        await self.socket.send_bytes(bytes([kind]) + payload)

    async def read(self):
        """One message; False at the end."""
        message = await self.socket.receive()
        if message.type is not WSMsgType.BINARY:
            return False
        kind, payload = message.data[0], message.data[1:]
        if kind == 1:
            self.sound = np.concatenate([self.sound, self.reader.append_bytes(payload)])
        elif kind == 2:
            self.text += payload.decode()
        elif kind == 5:
            self.errors.append(payload.decode())
        else:
            raise AssertionError(f"a client of theirs does not expect kind {kind}")
        return True

    async def until(self, condition):
        while not condition():
            assert await self.read(), (self.errors, self.text)


@async_test
async def test_sound_and_words_both_ways(tmp_path):
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        chat = await ChatClient.connect(client)
        assert struct.unpack("<BII", chat.handshake) == (0, 0, 0)
        await chat.speak(TONE[: 10 * 1920])
        await chat.until(lambda: len(chat.sound) >= 10 * 1920)
        assert chat.text.startswith(" w0 w1 w2")
        # Opus loses a little each way; the reply is half of what was heard.
        heard = np.concatenate(opener.sessions[0].users)
        assert np.sqrt(np.mean(heard[4800:] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)
        level = np.sqrt(np.mean(chat.sound[4800:] ** 2))
        assert level == pytest.approx(0.25 / np.sqrt(2), rel=0.1)
        peak = np.argmax(np.abs(np.fft.rfft(chat.sound[4800 : 4800 + 12_000])))
        assert peak * 2 == pytest.approx(440, abs=4)


@async_test
async def test_other_kinds_are_ignored(tmp_path):
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        chat = await ChatClient.connect(client)
        for kind in (0, 2, 3, 4, 6, 7, 255):
            await chat.send(kind, b"\x00\x01")
        await chat.socket.send_str("no text frames in their protocol")
        await chat.socket.send_bytes(b"")
        await chat.speak(TONE[:3840])
        await chat.until(lambda: len(chat.sound))
        assert chat.errors == []


@async_test
async def test_their_pages_settings_are_taken(tmp_path):
    opener = Opener()
    async with serving(tmp_path, opener, defaults={"sinks": 4}) as client:
        await ChatClient.connect(
            client, text_temperature="0.7", text_topk="25", audio_temperature="0.9",
            audio_topk="100", audio_seed="42", text_seed="43", pad_mult="0", email="a@b.c",
        )  # fmt: skip
        taken = opener.sessions[0].settings
        assert (taken.text_temp, taken.text_top_k, taken.temp, taken.top_k) == (0.7, 25, 0.9, 100)
        assert (taken.seed, taken.sinks) == (42, 4)
        answer = await client.get("/api/chat", params={"audio_topk": "many"})
        assert answer.status == 400 and "expected numbers" in await answer.text()


def test_a_query_of_nothing_is_a_start_with_nothing():
    assert start_request({}) == {"type": "start", "settings": {}}


@async_test
async def test_impossible_settings_are_an_error_of_theirs(tmp_path):
    async with serving(tmp_path) as client:
        socket = await client.ws_connect("/api/chat", params={"audio_temperature": "nan"})
        message = await socket.receive_bytes()
        assert message[0] == 5 and b"temp: expected a number" in message


@async_test
async def test_waiting_comes_before_the_handshake_and_leaving_ends_the_talk(tmp_path):
    async with serving(tmp_path) as client:
        first = await ChatClient.connect(client)
        second = asyncio.create_task(ChatClient.connect(client))
        done, _ = await asyncio.wait([second], timeout=0.3)
        assert not done
        await first.socket.close()  # no minute to come back: nobody has a key
        chat = await second
        await chat.speak(TONE[:3840])
        await chat.until(lambda: len(chat.sound))


@async_test
async def test_their_talk_is_kept_where_the_server_was_given_one(tmp_path):
    async with serving(tmp_path, usual="monday") as client:
        chat = await ChatClient.connect(client)
        await chat.speak(TONE[: 4 * 1920])
        await chat.until(lambda: len(chat.sound))
        await chat.socket.close()
        while not (tmp_path / "monday.session").exists():
            await asyncio.sleep(0.01)


@async_test
async def test_what_comes_while_waiting_is_not_lost_to_the_decoder(tmp_path):
    async with serving(tmp_path) as client:
        first = await Talker.begin(client)
        socket = await client.ws_connect("/api/chat")
        chat = ChatClient(socket)
        await chat.speak(TONE[:3840])  # with the stream's headers, before the handshake
        await first.ask("end")
        assert (await socket.receive_bytes())[0] == 0
        await chat.speak(TONE[3840:9600])
        await chat.until(lambda: len(chat.sound))
        assert chat.errors == []


@async_test
async def test_sound_that_is_not_opus_is_said(tmp_path):
    async with serving(tmp_path, sessions=2) as client:
        other = await Talker.begin(client)
        chat = await ChatClient.connect(client)
        await chat.send(1, b"RIFF" * 100)
        await chat.until(lambda: chat.errors)
        assert "expected Ogg/Opus" in chat.errors[0]
        await chat.send(1, bytes(20_000))
        await chat.until(lambda: len(chat.errors) > 1)
        assert "up to 16384 bytes" in chat.errors[1]
        await other.speak(voice())
        await other.replies(1)


@async_test
async def test_a_talk_that_fails_is_an_error_of_theirs(tmp_path):
    async with serving(tmp_path, Opener({"fail_at": 0})) as client:
        chat = await ChatClient.connect(client)
        await chat.speak(TONE[:3840])
        while await chat.read():
            pass
        assert "out of memory" in chat.errors[0] and chat.socket.close_code == 1011


class Ogg:
    """Pages of a stream, made by hand (RFC 3533), behind the two that an Opus stream begins with."""

    def __init__(self):
        head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, 24_000, 0, 0)
        tags = b"OpusTags" + struct.pack("<I", 0) + struct.pack("<I", 0)
        self.pages = 0
        self.start = self.page(head, [len(head)]) + self.page(tags, [len(tags)])

    def page(self, body, lacing, goes_on=False):
        """A page; `lacing` are the lengths of its segments, 255 where a packet goes on."""
        flags = goes_on | (2 if self.pages == 0 else 0)
        fields = (b"OggS", 0, flags, self.pages, 1, self.pages, 0, len(lacing))
        self.pages += 1
        page = struct.pack("<4sBBqIIIB", *fields) + bytes(lacing) + body
        return page[:22] + struct.pack("<I", ogg_checksum(page)) + page[26:]


def ogg_checksum(page):
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = value << 1 ^ (0x104C11DB7 if value >> 31 else 0)
    return value


SIX_EMPTY_FRAMES = bytes([0b11111011, 6])
"""An Opus packet (RFC 6716, 3.2.5): 120 ms of 20 ms frames with nothing in them."""


def heard(wire, data):
    return wire.decode(WSMessage(WSMsgType.BINARY, b"\x01" + data, None))


@pytest.mark.parametrize("packets", [1, 20, 41])
def test_a_short_message_of_many_minutes_is_decoded_up_to_a_burst(packets):
    limits, ogg = Limits(), Ogg()
    wire, data = ChatWire(limits), ogg.start
    while True:
        page = ogg.page(SIX_EMPTY_FRAMES * packets, [2] * packets)
        if len(data) + len(page) >= limits.text_bytes:
            break
        data += page
    burst = 24_000 * limits.burst_seconds
    assert (ogg.pages - 3) * packets * 0.12 * 24_000 > burst
    # The slice in which it was too much may have held as much as sphn decodes at once.
    assert burst < len(heard(wire, data)) <= burst + 5 * 24_000


def test_a_message_may_hold_more_than_sphn_decodes_at_once():
    writer = sphn.OpusStreamWriter(24_000)
    sound = np.tile(TONE, 20)
    stream = b"".join(writer.append_pcm(sound[n : n + 1920]) for n in range(0, len(sound), 1920))
    wire = ChatWire(Limits(text_bytes=len(stream) + 1))
    assert len(heard(wire, stream)) == pytest.approx(len(sound), abs=2 * 1920)


def test_a_packet_without_an_end_is_not_kept_for_ever():
    limits, ogg = Limits(), Ogg()
    wire = ChatWire(limits)
    heard(wire, ogg.start)
    sent = 0
    with pytest.raises(UserError, match="Ogg/Opus sound: none in"):
        while sent < 2 * limits.message_bytes:
            page = ogg.page(bytes(60 * 255), [255] * 60, goes_on=ogg.pages > 2)
            assert not len(heard(wire, page))
            sent += len(page)
    with pytest.raises(UserError, match="none in"):
        heard(wire, page)


@given(at=st.integers(0, 2000), junk=st.binary(min_size=1, max_size=60), whole=st.booleans())
@settings(max_examples=60)
def test_broken_pages_raise_nothing_else(at, junk, whole):
    """Whatever comes, the answer is samples of a bounded number or a `UserError`."""
    wire, writer = ChatWire(Limits()), sphn.OpusStreamWriter(24_000)
    stream = b"".join(writer.append_pcm(TONE[n : n + 1920]) for n in range(0, 9600, 1920))
    at %= len(stream)
    broken = stream[:at] + junk + stream[at + (0 if whole else len(junk)) :]
    try:
        samples = wire.decode(WSMessage(WSMsgType.BINARY, b"\x01" + broken, None))
    except UserError:
        return
    assert np.isfinite(samples).all() and len(samples) <= 2 * 9600
