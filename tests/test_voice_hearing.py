"""What a model understands of a voice, counted word by word."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice import hearing
from voice.remix import SIMILAR, Remix, dictation, read_library
from voice.tapes import unpack
from voice.world import ALL_VALUES, KEYS

from moshi_ttt_mlx import load

TAPES = Path(__file__).parent.parent / "scripts" / "voice" / "tapes.npz"


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def dictated(tmp_path_factory):
    """Four talks of words that voices of the training dictate, as they were heard."""
    folder = tmp_path_factory.mktemp("tapes")
    unpack(TAPES, folder)
    library, talks = read_library([(folder / "talks", folder / "shards")]), []
    for seed in range(4):
        talk = Remix(library, random.Random(seed), np.zeros((256, SIMILAR), np.int32), wear=0)
        dictation(talk, 192)
        talks.append(talk.codes(192))
    return talks


def test_the_demos_model_writes_down_what_it_hears(demo, dictated):
    found = hearing.shares(demo, dictated)
    assert {name: many > 10 for name, (_, many) in found.items()} == {"keys": True, "values": True}
    assert {name: right > 0.9 * many for name, (right, many) in found.items()} == {
        "keys": True,
        "values": True,
    }
    # The words come from what the users say: beside other users they are not known.
    swapped = [np.concatenate([talk[:9], dictated[i - 1][9:]]) for i, talk in enumerate(dictated)]
    for right, many in hearing.shares(demo, swapped).values():
        assert right < 0.3 * many


def test_a_words_share_is_of_the_places_where_it_is_said(demo, monkeypatch):
    (key, other), (value, wrong) = (
        hearing.tokens_of(demo, words[:2]).tolist() for words in (KEYS, ALL_VALUES)
    )
    said = np.array([[3, key, 0, value], [other, value, 3, 3], [key, 3, 3, value]])
    guessed = np.array([[key, key, 0, wrong], [key, value, 3, 3], [key, 3, value, value]])
    rows = [(said[:2], guessed[:2]), (said[2:], guessed[2:])]
    monkeypatch.setattr(hearing, "BATCH", 2)
    monkeypatch.setattr(hearing, "written", lambda model, codes: rows[codes[0, 0, 0] // 2])
    talks = [np.full((17, 4), number) for number in range(3)]
    assert hearing.shares(demo, talks) == {"keys": (2, 3), "values": (2, 3)}
