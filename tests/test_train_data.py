"""Talks in moshi-finetune's format become shards; what cannot is named and left out."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from hypothesis import given
from hypothesis import strategies as st

from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.model import load
from moshi_ttt_mlx.train import data
from moshi_ttt_mlx.train.interleave import Word, main_words, text_stream
from moshi_ttt_mlx.train.tokenize import BLOCK, read_manifest, tokenize_manifest

RATE = 24_000
MAIN = "SPEAKER_MAIN"


class Letters:
    """A tokenizer whose tokens are the letters."""

    @staticmethod
    def encode(text):
        return [ord(letter) for letter in text]


def letters(tokens):
    return "".join({0: "<", 3: "."}.get(token, chr(max(token, 32))) for token in tokens)


def laid_out(words, frames=12):
    """A text stream as letters: `.` padding, `<` its end."""
    stream = text_stream([Word(*word) for word in words], Letters, frames)
    return letters(stream.tokens), stream.lost


# -- the text stream -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "stream", "lost"),
    [
        ([], "............", 0),
        ([("ab", 0.0, 0.5)], "ab..........", 0),
        ([("ab", 0.16, 0.5)], ".<ab........", 0),
        ([("ab", 0.239, 0.5)], ".<ab........", 0),  # the frame in which it starts
        ([("ab", 0.241, 0.5)], "..<ab.......", 0),
        ([("ab", 0.16, 0.2), ("c", 0.4, 0.5)], ".<ab<c......", 0),
        ([("ab", 0.16, 0.2), ("c", 0.33, 0.5)], ".<abc.......", 0),  # no padding between
        ([("abcd", 0.16, 0.2), ("e", 0.33, 0.5)], ".<abe.......", 2),  # cut short
        ([("ab", 0.16, 0.2), ("c", 0.17, 0.5)], ".<c.........", 2),  # two in one frame
        ([("abcd", 0.8, 0.9)], ".........<ab", 2),
    ],
)
def test_words_are_laid_out_as_moshi_finetune_does(words, stream, lost):
    assert laid_out(words) == (stream, lost)


def test_only_the_main_speaker_and_sorted_by_start():
    alignments = [
        ["b", [1.0, 1.2], MAIN],
        ["x", [0.5, 0.7], "SPEAKER_00"],
        ["a", [0.2, 0.4], MAIN],
        ["no time", [0.3, 0.3], MAIN],
    ]
    assert [word.text for word in main_words(alignments, 2.0)] == ["a", "b"]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (["a", [float("nan"), 1.0], MAIN], "has times"),
        (["a", [0.0, float("inf")], MAIN], "has times"),
        (["a", [-0.1, 0.5], MAIN], "outside"),
        (["a", [1.0, 3.1], MAIN], "outside"),
        (["a", [0.0, 0.5]], "expected"),
        (["a", ["0", "1"], MAIN], "expected"),
        ([5, [0.0, 0.5], MAIN], "expected"),
        ("a", "expected"),
        (["a", [0.0, 0.5], "SPEAKER_01"], "no word is of SPEAKER_MAIN"),
    ],
)
def test_impossible_words_are_refused(entry, why):
    with pytest.raises(UserError, match=why):
        main_words([entry], 2.0)


def test_a_little_past_the_end_is_fine():
    assert main_words([["a", [1.5, 2.9], MAIN]], 2.0)


times = st.floats(0, 3)


@given(st.lists(st.tuples(st.text("ab", max_size=6), times, times), max_size=8))
def test_nothing_is_invented(words):
    words = sorted((w for w in words if w[1] < w[2]), key=lambda w: w[1])
    stream, lost = laid_out(words, frames=30)
    said = [c for c in stream if c not in ".<"]
    assert len(said) + lost == sum(len(word) for word, start, _ in words if start * 12.5 < 30)
    for before, after in pairwise(stream):
        # The end of padding, and only that, comes before a word after padding.
        assert (before == "<") == (before in ".<" and after in "ab")


# -- shards ----------------------------------------------------------------------------------------


def test_a_shard_keeps_its_tokens(tmp_path):
    codes = np.random.default_rng(0).integers(0, 2**17, (5, 9)).astype(np.int32)
    data.write_shard(tmp_path / "sub" / "a.safetensors", codes, {"source": "a.wav"})
    (shard,) = data.find_shards(tmp_path)
    assert (shard.name, shard.streams, shard.frames) == ("a.wav", 5, 9)
    np.testing.assert_array_equal(shard.codes(), codes)
    assert list((tmp_path / "sub").iterdir()) == [shard.path]


def test_what_is_no_shard_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        data.find_shards(tmp_path / "none")
    with pytest.raises(UserError, match="holds no shards"):
        data.find_shards(tmp_path)
    path = tmp_path / "a.safetensors"
    data.write_shard(path, np.zeros((5, 900), np.int32), {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a whole shard"):
        data.find_shards(tmp_path)


def test_another_models_shards_are_refused(tmp_path):
    cfg = tiny_lm_config()
    data.write_shard(tmp_path / "a.safetensors", np.zeros((17, 4), np.int32), {})
    shards = data.find_shards(tmp_path)
    data.check_shards(shards, cfg)
    cfg.audio_codebooks = 4
    with pytest.raises(UserError, match="17 streams, the model has 5"):
        data.check_shards(shards, cfg)


def test_tokens_of_another_vocabulary_are_refused():
    cfg = tiny_lm_config()
    good = np.full((17, 3), data.NOTHING)
    first = np.array([[0, cfg.text_out_vocab_size], [3, cfg.audio_vocab_size - 1]])
    for stream, token in first - [0, 1]:
        good[stream, :2] = token, data.unlearned(token)
    data.check_codes(good, cfg, "a")
    for stream, token in [*first, *((stream, data.unlearned(token)) for stream, token in first)]:
        bad = good.copy()
        bad[stream, 1] = token
        with pytest.raises(UserError, match="a: tokens that this model does not have"):
            data.check_codes(bad, cfg, "a")


def tiny_lm_config():
    from moshi_mlx.models import LmConfig

    return LmConfig.from_config_dict(tiny.moshi_config())


# -- from sound ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(tiny.tiny_moshi(tmp_path_factory.mktemp("model") / "moshi"))


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


def sound(seconds, seed=0, rate=RATE, channels=2):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((round(seconds * rate), channels))).astype(np.float32)


def add_talk(folder: Path, name, samples=None, alignments=(), rate=RATE, transcript=None):
    """Write a talk's sound and transcript, and its row into the manifest."""
    (folder / "stereo").mkdir(exist_ok=True)
    path = folder / "stereo" / f"{name}.wav"
    samples = sound(1.0) if samples is None else samples
    soundfile.write(path, samples, rate, subtype="FLOAT")
    text = json.dumps({"alignments": list(alignments)}) if transcript is None else transcript
    path.with_suffix(".json").write_text(text)
    with (folder / "talks.jsonl").open("a") as manifest:
        row = {"path": f"stereo/{name}.wav", "duration": len(samples) / rate}
        manifest.write(json.dumps(row) + "\n")
    return path


def test_left_is_moshi_right_the_user_text_on_top(model, tmp_path):
    samples = sound(1.0)
    add_talk(tmp_path, "a", samples, [["hello", [0.32, 0.6], MAIN]])
    summary = tokenize_manifest(tmp_path / "talks.jsonl", tmp_path / "out", model)
    assert (summary.written, summary.present, summary.skipped) == (1, 0, [])
    (shard,) = data.find_shards(tmp_path / "out")
    codes = shard.codes()
    assert codes.shape == (17, 13)  # 12.5 frames: the last is filled up
    data.check_codes(codes, model.lm.cfg, "a")
    words = text_stream([Word("hello", 0.32, 0.6)], model.tokenizer, 13).tokens
    np.testing.assert_array_equal(codes[0], words)
    padded = np.pad(samples, ((0, 13 * 1920 - len(samples)), (0, 0)))
    for channel, streams in ((0, codes[1:9]), (1, codes[9:])):
        codec = model.new_codec()
        heard = [codec.encode(frame) for frame in padded[:, channel].reshape(13, 1920)]
        np.testing.assert_array_equal(streams, np.stack(heard, axis=1))


def test_a_talk_of_several_blocks_has_the_codes_of_its_frames(model, tmp_path):
    frames = 2 * BLOCK + 3
    samples = sound(frames * 0.08, seed=3)
    add_talk(tmp_path, "a", samples)
    tokenize_manifest(tmp_path / "talks.jsonl", tmp_path / "out", model)
    (shard,) = data.find_shards(tmp_path / "out")
    codec = model.new_codec()
    codec.reset()
    heard = [codec.encode(frame) for frame in samples[:, 1].reshape(frames, 1920)]
    np.testing.assert_array_equal(shard.codes()[9:], np.stack(heard, axis=1))


def test_a_talk_is_heard_from_its_start_whatever_came_before(model, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    add_talk(tmp_path / "two", "a", sound(0.8, seed=1))
    for name in ("one", "two"):
        add_talk(tmp_path / name, "b", sound(0.8, seed=2))
        tokenize_manifest(tmp_path / name, tmp_path / f"{name}.out", model)
    alone, after = (data.find_shards(tmp_path / f"{name}.out")[-1] for name in ("one", "two"))
    assert Path(alone.name).name == Path(after.name).name == "b.wav"
    np.testing.assert_array_equal(after.codes(), alone.codes())


def test_another_rate_is_resampled(model, tmp_path):
    add_talk(tmp_path, "a", sound(1.0, rate=44_100), rate=44_100)
    tokenize_manifest(tmp_path, tmp_path / "out", model)
    assert data.find_shards(tmp_path / "out")[0].frames == 13


def test_bad_rows_are_named_and_left_out(model, tmp_path):
    add_talk(tmp_path, "good")
    add_talk(tmp_path, "mono", sound(0.5, channels=1))
    add_talk(tmp_path, "gone").unlink()
    add_talk(tmp_path, "silent_json").with_suffix(".json").unlink()
    add_talk(tmp_path, "broken_json", transcript='{"alignments": [')
    add_talk(tmp_path, "other_json", transcript="[1, 2]")
    add_talk(tmp_path, "outside", alignments=[["hi", [5.0, 6.0], MAIN]])
    add_talk(tmp_path, "nan_time", transcript='{"alignments": [["hi", [NaN, 0.5], "x"]]}')
    samples = sound(0.5)
    samples[77, 1] = np.nan
    add_talk(tmp_path, "nan_sound", samples)
    add_talk(tmp_path, "empty", sound(0.0))
    add_talk(tmp_path, "text").write_text("no sound at all")
    with (tmp_path / "talks.jsonl").open("a") as manifest:
        manifest.write('{"path": 5}\n{"path": \n\n')
    summary = tokenize_manifest(tmp_path, tmp_path / "out", model)
    assert summary.written == 1
    why = {where.partition("(")[2].removesuffix(".wav)"): text for where, text in summary.skipped}
    expected = {
        "mono": "expected 2",
        "gone": "no file",
        "silent_json": "no file",
        "broken_json": "not JSON",
        "other_json": "alignments",
        "outside": "outside",
        "nan_time": "times nan",
        "nan_sound": "NaN",
        "empty": "no sound",
        "text": "not a sound file",
    }
    assert expected.keys() == why.keys() - {""}
    for name, part in expected.items():
        assert part in why[name], name
    assert [where for where, _ in summary.skipped[:2]] == ["talks.jsonl:12", "talks.jsonl:13"]
    assert summary.lines()[-1].endswith("12 skipped")


def test_a_second_run_goes_on_where_the_first_stopped(model, tmp_path):
    add_talk(tmp_path, "a")
    first = add_talk(tmp_path, "b", sound(0.4, seed=1))
    heard = []
    out = tmp_path / "out"
    tokenize_manifest(tmp_path, out, model)
    broken, kept = sorted(out.iterdir())
    broken.write_bytes(broken.read_bytes()[:-4])  # killed while writing, on a bad disk
    before = kept.stat().st_mtime_ns
    summary = tokenize_manifest(tmp_path, out, model, heard.append)
    assert (summary.written, summary.present) == (1, 1)
    assert kept.stat().st_mtime_ns == before
    assert sum(heard) == pytest.approx(13 * 0.08 + 0.4)
    # A talk that has changed is tokenized again.
    soundfile.write(first, sound(0.8, seed=2), RATE)
    assert tokenize_manifest(tmp_path, out, model).written == 1


def test_a_manifest_that_is_none(tmp_path):
    with pytest.raises(UserError, match="without a "):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="jsonl manifest"):
        read_manifest(tmp_path / "none.jsonl")


def test_from_the_command_line(model_folder, tmp_path, capfd):
    add_talk(tmp_path, "a")
    add_talk(tmp_path, "mono", sound(0.5, channels=1))
    argv = ["tokenize", str(tmp_path), "--out", str(tmp_path / "out"), "--hf-repo", model_folder]
    assert main(argv) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "skipped talks.jsonl:2 (mono.wav): 1 channel(s)" in err
    assert "1 talks tokenized (0.00 h), 0 were there already, 1 skipped" in err


def test_not_one_usable_talk_is_an_error(model_folder, tmp_path, capfd):
    add_talk(tmp_path, "mono", sound(0.5, channels=1))
    argv = ["tokenize", str(tmp_path), "--out", str(tmp_path / "out"), "--hf-repo", model_folder]
    assert main(argv) == 2
    assert capfd.readouterr().err.splitlines()[-1].endswith("not one usable talk")
