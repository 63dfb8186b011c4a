"""The server with real (tiny) models: what comes over the wire is what a session says, bit for bit."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from mimi_checkpoints import sound
from open_memory import save_open_memory
from serve_client import Talker, async_test, serving

from moshi_ttt_mlx import Session, load
from moshi_ttt_mlx.audio import WavWriter
from moshi_ttt_mlx.serve.info import describe
from moshi_ttt_mlx.serve.limits import Limits
from moshi_ttt_mlx.user_words import Dialogue

DOCS = Path(__file__).parents[1] / "docs" / "server.md"
PLAIN_STT = {"audio_delay_seconds": 0.16, "audio_silence_prefix_seconds": 0.0}


class Models:
    """Opens real sessions; loads on the first one, since arrays belong to the thread that made them."""

    def __init__(self, *names, adapter_path=None):
        self.names, self.adapter_path, self.loaded = names, adapter_path, None

    def __call__(self, settings, path):
        if self.loaded is None:
            first, *others = map(str, self.names)
            loaded = [load(first, adapter_path=self.adapter_path), *map(load, others)]
            self.loaded = loaded
        kind = Session if len(self.loaded) == 1 else Dialogue
        return kind.load(path, *self.loaded) if path else kind(*self.loaded, **settings)

    async def direct(self, client, frames, **settings):
        """What a session says when nothing is in between; on the server's own thread."""

        def talk():
            session = self(settings, None)
            steps = [session.step(frame) for frame in frames]
            pcm = [step.pcm for step in steps if step.pcm is not None]
            return pcm, "".join(step.text for step in steps), session.transcript

        return await asyncio.wrap_future(client.talks()._thread.call(talk))


def frames(count, seed=0):
    return np.asarray(sound(count, seed), np.float32).reshape(count, 1920)


async def in_pieces(talker, pcm, behind=1):
    """Speak no faster than the model hears.

    Args:
        behind: replies that are missing at the end: a talk's first frame has none, since these models
            emit their last codebook a frame late.
    """
    before = len(talker.frames)
    for start in range(0, len(pcm), 8):
        await talker.speak(*pcm[start : start + 8])
        await talker.replies(before + min(start + 8, len(pcm)) - behind)


@async_test
async def test_two_talks_at_once_are_what_each_would_be_alone(tmp_path):
    models = Models(tiny.SMALL)
    async with serving(tmp_path, models, sessions=2) as client:
        talkers = [await Talker.begin(client, settings={"seed": seed}) for seed in (1, 2)]
        pcm = [frames(24, seed) for seed in (1, 2)]
        await asyncio.gather(
            *(in_pieces(talker, own) for talker, own in zip(talkers, pcm, strict=True))
        )
        for talker, own, seed in zip(talkers, pcm, (1, 2), strict=True):
            want, text, words = await models.direct(client, own, seed=seed)
            np.testing.assert_array_equal(talker.frames, want)
            await talker.ask("end")
            await talker.rest()
            assert talker.words == text and text
            answer = await client.get(f"/api/talks/{talker.ready['key']}/transcript.json")
            assert await answer.text() == words.to_json()


@async_test
async def test_a_saved_talk_goes_on_as_if_never_interrupted(tmp_path):
    models, pcm = Models(tiny.SMALL), frames(24)
    async with serving(tmp_path, models) as client:
        talker = await Talker.begin(client, settings={"seed": 7, "context": 10})
        await in_pieces(talker, pcm[:12])
        await talker.ask("save", session="monday")
        await talker.hears("saved")
        await talker.ask("end")
        await talker.rest()
        listed = await (await client.get("/api/sessions")).json()
        assert [(entry["session"], entry["age"]) for entry in listed] == [("monday", 0.96)]
        again = await Talker.begin(client, session="monday")
        assert (again.ready["session"], again.ready["age"]) == ("monday", 0.96)
        assert again.ready["resumed"] and again.ready["settings"]["context"] == 10
        await in_pieces(again, pcm[12:], behind=0)
        want, text, _ = await models.direct(client, pcm, seed=7, context=10)
        np.testing.assert_array_equal([*talker.frames, *again.frames], want)
        await again.ask("end")
        await again.rest()
        assert talker.words + again.words == text
        # Ended, it was saved once more under its name.
        third = await Talker.begin(client, session="monday")
        assert third.ready["age"] == 1.92


@async_test
async def test_every_start_goes_on_with_the_talk_that_the_server_was_given(tmp_path):
    models, pcm = Models(tiny.SMALL), frames(24)
    async with serving(tmp_path, models, usual="monday") as client:
        assert (await (await client.get("/api/info")).json())["session"] == "monday"
        talker = await Talker.begin(client, settings={"seed": 7})
        assert (talker.ready["session"], talker.ready["resumed"]) == ("monday", False)
        await in_pieces(talker, pcm[:12])
        await talker.ask("end")
        await talker.rest()
        again = await Talker.begin(client, settings={"seed": 9})
        assert again.ready["resumed"] and again.ready["age"] == 0.96
        assert again.ready["settings"]["seed"] == 7
        await in_pieces(again, pcm[12:], behind=0)
        want, _, _ = await models.direct(client, pcm, seed=7)
        np.testing.assert_array_equal([*talker.frames, *again.frames], want)
        await again.ask("end")
        await again.rest()
        file = tmp_path / "monday.session"
        file.write_bytes(file.read_bytes()[:-10])
        refused = await Talker.connect(client)
        assert "'monday' cannot be resumed" in (await refused.rest())["reason"]
        assert file.exists()


@async_test
async def test_a_talk_that_goes_on_is_neither_taken_up_nor_replaced_by_another(tmp_path):
    async with serving(tmp_path, Models(tiny.SMALL), sessions=3) as client:
        talker, other = await Talker.begin(client), await Talker.begin(client)
        await talker.ask("save", session="monday")
        await talker.hears("saved")
        second = await Talker.connect(client, session="monday")
        assert "is going on already" in (await second.rest())["reason"]
        await other.ask("save", session="monday", replace=True)
        assert "is going on elsewhere" in (await other.hears("error"))["message"]
        await talker.ask("end")
        await talker.rest()
        pair = [await Talker.connect(client, session="monday") for _ in range(2)]
        firsts = [(await one.read())["type"] for one in pair]
        assert sorted(firsts) == ["ended", "ready"]


@async_test
async def test_a_dropped_connection_loses_no_step_of_the_talk(tmp_path):
    models, pcm = Models(tiny.SMALL), frames(16)
    async with serving(tmp_path, models) as client:
        talker = await Talker.begin(client, settings={"seed": 5})
        await in_pieces(talker, pcm[:8])
        talker.vanish()
        again = await Talker.begin(client, resume=talker.ready["key"])
        await in_pieces(again, pcm[8:], behind=0)
        want, _, _ = await models.direct(client, pcm, seed=5)
        np.testing.assert_array_equal([*talker.frames, *again.frames], want)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"context": 101}, "context must be 1..100"),
        ({"context": 0}, "context must be 1..100"),
        ({"sinks": 100}, "sinks must be"),
        ({"memory": "full"}, "memory must be one of"),
        ({"conditions": {"mood": "good"}}, "no condition 'mood'"),
    ],
)
@async_test
async def test_what_the_model_cannot_follow_is_refused(tmp_path, settings, reason):
    async with serving(tmp_path, Models(tiny.SMALL)) as client:
        talker = await Talker.connect(client, settings=settings)
        assert reason in (await talker.rest())["reason"]


@async_test
async def test_files_that_cannot_be_resumed_are_listed_and_refused(tmp_path):
    models = Models(tiny.SMALL)
    async with serving(tmp_path, models) as client:
        talker = await Talker.begin(client)
        for name in ("monday", "cut"):
            await talker.ask("save", session=name)
            await talker.hears("saved")
        await talker.ask("end")
        await talker.rest()
        whole = (tmp_path / "monday.session").read_bytes()
        (tmp_path / "cut.session").write_bytes(whole[:-10])
        (tmp_path / "junk.session").write_bytes(b"junk")
        (tmp_path / "notes.txt").write_text("not a talk")
        outside = tmp_path.parent / f"{tmp_path.name}.session"
        outside.write_bytes(whole)
        (tmp_path / "link.session").symlink_to(outside)
        listed = await (await client.get("/api/sessions")).json()
        # The server of this test says that its model is another one.
        assert {entry["session"]: entry["fits"] for entry in listed} == dict.fromkeys(
            ("monday", "cut", "junk", "link"), False
        )
        for name in ("cut", "junk", "link", "notes", f"../{tmp_path.name}"):
            talker = await Talker.connect(client, session=name)
            assert (await talker.rest())["type"] == "ended", name
        await Talker.begin(client, session="monday")


@async_test
async def test_a_talk_of_the_served_model_fits(tmp_path):
    models = Models(tiny.SMALL)
    async with serving(tmp_path, models, fits=load(tiny.SMALL).fingerprint) as client:
        talker = await Talker.begin(client)
        await talker.ask("save", session="monday")
        await talker.hears("saved")
        [entry] = await (await client.get("/api/sessions")).json()
        assert entry["fits"] is True and entry["model"] == tiny.SMALL


@async_test
async def test_the_memory_shows_in_the_meter_and_can_be_frozen(tmp_path):
    models, pcm = (
        Models(tiny.SMALL, adapter_path=save_open_memory(tmp_path / "adapter")),
        frames(48),
    )
    async with serving(tmp_path / "sessions", models) as client:
        talker = await Talker.begin(client)
        await in_pieces(talker, pcm[:16])
        # A meter may have waited for long: the one that has seen all frames was made after the look.
        meter = await talker.hears("meter", lambda meter: meter["age"] == 16 * 0.08)
        memory = meter["memory"]
        assert (memory["mode"], memory["ok"], memory["layers"]) == ("on", True, 2)
        assert memory["tokens"] == 13 and memory["updates"] == 3
        assert memory["gate"] > 0 and memory["drift"] > 0 and memory["step"] > 0
        await talker.ask("memory", mode="off")
        assert "on or frozen" in (await talker.hears("error"))["message"]
        await talker.ask("memory", mode="frozen")
        await talker.hears("memory")
        await in_pieces(talker, pcm[16:], behind=0)
        meter = await talker.hears("meter", lambda meter: meter["age"] == 48 * 0.08)
        memory = meter["memory"]
        assert (memory["mode"], memory["tokens"], memory["updates"]) == ("frozen", 16, 4)


@async_test
async def test_a_memory_that_is_not_finite_is_no_number_on_the_wire(tmp_path):
    models = Models(tiny.SMALL)
    async with serving(tmp_path, models) as client:
        talker = await Talker.begin(client)
        talk = client.talks().find(talker.ready["key"])
        session = talk.session
        session.model.memory = "an adapter"
        layer = {
            "tokens": 1,
            "updates": 0,
            "step": float("nan"),
            "drift": float("inf"),
            "gate": 0.5,
        }
        session.memory_report = lambda: {3: layer}
        await talker.speak(*frames(2))
        meter = await talker.hears("meter", lambda meter: meter["memory"] is not None)
        memory = meter["memory"]
        assert (memory["step"], memory["drift"], memory["gate"]) == (None, None, 0.5)


@async_test
async def test_both_sides_are_written_with_a_model_for_the_users_words(tmp_path):
    moshi = tiny.tiny_moshi(tmp_path / "moshi")
    stt = tiny.tiny_stt(tmp_path / "stt", stt_config=PLAIN_STT)
    models, pcm = Models(moshi, stt), frames(16)
    async with serving(tmp_path / "sessions", models) as client:
        talker = await Talker.begin(client, settings={"seed": 3})
        await in_pieces(talker, pcm)
        await talker.ask("end")
        await talker.rest()

        def direct():
            session = models({"seed": 3}, None)
            steps = [session.step(frame) for frame in pcm]
            session.finish()
            return "".join(step.user.text for step in steps), session.transcript

        text, words = await asyncio.wrap_future(client.talks()._thread.call(direct))
        said = [event for event in talker.events if event["type"] == "word"]
        users = [event for event in said if event["speaker"] == "user"]
        assert "".join(event["text"] for event in users) == text and text
        assert {event["speaker"] for event in said} == {"moshi", "user"}
        # Its last words came after the end, in the file only.
        answer = await client.get(f"/api/talks/{talker.ready['key']}/transcript.json")
        assert await answer.text() == words.to_json()
        first = next(word for word in words.words if word.speaker == "user")
        assert users[0]["start"] == first.start


@async_test
async def test_a_speech_to_text_model_alone_writes_and_says_nothing(tmp_path):
    stt = tiny.tiny_stt(
        tmp_path / "stt", stt_config=PLAIN_STT | {"audio_silence_prefix_seconds": 0.24}
    )
    async with serving(tmp_path / "sessions", Models(stt)) as client:
        talker = await Talker.begin(client)
        await talker.speak(*frames(10))
        # Three frames of silence come before the ten.
        await talker.hears("meter", lambda meter: meter["age"] == pytest.approx(13 * 0.08))
        await talker.ask("end")
        await talker.rest()
        words = [event for event in talker.events if event["type"] == "word"]
        assert {event["speaker"] for event in words} == {"user"} and talker.frames == []
        answer = await client.get(f"/api/talks/{talker.ready['key']}/transcript.json")
        written = json.loads(await answer.text())["words"]
        assert words[0]["start"] == written[0]["start"]
        assert words[-1]["end"] < written[-1]["end"]  # the last ones came after the end


@async_test
async def test_the_documented_client_works(tmp_path, capsys):
    code = DOCS.read_text().split("```python\n")[1].split("```")[0]
    names = {"__name__": "documented"}
    exec(code, names)
    with WavWriter(tmp_path / "hello.wav") as wav:
        wav.write(frames(6).reshape(1, -1))
    models = Models(tiny.SMALL)
    async with serving(tmp_path, models) as client:
        await names["talk"](tmp_path / "hello.wav", str(client.make_url("/")))
        said = capsys.readouterr()
        assert "ended by the client" in said.err and "error" not in said.err
        assert said.out and models.loaded


def test_what_a_model_is_said_to_be():
    model = load(tiny.SMALL)
    settings = {"temp": None, "text_temp": 0.5, "top_k": 0, "text_top_k": 10, "context": None}
    info = describe(model, None, settings, Limits(sessions=3))
    assert (info["model"], info["context"], info["max_context"]) == (tiny.SMALL, 100, 100)
    assert info["memory"] is None and info["speaks"] is True and info["user_stt"] is None
    shown = info["defaults"]
    assert (shown["temp"], shown["text_temp"], shown["text_top_k"]) == (0.8, 0.5, 10)
    assert shown["top_k"] == model.lm.cfg.audio_vocab_size - 1 and shown["context"] == 100
    assert info["limits"]["sessions"] == 3
    json.dumps(info, allow_nan=False)


def test_the_documented_info_is_the_info():
    example = json.loads(DOCS.read_text().split("```json\n")[1].split("```")[0])
    settings = dict.fromkeys(example["defaults"])
    info = describe(load(tiny.SMALL), None, settings, Limits())
    info |= {"session": None, "needs_token": False}
    assert info.keys() == example.keys()
    assert info["limits"] == example["limits"]
    assert info["defaults"].keys() == example["defaults"].keys()
