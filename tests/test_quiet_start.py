"""Silence until somebody speaks: what opens the gate, and what of the model never gets out."""

import numpy as np
import pytest
from fake_talk import FakeSession
from hypothesis import given
from hypothesis import strategies as st
from tiny import SMALL

from moshi_ttt_mlx import Session, load
from moshi_ttt_mlx.audio import FRAME_SIZE
from moshi_ttt_mlx.quiet_start import QuietStart
from moshi_ttt_mlx.session import SpokenFrame
from moshi_ttt_mlx.voice import CONFIRM_FRAMES, VoiceGate, level


def noise(dbfs, seed=0):
    """A frame of so loud a noise."""
    samples = np.random.default_rng(seed).standard_normal(FRAME_SIZE)
    return (samples / samples.std() * 10 ** (dbfs / 20)).astype(np.float32)


def heard(gate, *levels):
    """For each frame of these levels, whether the model hears it."""
    return [bool(gate(noise(dbfs, seed)).any()) for seed, dbfs in enumerate(levels)]


@pytest.mark.parametrize("room", [-90.0, -60.0, -45.0, -30.0])
def test_speech_above_any_room_opens_for_good_from_its_first_frame(room):
    gate = VoiceGate()
    voice = max(room, -65.0) + 20
    assert heard(gate, *[room] * 40) == [False] * 40 and not gate.is_open
    assert heard(gate, *[voice] * CONFIRM_FRAMES) == [True] * CONFIRM_FRAMES and gate.is_open
    assert heard(gate, room, room) == [True, True]


def test_a_click_opens_on_trial_only():
    gate = VoiceGate()
    assert (
        heard(gate, *[-60.0] * 5, -10.0, -20.0, -60.0, -60.0)
        == [False] * 5 + [True] * 2 + [False] * 2
    )
    assert not gate.is_open


def test_once_on_trial_a_quieter_frame_still_counts():
    gate = VoiceGate()
    heard(gate, *[-50.0] * 5)
    assert heard(gate, -40.0) == [False]  # 10 dB above the room: not enough to open
    assert heard(gate, -30.0, -40.0, -40.0) == [True] * 3 and gate.is_open


def test_a_room_that_is_loud_from_the_first_frame_is_a_room():
    gate = VoiceGate()
    heard(gate, *[-30.0] * 50)
    assert not gate.is_open


def test_a_room_that_grows_louder_slowly_is_a_room():
    gate = VoiceGate()
    heard(gate, *np.linspace(-80, -30, 200))
    assert not gate.is_open


@given(st.lists(st.floats(-100, -51), max_size=60))
def test_nothing_below_the_least_level_is_speech(levels):
    gate = VoiceGate()
    assert not any(heard(gate, *levels))


def test_a_level_of_any_count_of_samples():
    assert level(np.zeros(7)) == -100.0
    assert level(np.ones(3, np.float32)) == pytest.approx(0.0, abs=1e-6)


# ---- the session behind it


class Talker(FakeSession):
    """Says given pieces, one a frame; its transcript is the session's own."""

    def __init__(self, *pieces):
        super().__init__()
        self.pieces = pieces

    def step(self, user):
        index, piece = self.frame, self.pieces[self.frame]
        self.frame += 1
        self.users.append(user)
        words = self.transcript.add(index, piece, self.speaker) if piece else None
        return SpokenFrame(index, index * 0.08, words or "", piece, None, user / 2)


QUIET, LOUD = noise(-80.0), noise(-10.0)


def test_sound_comes_with_the_voice_and_words_from_the_next_whole_one():
    pieces = ["\u2581Hel", "lo", None, "\u2581who", "are", "\u2581you", None, "\u2581ok"]
    session = Talker(*pieces)
    quiet = QuietStart(session)
    frames = [quiet.step(user) for user in [QUIET, QUIET, LOUD, LOUD, LOUD, LOUD, QUIET, QUIET]]
    assert [frame.text for frame in frames] == ["", "", "", "", "", " you", "", " ok"]
    assert [frame.piece for frame in frames[:5]] == [None] * 5
    assert [frame.pcm is not None for frame in frames] == [False] * 4 + [True] * 4
    assert [bool(user.any()) for user in session.users] == [False] * 2 + [True] * 6
    assert [word.text for word in session.transcript.words] == ["you", "ok"]
    assert session.transcript.words[0].start == pytest.approx(0.4)


def test_a_resumed_talk_keeps_its_words_and_its_transcript_object_when_a_step_fails():
    session = Talker("\u2581before", "\u2581greeting")
    session.step(LOUD)
    kept = session.transcript
    quiet = QuietStart(session)
    quiet.step(QUIET)
    with pytest.raises(IndexError):
        quiet.step(QUIET)
    assert session.transcript is kept
    assert [word.text for word in session.transcript.words] == ["before"]


def test_the_model_goes_on_as_if_it_had_heard_silence(tmp_path):
    """The tokens are those of a session that hears zeros first: quiet is what is shown, not done."""
    model = load(SMALL)
    silence = np.zeros(FRAME_SIZE, np.float32)
    plain, hushed = Session(model, seed=4), Session(model, seed=4)
    quiet = QuietStart(hushed)
    users = [*[QUIET] * 8, *[LOUD] * 8]
    want = [plain.step(silence if n < 8 else user) for n, user in enumerate(users)]
    got = [quiet.step(user) for user in users]
    for a, b in zip(got[10:], want[10:], strict=True):
        assert np.array_equal(a.pcm, b.pcm) and np.array_equal(a.codes, b.codes)
    assert all(frame.pcm is None and not frame.text for frame in got[:10])
    said = [word.text for word in plain.transcript.words]
    kept = [word.text for word in hushed.transcript.words]
    assert len(kept) < len(said) and said[-len(kept) :] == kept != []
    hushed.save(tmp_path / "talk")  # and it is a session like any other
    again = Session.load(tmp_path / "talk", model)
    assert np.array_equal(again.step(LOUD).pcm, plain.step(LOUD).pcm)
