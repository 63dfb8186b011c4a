"""Facts in Moshi's streams: who says what in which frame, and answers heard where they belong."""

import random

import numpy as np
import pytest

from moshi_ttt_mlx.evaluate import recall_spoken
from moshi_ttt_mlx.evaluate.recall import World, probe
from moshi_ttt_mlx.evaluate.recall_spoken import PADDING, spoken, talk_answers, voice

WORLD = World()
DELAYS = [0] + [1] * 7


@pytest.fixture
def some():
    return probe(random.Random(2), WORLD, 3, 100)


def test_every_token_has_a_sound_of_its_own():
    sounds = voice(np.arange(WORLD.vocabulary, dtype=np.int32)[None], 8)[0]
    assert sounds.shape == (8, WORLD.vocabulary)
    assert len({tuple(sound) for sound in sounds.T}) == WORLD.vocabulary
    assert sounds.min() >= 0
    assert sounds.max() < 64
    np.testing.assert_array_equal(sounds[0], np.arange(WORLD.vocabulary))


def test_moshi_answers_when_it_has_heard_the_key_and_the_user_never_does(some):
    codes = spoken(some, WORLD, 8)
    assert codes.shape == (3, 17, some.inputs.shape[1])
    text, user = codes[:, 0], codes[:, 9]
    for row, place in np.argwhere(some.targets >= 0):
        assert text[row, place + 2] == some.targets[row, place]
        assert user[row, place - 1] == WORLD.ask
        assert user[row, place] == some.inputs[row, place]
        assert user[row, place + 1] == WORLD.filler(0)
    assert (text != PADDING).sum() == (some.targets >= 0).sum()
    told = (some.targets < 0) & (np.roll(some.targets, 1, axis=1) < 0)
    np.testing.assert_array_equal(user[told], some.inputs[told])
    np.testing.assert_array_equal(codes[:, 1:9], voice(text, 8))
    np.testing.assert_array_equal(codes[:, 9:], voice(user, 8))


class Parrot:
    """A generator that says what the talk has, `late` frames late; its codebooks `hoarse`."""

    def __init__(self, codes, late, hoarse, heard):
        self.codes, self.late, self.hoarse, self.heard, self.frame = codes, late, hoarse, heard, 0

    def step(self, user):
        self.heard.append(np.array(user))
        frame, self.frame = self.frame - self.late, self.frame + 1
        last = self.codes.shape[2] - 1
        text = self.codes[:, 0, min(max(frame, 0), last)]
        made = self.codes[:, 1:9, min(max(frame - 1, 0), last)].copy()
        made[:, 5] += self.hoarse
        reading = text, made if self.frame > 1 else None
        return type("Frame", (), {"read": lambda _: reading})()


@pytest.mark.parametrize(("late", "hoarse"), [(0, 0), (1, 0), (0, 1)])
def test_answers_count_in_their_frame_and_sounds_in_all_codebooks(some, monkeypatch, late, hoarse):
    codes, heard = spoken(some, WORLD, 8), []
    lm = type("Lm", (), {})()
    lm.cfg = type("Cfg", (), {"generated_codebooks": 8, "audio_delays": DELAYS * 2})()
    parrot = Parrot(codes, late, hoarse, heard)
    monkeypatch.setattr(recall_spoken, "FrameGenerator", lambda *args, **kwargs: parrot)
    found = talk_answers(lm, some, WORLD, 32)
    asked = some.targets >= 0
    np.testing.assert_array_equal(found.text, asked if not late else np.zeros_like(asked))
    np.testing.assert_array_equal(found.sound, asked & (not late) & (not hoarse))
    assert (found.silent == 1) == (not late)
    frames = codes.shape[2]
    np.testing.assert_array_equal(np.stack(heard, axis=2)[:, :, :frames], codes[:, 9:])
