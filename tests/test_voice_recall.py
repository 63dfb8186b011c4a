"""How answers are counted; the talks themselves are in test_voice_talks.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice.recall import Answer, is_right, table, was_heard
from voice.talks import Turn


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
