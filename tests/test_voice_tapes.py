"""The codes that the demo's model learned from, in one file."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice.remix import read_library
from voice.tapes import pack, unpack
from voice.world import KEYS

from moshi_ttt_mlx.train.data import find_shards, write_shard

TAPES = Path(__file__).parent.parent / "scripts" / "voice" / "tapes.npz"


def write_talks(folder, number, most=256):
    """A folder of talks and one of shards, of the same name."""
    talks, shards = folder / f"talks{number}", folder / f"shards{number}"
    talks.mkdir()
    rng = np.random.default_rng(number)
    for name in ("a", "b"):
        codes = rng.integers(0, most, (17, 40), np.int32)
        write_shard(shards / f"{name}.safetensors", codes, {"source": f"/elsewhere/{name}.flac"})
        notes = {"alignments": [["hello", [0, 1], "SPEAKER_MAIN"]], "turns": [{"kind": "rest"}]}
        (talks / f"{name}.json").write_text(json.dumps(notes | {"left_turns": [number]}))
    return talks, shards


def test_talks_come_out_as_they_went_in_but_for_their_words(tmp_path):
    sources = [write_talks(tmp_path, number) for number in range(2)]
    assert pack(sources, tmp_path / "tapes.npz") == 4
    assert unpack(tmp_path / "tapes.npz", tmp_path / "out") == 4
    before = [shard.codes() for _, shards in sources for shard in find_shards(shards)]
    after = find_shards(tmp_path / "out" / "shards")
    assert [shard.path.stem for shard in after] == [f"talks{n}-{x}" for n in range(2) for x in "ab"]
    for shard, codes in zip(after, before, strict=True):
        assert (shard.codes() == codes).all()
        notes = json.loads((tmp_path / "out" / "talks" / f"{shard.path.stem}.json").read_text())
        assert notes == {"turns": [{"kind": "rest"}], "left_turns": [int(shard.path.stem[5])]}


def test_a_token_that_needs_more_than_a_byte_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="beyond 255"):
        pack([write_talks(tmp_path, 0, most=400)], tmp_path / "tapes.npz")
    assert not (tmp_path / "tapes.npz").exists()


def test_the_tapes_of_the_demo_are_there(tmp_path):
    assert unpack(TAPES, tmp_path) == 770
    library = read_library([(tmp_path / "talks", tmp_path / "shards")])
    assert sum(map(len, library.told.values())) == 26_246
    assert {fact.key for fact in library.told} == set(KEYS)
    assert {len(library.words[word]) > 0 for word in library.words} == {True}
