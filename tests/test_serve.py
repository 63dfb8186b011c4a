"""The server's own protocol, `/api/talk`, over a real socket, with sessions that need no model."""

import asyncio
import gc
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_talk import SILENCE, voice
from serve_client import PATIENCE, Opener, ServedSession, Talker, async_test, serving

from moshi_ttt_mlx import UserError
from moshi_ttt_mlx.serve import talk as talk_module
from moshi_ttt_mlx.serve.limits import Limits


def gated(permits=0):
    """Arguments of a session whose steps wait for a permit each."""
    return {"gate": threading.Semaphore(permits)}


# ---- sound and words


@async_test
async def test_sound_of_any_length_comes_back_as_frames(tmp_path):
    sound = np.linspace(-0.9, 0.9, 5 * 1920 + 700, dtype=np.float32)
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.speak(sound[:1], sound[1:3000], sound[3000:3000], sound[3000:])
        replies = await talker.replies(5)
        assert [len(reply) for reply in replies] == [1920] * 5
        np.testing.assert_array_equal(np.concatenate(replies), sound[: 5 * 1920] / 2)
        # The 700 samples wait for the rest of their frame.
        await talker.speak(np.full(1220, 0.25))
        last = (await talker.replies(6))[-1]
        np.testing.assert_array_equal(last[:700], sound[-700:] / 2)
        np.testing.assert_array_equal(last[700:], np.full(1220, 0.125, np.float32))


@async_test
async def test_words_have_speakers_and_times(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice(), voice(), voice())
        await talker.hears("word", lambda word: word["text"] == " w2")
        words = [event for event in talker.events if event["type"] == "word"]
        assert words[1] == {
            "type": "word", "text": " w1", "speaker": "moshi", "start": 0.08, "end": 0.16,
        }  # fmt: skip
        assert talker.words == " w0 w1 w2"


@async_test
async def test_an_stt_model_hears_its_silence_first_and_writes_the_users_words(tmp_path):
    opener = Opener({"speaks": False, "prefix": 0.24})
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice())
        word = await talker.hears("word", lambda word: word["text"] == " w3")
        # Three frames of silence came before the first sound, and their time does not count.
        assert (word["speaker"], word["start"]) == ("user", 0.0)
        assert [frame.any() for frame in opener.sessions[0].users] == [False] * 3 + [True]
        assert talker.frames == []


@async_test
async def test_sound_that_is_no_sound_becomes_silence(tmp_path):
    bad = voice(0.5)
    bad[:4] = [np.nan, np.inf, -np.inf, 1e30]
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.speak(bad)
        await talker.replies(1)
        heard = opener.sessions[0].users[0]
        np.testing.assert_array_equal(heard[:4], [0, 0, 0, 1])
        meter = await talker.hears("meter", lambda meter: meter["age"] > 0)
        assert meter["levels"]["user"] == pytest.approx(-6.0, abs=0.1)


@async_test
async def test_the_meter_tells_where_the_talk_stands(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client, settings={"context": 30})
        await talker.speak(voice(0.5), voice(0.25), voice(0.25))
        await talker.replies(3)
        meter = await talker.hears("meter", lambda meter: meter["age"] == 0.24)
        assert meter.pop("frame_ms") >= 0
        assert meter == {
            "type": "meter",
            "age": 0.24,
            "lag_ms": 0,
            "dropped": 0,
            "skipped": 0,
            "window_fill": 0.1,
            "levels": {"user": -12.0, "moshi": -18.1},
            "paused": False,
            "memory": None,
        }


@async_test
async def test_paused_nothing_is_heard(tmp_path):
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice(0.1), voice(0.9)[:100])
        await talker.ask("pause")
        await talker.hears("paused", lambda event: event["paused"])
        await talker.speak(voice(0.9), voice(0.9))
        await talker.ask("resume")
        await talker.hears("paused", lambda event: not event["paused"])
        await talker.speak(voice(0.2))
        await talker.replies(2)
        # Not even the beginning of a frame from before the pause.
        assert [frame.max() for frame in opener.sessions[0].users] == pytest.approx([0.1, 0.2])


@async_test
async def test_a_slow_model_loses_the_oldest_frames_and_says_so(tmp_path):
    fake = gated()
    opener = Opener(fake)
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice(0.01))
        session = opener.sessions[0]
        await asyncio.to_thread(session.stepping.wait)  # the first frame is with the model
        await talker.speak(*(voice(0.01 * n) for n in range(2, 22)))
        meter = await talker.hears("meter", lambda meter: meter["dropped"] == 8)
        assert meter["lag_ms"] == 12 * 80
        fake["gate"].release(13)
        await talker.replies(13)
        kept = [round(float(frame[0]), 2) for frame in session.users]
        assert kept == [0.01, *(round(0.01 * n, 2) for n in range(10, 22))]


def fake_time(monkeypatch, per_frame):
    """Every look at the clock is a second later; a frame takes `per_frame`."""
    seconds, steps = iter(range(10_000)), iter(np.arange(10_000) * per_frame)
    clock = SimpleNamespace(
        monotonic=lambda: next(seconds), perf_counter=lambda: next(steps), time=lambda: 0.0
    )
    monkeypatch.setattr(talk_module, "time", clock)


@async_test
async def test_exact_silence_is_said_once(tmp_path, monkeypatch):
    fake_time(monkeypatch, per_frame=0.01)
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        for n in range(20):
            await talker.speak(SILENCE)
            await talker.replies(n + 1)
        await talker.ask("end")
        await talker.rest()
        warnings = [event["message"] for event in talker.events if event["type"] == "warning"]
        assert len(warnings) == 1 and "exact silence" in warnings[0]


@pytest.mark.parametrize(
    ("per_frame", "said"), [(0.2, "needs 200 ms a frame"), (0.02, "takes 20 of 80 ms: other talks")]
)
@async_test
async def test_lasting_lateness_is_said_once_with_its_reason(
    tmp_path, monkeypatch, per_frame, said
):
    fake_time(monkeypatch, per_frame)
    fake = gated()
    opener = Opener(fake)
    async with serving(tmp_path, opener, heard_frames=40) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice())
        await asyncio.to_thread(opener.sessions[0].stepping.wait)
        await talker.speak(*[voice()] * 40)
        await talker.hears("meter", lambda meter: meter["lag_ms"] == 40 * 80)
        fake["gate"].release(41)
        await talker.replies(41)
        await talker.ask("end")
        await talker.rest()
        warnings = [event["message"] for event in talker.events if event["type"] == "warning"]
        assert len(warnings) == 1 and said in warnings[0]


@async_test
async def test_a_broken_memory_is_said_once(tmp_path):
    async with serving(tmp_path, Opener({"breaks_at": 1})) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice(), voice(), voice())
        await talker.replies(3)
        await talker.ask("end")
        await talker.rest()
        warnings = [event["message"] for event in talker.events if event["type"] == "warning"]
        assert len(warnings) == 1 and "no longer finite" in warnings[0]


# ---- beginning


@async_test
async def test_settings_go_to_the_session_over_the_servers_own(tmp_path):
    opener = Opener()
    async with serving(tmp_path, opener, defaults={"seed": 1, "temp": 0.8}) as client:
        asked = {"temp": 0, "top_k": 5, "text_temp": None, "conditions": {"description": "good"}}
        talker = await Talker.begin(client, settings=asked)
        settings = opener.sessions[0].settings
        assert (settings.seed, settings.temp, settings.top_k) == (1, 0.0, 5)
        assert settings.conditions == {"description": "good"}
        assert talker.ready["settings"]["top_k"] == 5
        assert (talker.ready["age"], talker.ready["resumed"]) == (0.0, False)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ({"settings": {"steps": 4}}, "unknown 'steps'"),
        ({"settings": {"temp": "hot"}}, "temp: expected a number"),
        ({"settings": {"temp": -1}}, "temp: expected a number"),
        ({"settings": {"seed": 1.5}}, "seed: expected a whole number"),
        ({"settings": {"seed": True}}, "seed: expected a whole number"),
        ({"settings": {"seed": 10**400}}, "seed: expected a whole number"),
        ({"settings": {"memory": 1}}, "memory: expected"),
        ({"settings": {"conditions": {"a": 1}}}, "conditions: expected"),
        ({"settings": [1]}, "settings: expected an object"),
        ({"session": "monday"}, "no session 'monday'"),
        ({"session": "../x"}, "expected a session's name"),
        ({"session": 3}, "expected a session's name"),
        ({"session": "monday", "settings": {"temp": 1}}, "keeps its settings"),
        ({"resume": "guessed"}, "no talk with this key"),
        ({"resume": 5}, "no talk with this key"),
    ],
)
@async_test
async def test_a_start_that_cannot_be_is_refused_with_its_reason(tmp_path, start, reason):
    async with serving(tmp_path) as client:
        talker = await Talker.connect(client, **start)
        last = await talker.rest()
        assert last["type"] == "ended" and reason in last["reason"]
        assert talker.socket.close_code == 1008
        await Talker.begin(client)  # the place is free


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("context must be 1..100"), "context must be"),
        (RuntimeError("no room"), "no room"),
    ],
)
@async_test
async def test_a_session_that_does_not_open_gives_its_place_back(tmp_path, error, said):
    async with serving(tmp_path, Opener(error)) as client:
        talker = await Talker.connect(client)
        assert said in (await talker.rest())["reason"]
        await Talker.begin(client)


@async_test
async def test_who_does_not_say_start_is_disconnected(tmp_path):
    async with serving(tmp_path, start_seconds=0.05) as client:
        talker = await Talker.connect(client, start=None)
        await talker.speak(voice())
        assert (await talker.rest())["reason"] == 'no "start" came'


@async_test
async def test_bad_messages_are_answered_and_the_talk_goes_on(tmp_path):
    bad = {
        "nonsense": "does not parse",
        "[1, 2]": 'with a "type"',
        '{"type": 3}': 'with a "type"',
        "[" * 10_000: "does not parse",
        '{"type": "sing"}': "unknown request 'sing'",
        '{"type": "start"}': "begun a talk already",
        '{"type": "memory", "mode": "off"}': "no such mode",
        '{"type": "save"}': "expected a session's name",
        '{"type": "save", "session": "a/b"}': "expected a session's name",
        " " * 20_000: "of up to 16384 characters",
        b"123": "got 3 bytes",
    }
    async with serving(tmp_path, requests=100) as client:
        talker = await Talker.connect(client, start=None)
        await talker.ask("pause")
        assert "before the talk has begun" in (await talker.hears("error"))["message"]
        await talker.ask("start")
        await talker.hears("ready")
        for message, answer in bad.items():
            send = talker.socket.send_str if isinstance(message, str) else talker.socket.send_bytes
            await send(message)
            assert answer in (await talker.hears("error"))["message"]
        await talker.speak(voice())
        await talker.replies(1)


# ---- places


@async_test
async def test_the_next_one_waits_and_comes_in_when_a_place_is_free(tmp_path):
    async with serving(tmp_path, sessions=2) as client:
        first, second = await Talker.begin(client), await Talker.begin(client)
        third, fourth = await Talker.connect(client), None
        waits = await third.hears("wait")
        assert waits["position"] == 1 and "all places are taken" in waits["message"]
        fourth = await Talker.connect(client)
        assert (await fourth.hears("wait"))["position"] == 2
        await third.speak(voice())  # ignored
        await first.ask("end")
        await third.hears("ready")
        assert (await fourth.hears("wait"))["position"] == 1
        await third.speak(voice(0.5))
        assert (await third.replies(1))[0][0] == 0.25
        await second.ask("end")
        await fourth.hears("ready")


@async_test
async def test_who_leaves_the_line_lets_the_others_move_up(tmp_path):
    async with serving(tmp_path) as client:
        first = await Talker.begin(client)
        line = []
        for position in (1, 2, 3):
            line.append(await Talker.connect(client))
            assert (await line[-1].hears("wait"))["position"] == position
        await line[0].leave()
        assert (await line[2].hears("wait"))["position"] == 2
        await line[1].ask("end")
        assert (await line[1].rest())["reason"] == "ended by the client"
        assert (await line[2].hears("wait"))["position"] == 1
        await first.ask("end")
        await line[2].hears("ready")


@async_test
async def test_a_long_line_is_told_to_come_back(tmp_path):
    async with serving(tmp_path, waiting=1) as client:
        await Talker.begin(client)
        waiting = await Talker.connect(client)
        await waiting.hears("wait")
        late = await Talker.connect(client)
        assert "come back later" in (await late.rest())["reason"]


@async_test
async def test_talks_share_one_thread_and_take_turns(tmp_path):
    opener = Opener(gated(), gated())
    async with serving(tmp_path, opener, sessions=2) as client:
        talkers = [await Talker.begin(client), await Talker.begin(client)]
        a, b = opener.sessions
        await talkers[0].speak(voice(), voice(), voice())
        await asyncio.to_thread(a.stepping.wait)
        await talkers[1].speak(voice(), voice(), voice())
        await talkers[1].hears("meter", lambda meter: meter["lag_ms"] == 240)
        for session in (a, b, a, b, a, b):
            # Whoever's turn it is blocks the thread until it gets its permit.
            before = session.frame
            session.gate.release()
            while session.frame == before:
                await asyncio.sleep(0.001)
        for talker in talkers:
            await talker.replies(3)
        assert a.threads == b.threads and len(a.threads) == 1


# ---- a connection that drops


@pytest.mark.parametrize("how", ["close", "vanish"])
@async_test
async def test_a_dropped_connection_is_taken_up_again(tmp_path, how):
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.speak(voice(), voice(), voice(0.1)[:500])
        await talker.replies(2)
        if how == "close":
            await talker.leave()
        else:
            talker.vanish()
        again = await Talker.begin(client, resume=talker.ready["key"])
        assert again.ready | {"settings": 0} == {
            "type": "ready", "key": talker.ready["key"], "model": "fake", "settings": 0,
            "session": None, "age": 0.16, "resumed": True,
        }  # fmt: skip
        await again.speak(voice(0.5))
        await again.hears("word", lambda word: word["text"] == " w2")
        assert len(opener.sessions) == 1
        assert (await again.replies(1))[0].min() == 0.25  # no rest of a frame from before


@async_test
async def test_a_talk_that_was_taken_up_does_not_end_when_its_time_to_come_back_does(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.leave()
        while not client.talks()._timers:
            await asyncio.sleep(0.01)
        (timer,) = client.talks()._timers.values()
        await Talker.begin(client, resume=talker.ready["key"])
        assert timer.cancelled()


@async_test
async def test_who_comes_back_only_to_leave_may_come_back_again(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.leave()
        for _ in range(5):
            # Gone before anything could be sent to it.
            hasty = await Talker.connect(client, resume=talker.ready["key"])
            await hasty.leave()
        await Talker.begin(client, resume=talker.ready["key"])


@async_test
async def test_a_pause_ends_with_its_connection(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.ask("pause")
        await talker.hears("paused")
        await talker.leave()
        again = await Talker.begin(client, resume=talker.ready["key"])
        await again.speak(voice())
        await again.replies(1)


@async_test
async def test_a_place_is_held_while_a_client_is_away(tmp_path):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.leave()
        other = await Talker.connect(client)
        await other.hears("wait")
        again = await Talker.begin(client, resume=talker.ready["key"])
        await again.ask("end")
        await other.hears("ready")


@async_test
async def test_after_its_time_a_talk_is_over_and_its_place_free(tmp_path):
    async with serving(tmp_path, resume_seconds=0.05) as client:
        talker = await Talker.begin(client)
        await talker.leave()
        await Talker.begin(client)  # waits for the place
        late = await Talker.connect(client, resume=talker.ready["key"])
        assert (await late.rest())["reason"] == "this talk has ended"


@async_test
async def test_a_new_connection_takes_over_from_one_that_looks_alive(tmp_path):
    async with serving(tmp_path, resume_seconds=0.05) as client:
        old = await Talker.begin(client)
        new = await Talker.begin(client, resume=old.ready["key"])
        last = await old.rest()
        assert "taken up by another connection" in last["reason"] and not last["again"]
        # The old one's end is not the talk's, not even after the time to come back.
        await asyncio.sleep(0.2)
        await new.speak(voice())
        await new.replies(1)


@async_test
async def test_nothing_holds_a_session_that_is_over(tmp_path):
    """A session of the real model is gigabytes."""
    refs = []

    def open_session(settings, path):
        session = ServedSession(settings, path)
        refs.append(weakref.ref(session))
        return session

    async with serving(tmp_path, open_session) as client:
        for _ in range(2):
            talker = await Talker.begin(client)
            await talker.speak(voice(), voice())
            await talker.replies(2)
            await talker.ask("end")
            await talker.rest()
        gc.collect()
        assert [ref() for ref in refs] == [None, None]


@async_test
async def test_a_session_that_opens_for_nobody_is_let_go_and_its_place_too(tmp_path):
    opening, go, refs = threading.Event(), threading.Event(), []

    def open_session(settings, path):
        opening.set()
        assert go.wait(PATIENCE)
        session = ServedSession(settings, path)
        refs.append(weakref.ref(session))
        return session

    async with serving(tmp_path, open_session) as client:
        talker = await Talker.connect(client)
        await asyncio.to_thread(opening.wait)
        await talker.leave()
        go.set()
        while not refs or refs[0]() is not None:
            await asyncio.sleep(0.01)
            gc.collect()
        await Talker.begin(client)


# ---- too much


@async_test
async def test_sound_far_faster_than_it_can_be_heard_is_cut_off(tmp_path):
    async with serving(tmp_path, burst_seconds=1.0) as client:
        talker = await Talker.begin(client)
        for _ in range(200):
            await talker.speak(voice())
        last = await talker.rest()
        assert "faster than it can be heard" in last["reason"] and last["again"]
        assert talker.socket.close_code == 1008
        await Talker.begin(client, resume=talker.ready["key"])


@async_test
async def test_a_flood_of_messages_without_sound_is_cut_off(tmp_path):
    async with serving(tmp_path, burst_seconds=0.1) as client:
        talker = await Talker.begin(client)
        for _ in range(200):
            await talker.speak([])
        assert "faster than" in (await talker.rest())["reason"]


@async_test
async def test_too_many_requests_are_cut_off(tmp_path):
    async with serving(tmp_path, requests=5) as client:
        talker = await Talker.begin(client)
        for n in range(200):
            await talker.ask("pause" if n % 2 else "nonsense")
        assert "too many requests" in (await talker.rest())["reason"]


@pytest.mark.parametrize("message", [bytes(300_000), "x" * 300_000])
@async_test
async def test_a_message_that_is_too_long_ends_the_connection_not_the_talk(tmp_path, message):
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        send = talker.socket.send_str if isinstance(message, str) else talker.socket.send_bytes
        await send(message)
        await talker.rest()
        assert talker.socket.close_code == 1009
        await Talker.begin(client, resume=talker.ready["key"])


@async_test
async def test_messages_are_not_unpacked(tmp_path):
    """Compressed, a short message can be a long one."""
    async with serving(tmp_path) as client:
        socket = await client.ws_connect("/api/talk", compress=15)
        assert socket.compress == 0


# ---- faults


class Panic(BaseException):
    """What a panic in rustymimi looks like: no `Exception`."""


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), Panic("out of memory")])
@async_test
async def test_one_talks_failure_is_not_the_others(tmp_path, error):
    opener = Opener()
    async with serving(tmp_path, opener, sessions=2) as client:
        ill, well = await Talker.begin(client), await Talker.begin(client)

        def step(user):
            raise error

        opener.sessions[0].step = step
        await ill.speak(voice())
        last = await ill.rest()
        assert "the talk failed" in last["reason"] and "out of memory" in last["reason"]
        assert not last["again"] and ill.socket.close_code == 1011
        await well.speak(voice())
        await well.replies(1)
        await Talker.begin(client)  # the place is free


@async_test
async def test_a_request_that_fails_in_an_unforeseen_way_is_said(tmp_path):
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)

        def save(path):
            raise RuntimeError("the device is gone")

        opener.sessions[0].save = save
        await talker.ask("save", session="monday")
        last = await talker.rest()
        assert "the device is gone" in last["reason"] and last["again"]
        await Talker.begin(client, resume=talker.ready["key"])


@async_test
async def test_the_memory_is_switched_while_the_talk_goes_on(tmp_path):
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.ask("memory", mode="frozen")
        assert (await talker.hears("memory"))["mode"] == "frozen"
        assert opener.sessions[0].settings.memory == "frozen"


# ---- saving


@async_test
async def test_a_talk_is_saved_under_a_name_and_again_at_its_end(tmp_path):
    opener = Opener()
    async with serving(tmp_path / "new", opener) as client:
        talker = await Talker.begin(client)
        await talker.ask("save", session="monday")
        assert (await talker.hears("saved"))["session"] == "monday"
        await talker.ask("save", session="monday.session")  # the same talk
        assert (await talker.hears("saved"))["session"] == "monday"
        await talker.speak(voice())
        await talker.replies(1)
        await talker.ask("end")
        await talker.rest()
        kinds = [event["type"] for event in talker.events if event["type"] not in ("word", "meter")]
        assert kinds == ["ready", "saved", "saved", "saved", "ended"]
        assert (tmp_path / "new" / "monday.session").read_text() == "1 frames"
        assert len(opener.sessions[0].threads) == 1  # saved where it is stepped


@async_test
async def test_another_talks_name_is_not_taken_unasked(tmp_path):
    (tmp_path / "monday.session").write_text("precious")
    async with serving(tmp_path) as client:
        talker = await Talker.begin(client)
        await talker.ask("save", session="monday")
        assert "there is a talk 'monday' already" in (await talker.hears("error"))["message"]
        await talker.ask("save", session="monday", replace="yes")  # not true: not asked for
        assert "already" in (await talker.hears("error"))["message"]
        assert (tmp_path / "monday.session").read_text() == "precious"
        await talker.ask("save", session="monday", replace=True)
        await talker.hears("saved")
        assert (tmp_path / "monday.session").read_text() == "0 frames"


@async_test
async def test_a_talk_without_a_name_or_that_failed_is_not_saved_at_its_end(tmp_path):
    opener = Opener({}, {"fail_at": 0})
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.ask("end")
        await talker.rest()
        talker = await Talker.begin(client)
        await talker.ask("save", session="tuesday")
        await talker.hears("saved")
        await talker.speak(voice())
        await talker.rest()
        assert [len(session.saved) for session in opener.sessions] == [0, 1]


@pytest.mark.parametrize("error", [UserError("the disk is full"), RuntimeError("the disk is full")])
@async_test
async def test_a_last_save_that_fails_is_said(tmp_path, error):
    opener = Opener()
    async with serving(tmp_path, opener) as client:
        talker = await Talker.begin(client)
        await talker.ask("save", session="monday")
        await talker.hears("saved")

        def save(path):
            raise error

        opener.sessions[0].save = save
        await talker.ask("end")
        reason = (await talker.rest())["reason"]
        assert reason.startswith("ended by the client; ") and reason.endswith("the disk is full")
        assert talker.events[-2]["type"] == "error"
        assert talker.events[-2]["message"].endswith("the disk is full")
        await Talker.begin(client)  # the place is free all the same


# ---- the end of the server


@async_test
async def test_a_stopped_server_tells_everyone_and_keeps_what_has_a_name(tmp_path):
    opener, others = Opener(), set(threading.enumerate())
    async with serving(tmp_path, opener, sessions=3) as client:
        named, nameless = await Talker.begin(client), await Talker.begin(client)
        away = await Talker.begin(client)
        waiting, silent = await Talker.connect(client), await Talker.connect(client, start=None)
        await waiting.hears("wait")
        await named.ask("save", session="monday")
        await named.hears("saved")
        await away.leave()
        folder = Path(client.talks()._folder.name)
        assert folder.is_dir()
        outbox = client.talks().find(named.ready["key"]).outbox
        closing = asyncio.create_task(client.server.close())
        last = await named.rest()
        assert last["reason"] == "the server was stopped"
        assert named.socket.close_code == outbox.code == 1001
        kinds = [event["type"] for event in named.events if event["type"] != "meter"]
        assert kinds[-3:] == ["saved", "saved", "ended"]
        assert "so it is gone" in (await nameless.rest())["reason"]
        assert (await waiting.rest())["reason"] == "the server was stopped"
        await silent.socket.receive()
        assert silent.socket.close_code == 1001
        await closing
    assert not folder.exists()
    assert len(opener.sessions[0].saved) == 2
    left = {thread.name for thread in threading.enumerate() if thread not in others}
    assert {"model", "keeper"}.isdisjoint(left)


@async_test
async def test_one_talk_that_does_not_end_well_does_not_stop_the_others_from_it(tmp_path):
    opener, others = Opener(), set(threading.enumerate())
    async with serving(tmp_path, opener, sessions=2) as client:
        ill, well = await Talker.begin(client), await Talker.begin(client)
        await well.ask("save", session="monday")
        await well.hears("saved")

        def close():
            raise RuntimeError("no disk")

        client.talks().find(ill.ready["key"]).sound.close = close
        closing = asyncio.create_task(client.server.close())
        assert (await well.rest())["reason"] == "the server was stopped"
        await ill.rest()
        await closing
    assert len(opener.sessions[1].saved) == 2
    left = {thread.name for thread in threading.enumerate() if thread not in others}
    assert "model" not in left


def test_the_documented_limits_are_the_limits():
    limits = Limits()
    documented = Path(__file__).parents[1].joinpath("docs", "server.md").read_text()
    for name in ("waiting", "resume_seconds", "message_bytes", "heard_frames", "burst_seconds"):
        assert f'"{name}": {getattr(limits, name):g}' in documented, name
