"""How answers are counted; the talks themselves are in test_voice_talks.py."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice.recall import ANSWER, BLOCK, Answer, is_right, save_clips, table, was_heard
from voice.talks import FRAME, RATE, Turn


def answer(kind, value="Bella", right=True, seed=0, row=0, windows=2, voice="af_nova", probed=True):
    return Answer(seed, row, windows, voice, kind, "cat", value, probed, "...", right)


def test_a_fact_is_heard_if_it_was_repeated_in_the_same_talk():
    told = [
        answer("tell", right=False),
        answer("tell", seed=1),
        answer("tell", row=1),
        answer("tell", windows=4),
        answer("tell", value="Coco"),
    ]
    assert not was_heard(answer("ask"), told)
    for other in ({"seed": 1}, {"row": 1}, {"windows": 4}, {"value": "Coco"}):
        assert was_heard(answer("ask", **other), told)


def test_the_table_sums_what_lies_beyond_the_window_by_voice():
    found = [
        answer("ask", windows=0.75, right=False),
        answer("tell", windows=0.75, right=False),
        answer("tell", right=False),
        answer("ask", right=False),
        answer("tell", row=1, voice="am_michael"),
        answer("ask", row=1, voice="am_michael"),
        answer("tell", row=1, windows=4, voice="am_michael"),
        answer("ask", row=1, windows=4, voice="am_michael", right=False),
        answer("ask", row=1, windows=4, voice="am_michael", probed=False),
        answer("talk", windows=4),
    ]
    assert table(found).splitlines() == [
        "0.75 windows: asked 0 of 1, 0.0 %; told 0 of 1, 0.0 %",
        "2 windows: asked 1 of 2, 50.0 %; asked of what was heard 1 of 1, 100.0 %; told 1 of 2, 50.0 %",
        "4 windows: asked 0 of 1, 0.0 %; asked of what was heard 0 of 1, 0.0 %; told 1 of 1, 100.0 %;"
        " small talk 1 of 1, 100.0 %",
        "beyond, af_nova: asked 0 of 1, 0.0 %; told 0 of 1, 0.0 %; small talk 1 of 1, 100.0 %",
        "beyond, am_michael: asked 1 of 2, 50.0 %; asked of what was heard 1 of 2, 50.0 %;"
        " told 2 of 2, 100.0 %",
        "beyond the window: asked 1 of 3, 33.3 %; asked of what was heard 1 of 2, 50.0 %;"
        " told 2 of 3, 66.7 %; small talk 1 of 1, 100.0 %",
        "all: asked 1 of 4, 25.0 %; asked of what was heard 1 of 2, 50.0 %; told 2 of 4, 50.0 %;"
        " small talk 1 of 1, 100.0 %",
    ]


def test_an_answer_is_the_first_sentence_after_what_is_left_of_the_one_before():
    question, reply = "What is my cat?", "Your cat is Bella."
    turn = Turn(0.0, 1.0, "ask", question, reply, [1.2, 1.4, 1.6], key="cat", value="Bella")
    assert is_right("Your cat is Bella.", turn)
    assert is_right("nine Your cat is Bella. Your bus is nine.", turn)
    assert not is_right("Your cat is Coco. Your cat is Bella.", turn)
    assert not is_right("Your dog is Bella.", turn)


class Loudness:
    """A codec of one code a frame: its mean in hundredths, to the nearest ten."""

    def reset(self):
        pass

    def encode_block(self, pcm):
        return np.round(pcm.reshape(1, BLOCK, FRAME).mean(axis=2) * 10).astype(np.int32) * 10

    def decode_block(self, codes):
        return np.repeat(codes[0] / np.float32(100), FRAME)


@dataclass
class Steps:
    """The model's side of a talk, a little louder from frame to frame."""

    turns: list
    frame: int = 100
    probed = frozenset({"cat"})

    def stereo(self, frames, noise):
        assert not noise
        model = np.repeat(np.arange(frames, dtype=np.float32) / 410, FRAME)
        return np.stack([model, np.full_like(model, 0.9)], axis=1)


def test_answers_are_kept_as_said_as_recorded_and_as_coded(tmp_path):
    def asked(frame, key="cat", kind="ask"):
        return Turn(0.0, frame * FRAME / RATE, kind, "", "", (), key=key, value="Bella")

    talks = [
        Steps([asked(8), asked(9, "dog"), asked(10, kind="tell"), asked(40)]),
        Steps([asked(80)]),
    ]
    said = np.stack([np.arange(160) % 7, np.arange(160) % 5])[:, None] * 10
    save_clips(SimpleNamespace(new_codec=Loudness), talks, said, tmp_path, "2w", 3)
    for name, row, frame in (("0-0", 0, 8), ("0-1", 0, 40), ("1-0", 1, 80)):
        frames = np.arange(frame, frame + ANSWER)
        want = {
            "clips": frames % (7 - 2 * row) / 10,
            "recorded": frames / 410,
            "coded": np.round(frames / 41) / 10,
        }
        for side, values in want.items():
            pcm, _ = soundfile.read(tmp_path / side / f"2w-{name}_Bella.flac")
            # To 16 bits.
            np.testing.assert_allclose(
                pcm.reshape(ANSWER, FRAME).mean(axis=1), values, atol=1 / 32768
            )
    assert len(list(tmp_path.rglob("*.flac"))) == 9
    save_clips(SimpleNamespace(new_codec=Loudness), talks, said, tmp_path / "two", "2w", 2)
    assert len(list((tmp_path / "two").rglob("*.flac"))) == 6
