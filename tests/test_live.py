"""Queues that never grow, watches that speak once, and a talk that ends well however it ends."""

import math
import queue
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from fake_talk import SILENCE, Clock, EagerDevice, FakeDevice, FakeSession, PlayingDevice, voice
from hypothesis import given
from hypothesis import strategies as st

from moshi_ttt_mlx import live
from moshi_ttt_mlx.audio import FRAME_SIZE
from moshi_ttt_mlx.devices import BURST_SECONDS
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.frame_queues import (
    CUSHION_SAMPLES,
    HEARD_FRAMES,
    REPLY_FRAMES,
    HeardQueue,
    ReplyQueue,
)
from moshi_ttt_mlx.live import (
    Ended,
    MemoryStatus,
    Noted,
    Ready,
    Said,
    Saved,
    Talk,
    Warned,
    read_memory,
)
from moshi_ttt_mlx.voice import level
from moshi_ttt_mlx.watches import MEMORY_BROKE, Patience

WAIT = 120  # seconds until a test gives up; none waits so long unless it fails


def wait_until(true):
    for _ in range(WAIT * 200):
        if true():
            return
        time.sleep(0.005)
    pytest.fail("it never came true")


class Stage:
    """A talk with fakes; the test is the user."""

    def __init__(self, session=None, microphone=None, loudspeaker=None, **settings):
        self.session = session or FakeSession()
        self.microphone = microphone or FakeDevice("mic")
        self.loudspeaker = loudspeaker or EagerDevice("speaker")
        self.seen = []
        self.talk = Talk(lambda: self.session, self.microphone, self.loudspeaker, **settings)
        self.talk.start()

    def until(self, kind):
        """The next event of a kind; all that come before it are kept in `seen`."""
        while True:
            event = self.talk.events.get(timeout=WAIT)
            self.seen.append(event)
            if isinstance(event, kind):
                return event

    def end(self):
        self.talk.stop()
        ended = self.until(Ended)
        self.talk.close()
        return ended

    @property
    def warnings(self):
        return [event.message for event in self.seen if isinstance(event, Warned)]


@pytest.fixture
def stage():
    """Makes stages, and lets their threads go."""
    stages = []

    def make(*args, **kwargs):
        stages.append(Stage(*args, **kwargs))
        return stages[-1]

    yield make
    for one in stages:
        one.talk.close()


# ---- queues


@given(st.integers(1, 5), st.lists(st.booleans()))
def test_a_full_queue_drops_its_oldest_frame_and_counts_it(limit, puts):
    frames, model, dropped = HeardQueue(limit), [], 0
    for number, is_put in enumerate(puts):
        if is_put:
            frames.put(number)
            model.append(number)
            dropped += len(model) > limit
            model = model[-limit:]
        else:
            assert frames.get(0) == (model.pop(0) if model else None)
        assert (len(frames), frames.dropped) == (len(model), dropped)


def test_a_waiting_reader_gets_the_frame_that_comes():
    frames = HeardQueue()
    threading.Timer(0.05, frames.put, ["late"]).start()
    assert frames.get(WAIT) == "late"


def test_nothing_is_counted_before_the_first_reply():
    replies = ReplyQueue()
    assert not replies.fetch(5000).any()
    replies.put(voice())
    assert not replies.fetch(CUSHION_SAMPLES).any()  # the cushion comes first
    assert (replies.fetch(FRAME_SIZE) == 0.5).all()
    assert replies.underruns == 0


def test_a_gap_plays_silence_and_is_counted_once_however_long():
    replies = ReplyQueue(cushion=0)
    replies.put(voice())
    taken = np.concatenate([replies.fetch(480) for _ in range(10)])
    assert (taken[:FRAME_SIZE] == 0.5).all() and not taken[FRAME_SIZE:].any()
    assert replies.underruns == 1
    replies.put(voice(0.25))
    assert (replies.fetch(FRAME_SIZE) == 0.25).all()
    replies.fetch(1)
    assert replies.underruns == 2


def test_running_dry_at_the_end_is_no_underrun():
    replies = ReplyQueue()
    replies.put(voice())
    replies.finish()
    replies.fetch(10 * FRAME_SIZE)
    assert replies.underruns == 0


def test_silent_replies_are_left_out_while_too_much_waits():
    replies = ReplyQueue(cushion=0)
    for _ in range(4):
        replies.put(voice())
    replies.put(SILENCE)
    replies.put(voice(0.25))
    assert (replies.skipped, len(replies)) == (1, 5 * FRAME_SIZE)
    assert (replies.fetch(5 * FRAME_SIZE)[-FRAME_SIZE:] == 0.25).all()
    replies.put(SILENCE)  # nothing waits: a pause is a pause
    assert (replies.skipped, len(replies)) == (1, FRAME_SIZE)


def test_replies_never_pile_up():
    replies = ReplyQueue(cushion=0)
    for number in range(100):
        replies.put(voice(number / 100))
    assert len(replies) == REPLY_FRAMES * FRAME_SIZE
    assert (replies.fetch(REPLY_FRAMES * FRAME_SIZE)[-FRAME_SIZE:] == np.float32(0.99)).all()
    assert replies.skipped == 100 - REPLY_FRAMES


def underruns_in_bursts(cushion, phase, jitter):
    """Of five seconds whose sound comes and goes in bursts of 60 ms, as with ALSA's pulse plugin.

    Args:
        phase: of the loudspeaker's bursts against the microphone's, in ms.
        jitter: makes the milliseconds by which each is late.
    """
    replies = ReplyQueue(cushion)
    heard = [60 * math.ceil(80 * n / 60) for n in range(1, 70)]
    moments = [(at + jitter(18, 60), replies.put, [voice()]) for at in heard]
    for n in range(5000 // 60):
        moments.append((60 * n + phase + jitter(0, 10), replies.fetch, [3 * 480]))
    for _, act, args in sorted(moments, key=lambda moment: moment[0]):
        act(*args)
    return replies.underruns


def test_a_loudspeaker_that_takes_its_sound_in_bursts_needs_as_much_ahead():
    def most(cushion):
        jitter = np.random.default_rng(0).uniform
        return max(underruns_in_bursts(cushion, phase, jitter) for phase in range(60))

    burst = round(24_000 * BURST_SECONDS["ALSA"])
    assert most(CUSHION_SAMPLES) > 0 == most(CUSHION_SAMPLES + burst)


def test_a_talk_plays_so_much_ahead():
    loudspeaker = FakeDevice()
    loudspeaker.burst = 1000
    replies = Talk(FakeSession, FakeDevice(), loudspeaker).replies
    replies.put(voice())
    assert len(replies) == CUSHION_SAMPLES + 1000 + FRAME_SIZE


@given(st.lists(st.integers(0, 2500), max_size=30))
def test_every_reply_sample_is_played_in_order(fetches):
    replies, put, out = ReplyQueue(cushion=100), [], []
    for number, count in enumerate(fetches):
        if len(replies) <= 2 * FRAME_SIZE:
            put.append(np.arange(1, 1 + FRAME_SIZE, dtype=np.float32) + number)
            replies.put(put[-1])
        out.append(replies.fetch(count))
        assert len(out[-1]) == count
    replies.finish()
    played = np.concatenate([*out, replies.fetch(100 + 3 * FRAME_SIZE)])
    assert np.array_equal(played[played != 0], np.concatenate([*put, []]))


# ---- watches


def test_patience_is_over_once_and_only_after_a_stretch():
    patience = Patience(3.0)
    times = np.arange(0, 20, 0.25)
    assert [t for t in times if patience.over(t != 2.0, t)] == [5.0]


def test_a_suspended_program_has_not_waited():
    patience = Patience(3.0)
    assert not patience.over(True, 0.0)
    assert not patience.over(True, 3600.0)


@pytest.mark.parametrize(("frame", "expected"), [(SILENCE, -100.0), (voice(1.0), 0.0)])
def test_level_is_in_dbfs(frame, expected):
    assert level(frame) == pytest.approx(expected, abs=1e-6)


# ---- the talk


def test_words_sound_and_frames_come_through_on_one_thread(stage):
    kept = []
    session = FakeSession()
    talk_stage = stage(session, on_frame=lambda spoken, user: kept.append((spoken.index, user)))
    talk_stage.until(Ready)
    frames = [voice(0.1), voice(0.2), voice(0.4)]
    talk_stage.microphone.speak(*frames)
    said = [talk_stage.until(Said) for _ in frames]
    assert [(s.text, round(s.time, 2)) for s in said] == [
        (" w0", 0.0),
        (" w1", 0.08),
        (" w2", 0.16),
    ]
    talk_stage.talk.save("during")
    talk_stage.end()
    assert [index for index, _ in kept] == [0, 1, 2]
    assert all(np.array_equal(user, frame) for (_, user), frame in zip(kept, frames, strict=True))
    played = talk_stage.loudspeaker.exchange(CUSHION_SAMPLES + 3 * FRAME_SIZE)
    assert np.array_equal(played[CUSHION_SAMPLES:], np.concatenate(frames) / 2)


def test_the_model_is_loaded_on_the_thread_that_steps(stage):
    loaded_on = []
    session = FakeSession()

    def load():
        loaded_on.append(threading.get_ident())
        return session

    microphone = FakeDevice()
    talk = Talk(load, microphone, FakeDevice())
    talk.start()
    assert isinstance(talk.events.get(timeout=WAIT), Ready)
    microphone.speak(voice())
    assert isinstance(talk.events.get(timeout=WAIT), Said)
    talk.stop()
    assert isinstance(talk.events.get(timeout=WAIT), Ended)
    talk.save("after")
    talk.close()
    assert session.threads == set(loaded_on)


def test_the_worker_ends_its_mlx_streams_when_it_goes(stage, monkeypatch):
    cleared = []
    monkeypatch.setattr(
        mx, "clear_streams", lambda: cleared.append(threading.get_ident()), raising=False
    )
    talk_stage = stage()
    talk_stage.until(Ready)
    talk_stage.microphone.speak(voice())
    talk_stage.until(Said)
    talk_stage.end()
    assert set(cleared) == talk_stage.session.threads


def test_when_the_model_is_late_the_oldest_user_frames_go(stage):
    gate = threading.Semaphore(0)
    session = FakeSession(gate=gate)
    talk_stage = stage(session)
    talk_stage.until(Ready)
    talk_stage.microphone.speak(voice(0.0))
    assert session.stepping.wait(WAIT)  # the model is busy with the first one from here on
    frames = [voice(n / 100) for n in range(1, HEARD_FRAMES + 6)]
    talk_stage.microphone.speak(*frames)
    status = talk_stage.talk.status()
    assert (status.dropped, status.lag_ms) == (5, HEARD_FRAMES * 80)
    gate.release(1 + HEARD_FRAMES)
    for _ in range(1 + HEARD_FRAMES):
        talk_stage.until(Said)
    talk_stage.end()
    heard = [round(float(user[0]) * 100) for user in session.users]
    assert heard == [0, *range(6, HEARD_FRAMES + 6)]
    assert talk_stage.talk.status().lag_ms == 0


def late_stage(stage, cost, waiting):
    """A talk whose model takes `cost` seconds a frame while `waiting` frames always wait."""
    clock = Clock()
    session = FakeSession(clock=clock, cost=cost, gate=threading.Semaphore(0))
    talk_stage = stage(session, clock=clock)
    talk_stage.until(Ready)
    talk_stage.microphone.speak(*[voice()] * (waiting + 1))
    for _ in range(100):
        session.gate.release()
        talk_stage.until(Said)
        talk_stage.microphone.speak(voice())
    session.gate.release(1000)
    talk_stage.end()
    return talk_stage


def test_a_machine_that_is_too_slow_is_named_once_with_what_to_try(stage):
    (message,) = late_stage(stage, 0.095, waiting=8).warnings
    assert "needs 95 ms a frame, 80 are available" in message
    assert "-q 4" in message and "--context 1500" in message


def test_a_machine_that_keeps_up_is_not_blamed(stage):
    assert late_stage(stage, 0.079, waiting=1).warnings == []


def spoken_to(stage, frames, breaks_at=np.inf, **settings):
    clock = Clock()
    session = FakeSession(clock=clock, cost=0.08, breaks_at=breaks_at)
    talk_stage = stage(session, clock=clock, **settings)
    talk_stage.until(Ready)
    for frame in frames:
        talk_stage.microphone.speak(frame)
        talk_stage.until(Said)
    talk_stage.end()
    return talk_stage


def test_a_memory_that_breaks_is_said_once_and_the_talk_goes_on(stage):
    talk_stage = spoken_to(stage, [voice()] * 6, breaks_at=3)
    assert [m for m in talk_stage.warnings if "memory is no longer finite" in m] == [MEMORY_BROKE]
    assert talk_stage.session.frame == 6


def test_exact_zeros_for_three_seconds_name_the_permission_once(stage):
    (message,) = spoken_to(stage, [SILENCE] * 120).warnings
    assert "Privacy & Security > Microphone" in message and "'mic'" in message


def test_a_short_silence_or_a_quiet_room_is_no_fault(stage):
    pause = [SILENCE] * 36
    assert spoken_to(stage, [*pause, voice(), *pause]).warnings == []
    assert spoken_to(stage, [voice(1e-5)] * 120).warnings == []


def test_a_microphone_that_never_calls_names_the_permission(stage):
    # The clock runs fast: each look at it is half a second later.
    talk_stage = stage(clock=Clock(tick=0.5))
    warned = talk_stage.until(Warned)
    assert "no sound at all" in warned.message and "Microphone" in warned.message
    assert talk_stage.end() == Ended()


def test_a_loudspeaker_that_never_calls_is_named(stage):
    talk_stage = stage(clock=Clock(tick=0.5), loudspeaker=FakeDevice("speaker"))
    messages = {talk_stage.until(Warned).message for _ in range(2)}
    assert any("loudspeaker 'speaker' takes no sound" in message for message in messages)


def test_a_device_that_falls_silent_ends_the_talk_and_it_can_be_saved(stage):
    talk_stage = stage(clock=Clock(tick=0.5))
    talk_stage.until(Ready)
    talk_stage.microphone.speak(voice())
    ended = talk_stage.until(Ended)
    assert ended.error is None and "'mic' is gone" in ended.reason
    assert talk_stage.microphone.ending == "abandoned"
    talk_stage.talk.save("kept")
    assert talk_stage.session.saved == ["kept"]


def test_a_stream_that_portaudio_ended_ends_the_talk_at_once(stage):
    talk_stage = stage(clock=Clock())  # no time passes
    talk_stage.until(Ready)
    talk_stage.loudspeaker.active = False
    assert "'speaker' is gone" in talk_stage.until(Ended).reason


def test_a_talk_that_is_stopped_closes_its_devices_and_can_be_saved(stage):
    talk_stage = stage()
    talk_stage.until(Ready)
    assert talk_stage.talk.started
    talk_stage.talk.stop()
    assert talk_stage.until(Ended) == Ended(None, None)
    assert talk_stage.microphone.ending == talk_stage.loudspeaker.ending == "stopped"
    talk_stage.talk.save("kept")
    assert talk_stage.session.saved == ["kept"]


def test_a_save_that_fails_reaches_whoever_asked_and_the_talk_goes_on(stage):
    session = FakeSession()

    def save(path):
        raise UserError("the disk is full")

    session.save = save
    talk_stage = stage(session)
    talk_stage.until(Ready)
    with pytest.raises(UserError, match="disk is full"):
        talk_stage.talk.save("x")
    talk_stage.microphone.speak(voice())
    assert talk_stage.until(Said).text == " w0"
    assert talk_stage.end() == Ended()


def test_the_users_words_are_told_with_the_time_of_their_sound_to_the_last(stage):
    late = []
    one = stage(FakeSession(hears=True), on_words=late.append, max_seconds=0.32)
    one.until(Ready)
    one.microphone.speak(*[voice()] * 4)
    one.until(Ended)
    said = [
        (e.text, round(e.time, 3)) for e in one.seen if isinstance(e, Said) and e.speaker == "user"
    ]
    assert said == [(f" u{i}", round(0.08 * i, 3)) for i in range(4)]  # written two frames later
    assert [words.text for words in late] == [" u2", " u3"]


def test_the_silence_after_a_talk_is_no_part_of_its_age(stage):
    session = FakeSession(speaks=False)

    def finish():
        session.frame += 30
        return []

    session.finish = finish
    one = stage(session, max_seconds=0.16)
    one.until(Ready)
    one.microphone.speak(voice(), voice())
    one.until(Ended)
    assert one.talk.status().age == one.talk.status().sitting == pytest.approx(0.16)


def test_what_stops_loading_is_told():
    def load():
        raise UserError("no such model")

    talk = Talk(load, FakeDevice(), FakeDevice())
    talk.start()
    ended = talk.events.get(timeout=WAIT)
    talk.close()
    assert str(ended.error) == "no such model" and not talk.started


def test_what_stops_a_step_is_told_and_the_devices_are_closed(stage):
    talk_stage = stage(FakeSession(fail_at=1))
    talk_stage.until(Ready)
    talk_stage.microphone.speak(voice(), voice())
    assert str(talk_stage.until(Ended).error) == "out of memory"
    assert talk_stage.microphone.ending == talk_stage.loudspeaker.ending == "stopped"


def test_a_talk_of_given_length_hears_so_many_frames_and_plays_all_of_its_reply(stage):
    talk_stage = stage(loudspeaker=PlayingDevice(), max_seconds=0.8)
    talk_stage.until(Ready)
    for n in range(15):
        talk_stage.microphone.speak(voice((n + 1) / 100))
        if n < 10:
            talk_stage.until(Said)
    assert talk_stage.until(Ended) == Ended()
    assert talk_stage.session.frame == 10
    sound = talk_stage.loudspeaker.sound
    expected = np.concatenate([user / 2 for user in talk_stage.session.users])
    assert np.array_equal(sound[sound != 0], expected)


def test_an_stt_model_gets_its_prefix_and_no_loudspeaker(stage):
    session = FakeSession(speaks=False, prefix=1.0)
    talk_stage = stage(session)
    talk_stage.until(Ready)
    assert session.frame == 12 and not np.any(session.users)
    talk_stage.microphone.speak(voice())
    assert talk_stage.until(Said).text == " w12"
    talk_stage.end()
    assert talk_stage.loudspeaker.exchange is None


def test_the_status_counts_what_the_sound_system_lost(stage):
    talk_stage = stage()
    talk_stage.until(Ready)
    talk_stage.microphone.glitches, talk_stage.loudspeaker.glitches = 2, 3
    talk_stage.microphone.speak(voice(1.0))
    talk_stage.until(Said)
    talk_stage.end()
    status = talk_stage.talk.status()
    assert status.glitches == 5 and status.frame_ms is not None
    assert status.age == status.sitting == pytest.approx(0.08)
    assert status.user_level == pytest.approx(0.0, abs=1e-3)
    assert status.reply_level == pytest.approx(-6.02, abs=1e-2)
    with pytest.raises(queue.Empty):
        talk_stage.talk.events.get(timeout=0)


# ---- mute and pause


def test_a_muted_talk_hears_and_keeps_silence_and_blames_nobody(stage):
    clock, kept = Clock(), []
    session = FakeSession(clock=clock, cost=0.08)
    talk_stage = stage(session, clock=clock, on_frame=lambda spoken, user: kept.append(user))
    talk_stage.until(Ready)
    talk_stage.talk.muted = True
    for _ in range(60):
        talk_stage.microphone.speak(voice())
        talk_stage.until(Said)
    assert talk_stage.talk.status().muted
    talk_stage.talk.muted = False
    talk_stage.microphone.speak(voice())
    talk_stage.until(Said)
    talk_stage.end()
    assert not np.any(session.users[:60]) and session.users[60].all()
    assert not np.any(kept[:60]) and talk_stage.warnings == []


def test_a_pause_throws_away_what_is_heard_and_costs_no_underrun(stage):
    talk_stage = stage()
    talk_stage.until(Ready)
    talk_stage.microphone.speak(voice(0.1))
    talk_stage.until(Said)
    talk_stage.talk.paused = True
    for _ in range(30):
        talk_stage.microphone.speak(voice(0.9))
        wait_until(lambda: not len(talk_stage.talk.heard))
    talk_stage.talk.save("now")  # done after it: the last one has been thrown away, too
    talk_stage.loudspeaker.exchange(10 * FRAME_SIZE)
    talk_stage.talk.paused = False
    talk_stage.microphone.speak(voice(0.2))
    talk_stage.until(Said)
    talk_stage.end()
    assert [round(float(user[0]), 1) for user in talk_stage.session.users] == [0.1, 0.2]
    status = talk_stage.talk.status()
    assert (status.underruns, status.dropped) == (0, 0)
    played = talk_stage.loudspeaker.exchange(CUSHION_SAMPLES + FRAME_SIZE)
    assert not played[:CUSHION_SAMPLES].any() and (played[CUSHION_SAMPLES:] == 0.1).all()


def test_a_save_that_nobody_waits_for_tells_how_it_went(stage):
    session = FakeSession()
    talk_stage = stage(session)
    talk_stage.until(Ready)
    talk_stage.talk.save_soon("a")
    assert talk_stage.until(Saved).path == "a" and session.saved == ["a"]

    def save(path):
        raise UserError("the disk is full")

    session.save = save
    talk_stage.talk.save_soon("b")
    assert "disk is full" in talk_stage.until(Warned).message
    talk_stage.microphone.speak(voice())
    talk_stage.until(Said)
    assert talk_stage.end() == Ended()


# ---- the memory


def test_the_memory_is_read_once_a_second_and_never_while_a_frame_waits():
    clock, looks = Clock(), []
    session = FakeSession(clock=clock, cost=0.08)
    session.model.memory = "an adapter"

    def report():
        looks.append(session.frame)
        layer = {"tokens": 9, "updates": 2, "step": 0.1, "drift": 0.5, "gate": 0.25}
        return {3: layer, 5: layer | {"drift": 0.75, "step": 0.05}}

    session.memory_report = report
    # Never started: which frames wait is up to the test, not to the threads.
    talk = Talk(lambda: session, FakeDevice(), FakeDevice(), clock=clock)
    talk.session = session
    talk.heard.put(voice())
    for _ in range(30):
        talk._hear(voice())
    assert looks == []
    talk.heard.clear()
    for _ in range(30):
        talk._hear(voice())
    assert looks == [31, 44, 57]  # every 13 frames: the first ones after a second
    status = talk.status()
    assert status.memory == MemoryStatus(2, 2, 9, step=0.1, drift=0.75, gate=0.25)
    assert (status.filled, status.window) == (60, 3000)


def test_a_talk_without_a_memory_is_never_asked_for_one():
    session = FakeSession()
    session.memory_report = lambda: pytest.fail("asked")
    assert read_memory(session) is None
    session.model.memory, session.memory_report = "an adapter", dict
    assert read_memory(session) == MemoryStatus(layers=0)


# ---- a device that was unplugged


class Plug:
    """A microphone that a test unplugs and plugs in again."""

    def __init__(self, stage, monkeypatch, **settings):
        monkeypatch.setattr(live, "_RETRY_SECONDS", 0.01)
        monkeypatch.setattr(live, "_POLL_SECONDS", 0.01)
        self.is_in, self.searches = True, threading.Semaphore(0)
        settings = {"find_again": self.find, "max_wait": 1000.0, "clock": Clock()} | settings
        self.stage = stage(**settings)
        self.stage.until(Ready)

    def find(self):
        self.searches.release()
        return self.is_in

    def pull(self):
        """The microphone goes; returns once it was looked for twice."""
        self.stage.microphone.speak(voice(0.1))
        self.stage.until(Said)
        self.is_in = self.stage.microphone.active = False
        for _ in range(2):
            assert self.searches.acquire(timeout=WAIT)

    def put_back(self):
        self.is_in = True
        wait_until(lambda: self.stage.microphone.active)
        self.stage.microphone.speak(voice(0.9))  # it calls: this frame comes too early to count
        return self.stage.until(Noted)


def test_a_talk_goes_on_with_its_device_where_it_stood(stage, monkeypatch):
    plug = Plug(stage, monkeypatch)
    talk_stage = plug.stage
    plug.pull()
    assert talk_stage.microphone.ending == talk_stage.loudspeaker.ending == "abandoned"
    assert talk_stage.talk.status().waiting_for == "mic"
    assert talk_stage.session.frame == 1  # it stands still
    talk_stage.talk.save("meanwhile")
    assert plug.put_back().message == "'mic' is back: the talk goes on"
    assert talk_stage.talk.status().waiting_for is None
    talk_stage.loudspeaker.exchange(10 * FRAME_SIZE)  # it plays what there was, then nothing
    talk_stage.microphone.speak(voice(0.2))
    talk_stage.until(Said)
    assert talk_stage.end() == Ended()
    assert [round(float(user[0]), 1) for user in talk_stage.session.users] == [0.1, 0.2]
    (message,) = talk_stage.warnings
    assert "'mic' is gone" in message and talk_stage.session.saved == ["meanwhile"]
    assert talk_stage.talk.status().underruns == 0


def test_it_may_go_and_come_twice(stage, monkeypatch):
    plug = Plug(stage, monkeypatch)
    for _ in range(2):
        plug.pull()
        plug.put_back()
    assert plug.stage.end() == Ended()
    assert len(plug.stage.warnings) == 2


def test_a_device_that_opens_but_never_calls_is_not_back(stage, monkeypatch):
    monkeypatch.setattr(live, "PATIENCE_SECONDS", 0.05)
    plug = Plug(stage, monkeypatch)
    plug.pull()
    plug.is_in = True
    while plug.searches.acquire(blocking=False):
        pass
    for _ in range(4):  # opened, given up, opened again
        assert plug.searches.acquire(timeout=WAIT)
    assert plug.stage.talk.status().waiting_for == "mic"
    assert plug.stage.end() == Ended()
    assert not any(isinstance(event, Noted) for event in plug.stage.seen)
    assert plug.stage.microphone.ending == "abandoned"


def test_a_device_that_cannot_be_opened_yet_is_tried_again(stage, monkeypatch):
    plug = Plug(stage, monkeypatch)
    plug.pull()
    start, refusals = plug.stage.microphone.start, []

    def refuse(exchange):
        if len(refusals) < 3:
            refusals.append(1)
            raise UserError("cannot open it")
        start(exchange)

    plug.stage.microphone.start = refuse
    plug.put_back()
    assert len(refusals) == 3 and plug.stage.end() == Ended()


def test_a_device_that_stays_away_ends_the_talk_and_it_can_be_saved(stage, monkeypatch):
    plug = Plug(stage, monkeypatch, clock=Clock(tick=0.5), max_wait=20.0)
    plug.is_in = plug.stage.microphone.active = False
    plug.stage.microphone.calls = 1
    assert "'mic' is gone" in plug.stage.until(Ended).reason
    plug.stage.talk.save("kept")
    assert plug.stage.session.saved == ["kept"] and plug.searches.acquire(timeout=0)


def test_nobody_waits_when_told_not_to(stage, monkeypatch):
    plug = Plug(stage, monkeypatch, max_wait=0.0)
    plug.stage.microphone.calls, plug.stage.microphone.active = 1, False
    assert "'mic' is gone" in plug.stage.until(Ended).reason
    assert not plug.searches.acquire(blocking=False) and plug.stage.warnings == []


# ---- no greeting


def test_a_quiet_start_lets_nothing_out_before_the_user_speaks(stage):
    talk_stage = stage(quiet_start=True)
    talk_stage.until(Ready)
    talk_stage.microphone.speak(*[voice(1e-4)] * 10)
    wait_until(lambda: talk_stage.session.frame == 10)
    assert talk_stage.talk.status().hushed and len(talk_stage.talk.replies) == 0
    talk_stage.microphone.speak(*[voice(0.2)] * 4)
    assert talk_stage.until(Said).text == " w12"  # the third loud frame
    talk_stage.end()
    assert not talk_stage.talk.status().hushed
    assert not np.any(talk_stage.session.users[:10])
    assert [w.text for w in talk_stage.session.transcript.words][:1] == ["w12"]
