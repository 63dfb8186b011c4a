"""What a talk leaves on disk: sound as it was heard, words at most seconds old, faults told once."""

import json
import threading

import numpy as np
import pytest
import soundfile
from fake_talk import SILENCE, FakeSession, voice

from moshi_ttt_mlx import keep
from moshi_ttt_mlx.audio import FRAME_SIZE
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.keep import Keeper
from moshi_ttt_mlx.session import SpokenFrame


def spoken(index, piece=None, pcm=None, text=""):
    return SpokenFrame(index, index * 0.08, text, piece, None, pcm)


@pytest.fixture
def warnings():
    return []


def begun(record, transcripts, warnings, session=None):
    keeper = Keeper(record, transcripts, warnings.append)
    keeper.begin(session or FakeSession())
    return keeper


def files(folder):
    """The wav and the words of the one recording in a folder."""
    (sound,) = folder.glob("talk-*.wav")
    return sound, sound.with_suffix(".txt")


def test_a_recording_goes_into_its_folder(tmp_path, warnings):
    keeper = begun(tmp_path / "talks", {}, warnings)
    keeper.put(spoken(0), voice(0.25))  # nothing said yet
    keeper.put(spoken(1, pcm=voice(0.5)), SILENCE)
    keeper.close()
    sound, _ = soundfile.read(files(tmp_path / "talks")[0], dtype="float32")
    expected = np.concatenate(
        [np.stack([SILENCE, voice(0.25)]), np.stack([voice(0.5), SILENCE])], 1
    )
    assert np.array_equal(sound.T, expected) and warnings == []


def test_every_format_is_written_and_goes_on_from_earlier_words(tmp_path, warnings):
    session = FakeSession()
    session.step(SILENCE)
    paths = {kind: tmp_path / f"talk.{kind}" for kind in ("txt", "json", "srt", "vtt")}
    keeper = begun(None, paths, warnings, session)
    keeper.put(spoken(1, "\u2581hel"), SILENCE)
    keeper.put(spoken(2, "lo"), SILENCE)
    keeper.close()
    assert paths["txt"].read_text() == "w0 hello\n"
    words = json.loads(paths["json"].read_text())["words"]
    assert [(w["text"], w["start"], w["speaker"]) for w in words] == [
        ("w0", 0.0, "moshi"),
        ("hello", 0.08, "moshi"),
    ]
    assert "00:00:00,000 -->" in paths["srt"].read_text()
    assert paths["vtt"].read_text().startswith("WEBVTT")


def test_a_crash_finds_the_words_on_disk(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(keep, "REWRITE_SECONDS", 0.05)
    path = tmp_path / "talk.txt"
    keeper = begun(tmp_path / "talks", {"txt": path}, warnings)
    keeper.put(spoken(0, "\u2581said", voice(0.5), " said"), SILENCE)
    # Never closed. `_frames` empty and a rewrite later the word must be there.
    tick = threading.Event()
    sound, words = files(tmp_path / "talks")
    for _ in range(40 * 120):
        if path.exists() and path.read_text() == "said\n" and words.read_text():
            break
        tick.wait(0.025)
    assert path.read_text() == "said\n"
    assert soundfile.info(sound).frames == FRAME_SIZE
    # No frame came after it, so the keeper itself wrote the word that was begun.
    assert words.read_text() == "0:00.0 moshi: said"
    keeper.close()


def test_the_session_s_own_transcript_is_left_alone(tmp_path, warnings):
    session = FakeSession()
    keeper = begun(None, {"txt": tmp_path / "t.txt"}, warnings, session)
    keeper.put(spoken(0, "\u2581x"), SILENCE)
    keeper.close()
    assert session.transcript.words == []


def test_a_full_disk_is_told_once_and_the_words_go_on(tmp_path, warnings, monkeypatch):
    keeper = Keeper(tmp_path / "talks", {"txt": tmp_path / "talk.txt"}, warnings.append)

    def full(*_):
        raise UserError("talk.wav: no space left after 0.0 s.")

    monkeypatch.setattr(keeper._recording, "take", full)
    keeper.begin(FakeSession())
    for index in range(3):
        keeper.put(spoken(index, f"\u2581w{index}", voice()), SILENCE)
    keeper.close()
    assert warnings == ["talk.wav: no space left after 0.0 s. The talk goes on unrecorded."]
    assert (tmp_path / "talk.txt").read_text() == "w0 w1 w2\n"


def test_a_transcript_that_cannot_be_written_is_told_once(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(keep, "REWRITE_SECONDS", 0.0)
    paths = {"txt": tmp_path / "gone" / "t.txt", "srt": tmp_path / "t.srt"}
    keeper = begun(None, paths, warnings)
    for index in range(3):
        keeper.put(spoken(index, "\u2581x"), SILENCE)
    keeper.close()
    assert len(warnings) == 1 and "gone" in warnings[0]
    assert "x x x" in paths["srt"].read_text()


def test_a_disk_that_hangs_costs_no_memory_and_is_told_once(warnings, monkeypatch):
    monkeypatch.setattr(keep, "WAITING_FRAMES", 2)
    keeper = Keeper(None, {}, warnings.append)  # never begun: nobody takes the frames
    for index in range(10):
        keeper.put(spoken(index), SILENCE)
    assert len(warnings) == 1 and "does not keep up" in warnings[0]
    keeper.close()


def test_a_recording_that_cannot_be_made_is_refused_at_once(tmp_path, warnings):
    with pytest.raises(UserError, match="nowhere"):
        Keeper(tmp_path / "nowhere" / "talks", {}, warnings.append)


def test_a_talk_that_never_began_leaves_no_recording(tmp_path, warnings):
    Keeper(tmp_path / "talks", {}, warnings.append).close()
    assert list((tmp_path / "talks").iterdir()) == []
