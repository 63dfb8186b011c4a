"""A codec on a thread of its own: the same numbers in the same order, one frame early."""

import threading
import time
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from moshi_ttt_mlx.cli import transcribe
from moshi_ttt_mlx.codec_thread import CodecThread, hearing_ahead, one_ahead


class Counting:
    """A codec whose numbers depend on everything it was asked before, in order."""

    name, sample_rate, frame_size, num_codebooks = "rustymimi", 24000, 4, 2

    def __init__(self):
        self.total, self.log, self.working = 0.0, [], threading.Lock()

    def _count(self, kind, array):
        assert self.working.acquire(blocking=False), "two threads in one codec"
        time.sleep(0.001)
        self.total = 0.5 * self.total + float(np.sum(array))
        self.log.append((kind, threading.current_thread().name))
        self.working.release()

    def encode(self, pcm):
        self._count("encode", pcm)
        return np.array([self.total, len(self.log)])

    def decode(self, codes):
        self._count("decode", codes)
        return np.full(4, self.total)

    def reset(self):
        self.total = 0.0

    def state(self):
        return {"total": np.array(self.total)}, {}

    def load_state(self, arrays, meta):
        self.total = float(arrays["total"])


class Talk:
    """As much of a session as the thread needs."""

    def __init__(self):
        self.codec, self.stepped = Counting(), []

    def step(self, pcm):
        self.stepped.append((self.codec.encode(pcm), time.sleep(0.001)))


FRAMES = [np.full(4, i, np.float32) for i in range(5)]


def test_announced_frames_are_encoded_on_the_thread_and_are_the_same():
    codec, alone = CodecThread(Counting()), Counting()
    got = [codec.encode(pcm) for pcm in one_ahead(codec, FRAMES)]
    assert np.array_equal(got, [alone.encode(pcm) for pcm in FRAMES])
    assert {name for _, name in codec.codec.log} == {"codec_0"}
    codec.close()


def test_the_next_frame_is_encoded_before_this_one_is_stepped():
    codec = CodecThread(Counting())
    frames = one_ahead(codec, FRAMES)
    first = next(frames)
    codec.encode(first)
    codec.decode(np.zeros(2))
    assert [kind for kind, _ in codec.codec.log] == ["encode", "encode", "decode"]
    assert len(codec.announced) == 1
    codec.close()


def test_another_frame_than_the_announced_one_is_refused():
    codec = CodecThread(Counting())
    codec.announce(FRAMES[1])
    with pytest.raises(ValueError, match="not the frame that was announced"):
        codec.encode(FRAMES[2])
    codec.close()


def test_no_state_is_taken_while_the_codec_is_ahead():
    codec = CodecThread(Counting())
    codec.announce(FRAMES[1])
    with pytest.raises(ValueError, match="announced"):
        codec.state()
    codec.encode(FRAMES[1])
    assert codec.state()[0]["total"] == 4
    codec.close()


def test_what_is_not_a_number_is_silence():
    codec, alone = CodecThread(Counting()), Counting()
    codec.announce(np.array([np.nan, np.inf, 1, 2], np.float32))
    assert codec.encode(np.array([0, 0, 1, 2], np.float32))[0] == 3 == alone.encode([1, 2])[0]
    codec.close()


def test_a_fault_of_the_codec_is_raised_where_its_codes_are_asked_for():
    codec = CodecThread(Counting())
    codec.codec.encode = lambda pcm: 1 / 0
    codec.announce(FRAMES[0])
    with pytest.raises(ZeroDivisionError):
        codec.encode(FRAMES[0])
    codec.close()


def test_a_session_gets_its_own_codec_back_and_threads_end():
    talk = Talk()
    own = talk.codec
    with hearing_ahead(talk) as ahead:
        for pcm in ahead(FRAMES):
            talk.step(pcm)
    names = [thread.name for thread in threading.enumerate()]
    assert talk.codec is own and not any(name.startswith("codec") for name in names)
    assert len(talk.stepped) == len(own.log) == 5


def test_a_codec_on_mlx_stays_on_its_thread():
    talk = Talk()
    talk.codec.name = "mlx"
    with hearing_ahead(talk) as ahead:
        assert isinstance(talk.codec, Counting)
        assert [pcm[0] for pcm in ahead(FRAMES)] == [0, 1, 2, 3, 4]


class Interrupted(Talk):
    """A session as `transcribe` uses it, interrupted after its third frame."""

    model = SimpleNamespace(speaks=True, silence_frames=0)
    generator = SimpleNamespace(max_delay=0)
    transcript = SimpleNamespace(to_txt=lambda: "")
    frame = 0

    def step(self, pcm):
        super().step(pcm)
        if len(self.stepped) == 3:
            raise KeyboardInterrupt
        return SimpleNamespace(text="", memory_ok=True, pcm=None)

    def save(self, path):
        self.saved = self.codec.state()[0]["total"]

    def finish(self):
        return []


class Recording(list):
    total_frames = None


def test_an_interrupted_talk_is_saved_with_all_that_its_codec_heard():
    talk, alone = Interrupted(), Counting()
    args = Namespace(user_stt=None, session="talk.session")
    transcribe._talk(talk, Recording(FRAMES), None, args, Console(quiet=True))
    for pcm in FRAMES[:4]:
        alone.encode(pcm)
    assert len(talk.stepped) == 4 and talk.saved == alone.total


def test_no_frames_no_work():
    codec = CodecThread(Counting())
    assert list(one_ahead(codec, [])) == [] and codec.announced == []
    codec.close()
