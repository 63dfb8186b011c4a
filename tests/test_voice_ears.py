"""The judge of the small voice model: words are counted right, and a clip is coded as in a talk.

What needs a recognizer's packages (`scripts/voice/ears.py` names them) is skipped without them; no test
runs a recognizer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import SMALL

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice import bank, code_clips, ears, judge_codec

from moshi_ttt_mlx import load


@pytest.fixture
def words():
    """Counting words needs packages that the tests' extra does not bring."""
    pytest.importorskip("num2words")
    pytest.importorskip("jiwer")


@pytest.mark.parametrize(
    "written, spoken",
    [
        ("Remember, my bus is 7.", "remember my bus is seven"),
        ("20", "twenty"),
        (" My room\nis TWELVE! ", "my room is twelve"),
        ("I'm fine, what\u2019s yours? O'Hara's!", "i am fine what is yours ohara is"),
        ("Good-bye.", "goodbye"),
        ("room 12a", "room twelve a"),
        ("...", ""),
    ],
)
def test_text_is_its_words(words, written, spoken):
    assert ears.normalised(written) == spoken


@pytest.mark.parametrize(
    "heard, wrong",
    [
        ("Remember my bus is 7.", 0),
        ("Remember, my boss is seven.", 1),
        ("Remember is seven", 2),
        ("Oh, remember my bus is seven now.", 2),
        ("", 5),
    ],
)
def test_words_wrong_missing_and_too_many_count(words, heard, wrong):
    assert ears.word_errors("remember my bus is seven", heard) == wrong


def test_a_clip_is_named_after_its_words(tmp_path):
    clip = bank.find(tmp_path, "af_nova", "Remember, my cat is Anna.")
    assert ears.text_of(clip) == "remember my cat is anna"


def write(path, pcm, rate=24000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, pcm, rate)


def test_some_clips_are_the_same_for_a_seed():
    clips = [Path(f"af_nova/{n}.flac") for n in range(30)]
    some = ears.some_of(clips, 5, seed=1)
    assert len(set(some)) == 5 and some == ears.some_of(clips, 5, seed=1)
    assert some != ears.some_of(clips, 5, seed=2)
    assert ears.some_of(clips, 99, seed=1) == sorted(clips)


def test_pairs_are_clips_of_the_voices_that_both_folders_hold(tmp_path):
    sides = {
        "original": ("a/six.flac", "a/ten.flac", "b/six.flac", "a/one.txt"),
        "coded": ("a/six.wav", "a/red.wav", "b/six.wav", "a/one.txt"),
    }
    for side, names in sides.items():
        for name in names:
            (tmp_path / side / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / side / name).touch()
    found = judge_codec.pairs(tmp_path / "original", tmp_path / "coded", ["a"])
    assert found == [(tmp_path / "original/a/six.flac", tmp_path / "coded/a/six.wav")]


def test_word_error_rates_are_over_all_words():
    # Differences 1, 0 and 2 less the mean's share of 4, 5 and 1 words: -0.2, -1.5, 1.7.
    found = judge_codec.word_error_rates([(0, 1), (1, 1), (0, 2)], [4, 5, 1])
    error = 100 * np.sqrt((0.04 + 2.25 + 2.89) * 3 / 2) / 10
    wanted = {"original": 10, "coded": 40, "difference": 30, "standard_error": error}
    assert found == pytest.approx(wanted)


class Loudness:
    """An ear that understands loud clips and no others."""

    name = "loudness"

    def hear(self, pcm, sample_rate):
        return "Is 7." if np.abs(pcm).max() > 0.2 else "is"


def test_judge_tells_before_from_after_and_own_from_held_out(words, tmp_path, monkeypatch, capsys):
    loud, faint = np.full(2400, 0.5), np.full(2400, 0.1)
    for voice, after in ((judge_codec.MOSHI_VOICE, loud), (judge_codec.HELD_OUT_VOICES[1], faint)):
        write(tmp_path / "original" / voice / "is-seven.flac", loud)
        write(tmp_path / "coded" / voice / "is-seven.wav", after)
    write(tmp_path / "original/af_kore/is-seven.flac", loud)
    write(tmp_path / "coded/af_kore/is-seven.flac", faint)
    monkeypatch.setattr(judge_codec, "ears", lambda whisper: [Loudness()])
    monkeypatch.setattr(judge_codec, "mos", lambda pcm, rate: {"OVRL": 2 * float(pcm[0])})
    out = tmp_path / "found.json"
    command = ["judge", str(tmp_path / "original"), str(tmp_path / "coded"), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    judge_codec.main()
    groups = json.loads(out.read_text())["groups"]
    own, held_out = groups["own voice"], groups["held-out voices"]
    assert (own["clips"], held_out["clips"], held_out["words"]) == (1, 1, 2)
    assert own["wer"]["loudness"]["difference"] == 0
    wer = held_out["wer"]["loudness"]
    assert (wer["original"], wer["coded"], wer["difference"]) == (0, 50, 50)
    assert held_out["dnsmos"]["OVRL"] == pytest.approx({"original": 1.0, "coded": 0.2}, abs=1e-3)
    assert "+50.0" in capsys.readouterr().out


@pytest.mark.parametrize("script, extra", [(judge_codec, []), (code_clips, ["out"])])
def test_folders_without_clips_are_one_line(script, extra, tmp_path, monkeypatch, capsys):
    first = str(tmp_path) if script is judge_codec else SMALL
    monkeypatch.setattr(sys, "argv", ["script", first, str(tmp_path), *extra])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert f"{tmp_path}: expected" in capsys.readouterr().err


def test_clips_are_coded_frame_by_frame_each_from_a_fresh_start(tmp_path):
    rng, codec = np.random.default_rng(0), load(SMALL).new_codec()
    sounds = {"one": rng.uniform(-0.3, 0.3, 5000), "two": rng.uniform(-0.3, 0.3, 3840)}
    for name, pcm in sounds.items():
        write(tmp_path / "in/af_nova" / f"{name}.wav", pcm)
    clips = ears.clips_in(tmp_path / "in")
    code_clips.code_clips(codec, tmp_path / "in", tmp_path / "out", clips)
    for name in sounds:
        pcm, rate = soundfile.read(tmp_path / "in/af_nova" / f"{name}.wav", dtype="float32")
        found, found_rate = soundfile.read(tmp_path / "out/af_nova" / f"{name}.flac")
        frames = np.pad(pcm, (0, -len(pcm) % 1920)).reshape(-1, 1920)
        fresh = codec.fresh()
        wanted = np.concatenate([fresh.decode(fresh.encode(frame)) for frame in frames])
        assert (len(found), found_rate) == (len(pcm), rate)
        # A step of 16 bits: what the file loses.
        np.testing.assert_allclose(found, np.clip(wanted[: len(pcm)], -1, 1), atol=1 / 32768)
