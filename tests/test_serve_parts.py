"""The server's parts by themselves: whose turn it is, places, queues, buckets, settings."""

import asyncio
import threading
import weakref

import numpy as np
import pytest
from fake_talk import Clock
from hypothesis import given
from hypothesis import strategies as st
from serve_client import async_test

from moshi_ttt_mlx import UserError
from moshi_ttt_mlx.serve.limits import Bucket, Limits
from moshi_ttt_mlx.serve.model_thread import ModelThread
from moshi_ttt_mlx.serve.outbox import Outbox
from moshi_ttt_mlx.serve.places import Places
from moshi_ttt_mlx.serve.settings import NAMES, parse_settings

WAIT = 120  # seconds until a test gives up

# ---- the bucket


def test_a_bucket_lets_a_burst_through_and_then_its_rate():
    clock = Clock()
    bucket = Bucket(10, 2, clock)
    assert bucket.take(4) and bucket.take(6) and not bucket.take(1)
    clock.now = 1.0
    assert not bucket.take(3) and bucket.take(2) and not bucket.take(0.1)
    clock.now = 1000.0
    assert not bucket.take(10.5) and bucket.take(10)  # never more than a burst


# ---- the model's thread


class Player:
    """Has `frames` frames, and notes its turns in a common log."""

    def __init__(self, name, frames, log, fail_at=None):
        self.name, self.frames, self.log, self.fail_at = name, frames, log, fail_at
        self.failures, self.done = [], threading.Event()

    def waiting(self):
        return self.frames > 0

    def turn(self):
        if self.frames == self.fail_at:
            raise self.error
        self.log.append(self.name)
        self.frames -= 1
        if not self.frames:
            self.done.set()

    def fail(self, error):
        self.failures.append(error)
        self.done.set()


@pytest.fixture
def thread():
    thread = ModelThread()
    yield thread
    thread.close()


def hold(thread):
    """Keep the thread busy; returns what lets it go."""
    busy, go = threading.Event(), threading.Event()
    thread.call(lambda: (busy.set(), go.wait(WAIT)))
    assert busy.wait(WAIT)
    return go.set


def test_turns_go_round(thread):
    log = []
    players = [Player("a", 4, log), Player("b", 2, log), Player("c", 3, log)]
    let_go = hold(thread)
    for player in players:
        thread.add(player)
    let_go()
    assert all(player.done.wait(WAIT) for player in players)
    assert "".join(log) == "abcabcaca"


def test_jobs_come_before_the_next_turn_and_one_after_another(thread):
    log = []
    player = Player("a", 3, log)
    let_go = hold(thread)
    thread.add(player)
    jobs = [thread.call(lambda name=name: log.append(name)) for name in "12"]
    let_go()
    assert player.done.wait(WAIT) and all(job.done() for job in jobs)
    assert "".join(log) == "12aaa"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("a panic")])
def test_a_player_that_fails_gets_no_more_turns_and_the_others_do(thread, error):
    log = []
    ill, well = Player("a", 3, log, fail_at=2), Player("b", 3, log)
    ill.error = error
    let_go = hold(thread)
    thread.add(ill)
    thread.add(well)
    let_go()
    assert ill.done.wait(WAIT) and well.done.wait(WAIT)
    thread.call(lambda: None).result(WAIT)
    assert "".join(log) == "abbb" and len(ill.failures) == 1
    assert isinstance(ill.failures[0], Exception) and str(ill.failures[0]) == str(error)


def test_a_job_that_fails_is_its_callers(thread):
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 / 0).result(WAIT)

    def panic():
        raise SystemExit("a panic")

    with pytest.raises(RuntimeError, match="a panic"):
        thread.call(panic).result(WAIT)
    assert thread.call(lambda: 7).result(WAIT) == 7


def test_a_cancelled_job_is_left_out(thread):
    log = []
    let_go = hold(thread)
    cancelled = thread.call(lambda: log.append("cancelled"))
    assert cancelled.cancel()
    after = thread.call(lambda: log.append("after"))
    let_go()
    after.result(WAIT)
    assert log == ["after"]


def test_nothing_of_a_job_is_held_until_the_next_one(thread):
    class Session:
        pass

    result = thread.call(Session).result(WAIT)
    ref = weakref.ref(result)
    del result
    for _ in range(100 * WAIT):  # the thread has a moment to come back from it
        if ref() is None:
            break
        threading.Event().wait(0.01)
    assert ref() is None


def test_removed_means_no_turn(thread):
    log = []
    player = Player("a", 3, log)
    let_go = hold(thread)
    thread.add(player)
    thread.remove(player)
    thread.remove(player)
    let_go()
    thread.call(lambda: None).result(WAIT)
    thread.wake()
    thread.call(lambda: None).result(WAIT)
    assert log == []


def test_closing_finishes_the_jobs_and_takes_no_more():
    thread, log = ModelThread(), []
    let_go = hold(thread)
    thread.add(Player("a", 3, log))
    job = thread.call(lambda: log.append("job"))
    closing = threading.Thread(target=thread.close)
    closing.start()
    while not thread.call(lambda: None).cancelled():  # until it has begun to close
        pass
    let_go()
    closing.join(WAIT)
    assert job.done() and log == ["job"] and not thread._thread.is_alive()


# ---- places


class Line:
    """Clients of `Places`, by name."""

    def __init__(self, *args):
        self.places, self.tasks, self.positions = Places(*args), {}, {}

    async def join(self, *names):
        for name in names:
            self.positions[name] = []
            take = self.places.take(self.positions[name].append)
            self.tasks[name] = asyncio.create_task(take)
            await asyncio.sleep(0)

    def inside(self):
        return {
            name
            for name, task in self.tasks.items()
            if task.done() and not task.cancelled() and not task.exception()
        }

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)


@async_test
async def test_first_come_first_served():
    line = Line(2, 9)
    await line.join(*"abcde")
    assert line.inside() == {"a", "b"}
    assert [line.positions[name] for name in "abcde"] == [[], [], [1], [2], [3]]
    line.places.give_back()
    await line.settle()
    assert line.inside() == {"a", "b", "c"}
    assert line.positions["e"] == [3, 2]
    line.tasks["d"].cancel()
    await line.settle()
    assert line.positions["e"] == [3, 2, 1]
    line.places.give_back()
    await line.settle()
    assert line.inside() == {"a", "b", "c", "e"}


@async_test
async def test_a_place_that_comes_as_its_client_leaves_is_not_lost():
    line = Line(1, 9)
    await line.join("a", "b", "c")
    line.places.give_back()  # b's, but b has not run since
    line.tasks["b"].cancel()
    await line.settle()
    assert line.inside() == {"a", "c"}


@async_test
async def test_a_line_has_an_end_and_an_end_of_the_day():
    line = Line(1, 2)
    await line.join("a", "b", "c", "d")
    with pytest.raises(UserError, match="come back later"):
        await line.tasks["d"]
    line.places.close("closing time")
    for name in "bc":
        with pytest.raises(UserError, match="closing time"):
            await line.tasks[name]


# ---- the outbox


def frame(value):
    return np.full(1920, value, np.float32)


async def drain(outbox):
    """What is in it, until nothing is at once."""
    got = []
    while True:
        try:
            event = await asyncio.wait_for(outbox.get(), 0.05)
        except asyncio.TimeoutError:
            return got
        if event is None:
            return [*got, None]
        got.append(event)


def names(events):
    return [
        float(event[0]) if isinstance(event, np.ndarray) else event and event["type"]
        for event in events
    ]


@async_test
async def test_order_is_kept_and_a_meter_waits_behind():
    outbox = Outbox(Limits())
    for event in (frame(1), {"type": "meter", "age": 1}, {"type": "word"}, frame(2)):
        outbox.put(event)
    outbox.put({"type": "meter", "age": 2})
    got = await drain(outbox)
    assert names(got) == [1.0, "word", 2.0, "meter"] and got[-1]["age"] == 2


@async_test
async def test_of_too_many_frames_the_oldest_go_and_no_word_does():
    outbox = Outbox(Limits(outbox_frames=3))
    for n in range(6):
        outbox.put(frame(n))
        outbox.put({"type": f"word{n}"})
    assert outbox.skipped == 3
    want = ["word0", "word1", "word2", 3.0, "word3", 4.0, "word4", 5.0, "word5"]
    assert names(await drain(outbox)) == want
    for n in range(3):  # what was read counts no more
        outbox.put(frame(n))
    assert outbox.skipped == 3


@async_test
async def test_a_client_that_reads_nothing_is_given_up():
    outbox = Outbox(Limits(outbox_events=5, outbox_frames=2))
    outbox.put(frame(1))
    for _ in range(8):
        outbox.put({"type": "word"})
    got = await drain(outbox)
    assert names(got) == [1.0, *["word"] * 5, "ended", None]
    assert got[-2]["again"] and "does not read" in got[-2]["reason"] and outbox.code == 1008


@async_test
async def test_the_first_reason_counts_and_nothing_comes_after_it():
    outbox = Outbox(Limits())
    outbox.put({"type": "meter"})
    outbox.close("one")
    outbox.close("two", again=True, code=1011)
    outbox.put({"type": "word"})
    outbox.put(frame(1))
    got = await drain(outbox)
    assert got == [{"type": "ended", "reason": "one", "again": False}, None]
    assert (outbox.code, outbox.reason) == (1000, "one")
    assert await outbox.get() is None


@async_test
async def test_a_reader_that_waits_is_woken():
    outbox = Outbox(Limits())
    reader = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    outbox.put({"type": "word"})
    assert (await reader)["type"] == "word"


# ---- settings


def test_what_is_missing_is_the_servers():
    defaults = {"seed": 1, "temp": None, "memory": "on"}
    assert parse_settings(None, defaults) == defaults
    assert parse_settings({"seed": 2, "temp": None}, defaults) == defaults | {"seed": 2}
    assert parse_settings({"temp": 1}, defaults)["temp"] == 1.0
    assert defaults["seed"] == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(NAMES), json_values) | json_values)
def test_any_json_gives_settings_of_the_right_types_or_one_line(value):
    try:
        chosen = parse_settings(value, {})
    except UserError as error:
        assert len(str(error)) < 200
        return
    for name in ("temp", "text_temp", "cfg_coef"):
        assert 0 <= chosen.get(name, 0.0) < 2**63 and isinstance(chosen.get(name, 0.0), float)
    for name in ("top_k", "text_top_k", "seed", "context", "sinks"):
        assert type(chosen.get(name, 0)) is int and 0 <= chosen.get(name, 0) < 2**63
