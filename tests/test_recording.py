"""A recording on disk: right after every frame, whole after a kill, never over an older one."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_talk import SILENCE, voice
from hypothesis import given
from hypothesis import strategies as st

from moshi_ttt_mlx import recording
from moshi_ttt_mlx.audio import FRAME_SIZE
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.recording import LINE_CHARS, Recording, WordLog
from moshi_ttt_mlx.session import SpokenFrame


def frame(index, text="", pcm=None):
    return SpokenFrame(index, index * 0.08, text, text or None, None, pcm)


def only(folder, ending):
    (path,) = folder.glob(f"*{ending}")
    return path


def test_the_wav_has_moshi_left_and_the_user_right_step_by_step(tmp_path):
    with_sound = Recording(tmp_path)
    with_sound.take(frame(7), voice(0.25), "moshi")
    with_sound.take(frame(8, pcm=voice(0.5)), SILENCE, "moshi")
    sound, rate = soundfile.read(only(tmp_path, ".wav"), dtype="float32")  # not closed
    assert rate == 24000
    assert np.array_equal(sound[:, 0], np.concatenate([SILENCE, voice(0.5)]))
    assert np.array_equal(sound[:, 1], np.concatenate([voice(0.25), SILENCE]))
    with_sound.close()


def test_words_have_the_times_of_the_wav_and_are_on_disk_within_a_second(tmp_path):
    one = Recording(tmp_path)
    said = {100: " Hel", 101: "lo", 103: " there"}
    for index in range(100, 116):
        one.take(frame(index, said.get(index, "")), SILENCE, "moshi")
        text = only(tmp_path, ".txt").read_text()
        if index == 102:
            assert text == ""  # it may go on
        if index == 103:
            assert text == "0:00.0 moshi: Hello"
    assert text == "0:00.0 moshi: Hello there"
    one.close()
    assert only(tmp_path, ".txt").read_text() == "0:00.0 moshi: Hello there\n"


def test_words_that_came_late_have_the_time_of_their_sound_and_stay_whole(tmp_path):
    one = Recording(tmp_path)
    said = {20: " Hel", 25: "lo", 40: " there"}
    for index in range(60):
        one.take(frame(index, " x" if index == 24 else ""), SILENCE, "moshi")
        one.write(said.get(index, ""), index * 0.08 - 2.5, "user")  # 2.5 s late
    one.close()
    lines = only(tmp_path, ".txt").read_text().splitlines()
    assert lines == ["0:01.9 moshi: x", "0:00.0 user: Hello there"]


def test_words_without_a_frame_are_no_recording(tmp_path):
    one = Recording(tmp_path)
    one.write(" late", 0.0, "user")
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_an_older_recording_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(recording.time, "strftime", lambda text: "talk-x")
    (tmp_path / "talk-x-3.txt").write_text("words alone")
    for n in range(3):
        one = Recording(tmp_path)
        one.take(frame(0, f" w{n}"), voice(n / 8), "moshi")
        one.close()
    texts = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert texts == {
        "talk-x.txt": "0:00.0 moshi: w0\n",
        "talk-x-2.txt": "0:00.0 moshi: w1\n",
        "talk-x-3.txt": "words alone",
        "talk-x-4.txt": "0:00.0 moshi: w2\n",
    }


@pytest.mark.parametrize("name", ["file", "new.wav", "nowhere/talks"])
def test_only_a_folder_will_do(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=name.split("/")[0]):
        Recording(tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_is_one_line_and_what_is_there_stays(tmp_path, monkeypatch):
    one = Recording(tmp_path)
    one.take(frame(0, " kept"), voice(0.5), "moshi")
    one.settle()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recording.os, "write", full)
    one.take(frame(1, " lost"), voice(0.5), "moshi")
    with pytest.raises(UserError, match=r"talk-.*\.txt: cannot write the words: No space left"):
        one.settle()
    assert only(tmp_path, ".txt").read_text() == "0:00.0 moshi: kept"
    assert soundfile.info(only(tmp_path, ".wav")).frames == 2 * FRAME_SIZE


# ---- the log


def lines(tmp_path, *words):
    """What a log makes of (text, seconds, speaker)."""
    log = WordLog(tmp_path / "log")
    for text, time, speaker in words:
        log.add(text, time, speaker)
    log.close()
    return (tmp_path / "log").read_text().splitlines()


def test_a_line_ends_with_a_pause_another_speaker_or_its_length(tmp_path):
    assert lines(
        tmp_path,
        (" one", 1.0, "moshi"),
        (" two", 1.5, "moshi"),
        (" late", 119.96, "moshi"),
        (" yes", 121.0, "user"),
        (" so", 121.5, "moshi"),
    ) == ["0:01.0 moshi: one two", "2:00.0 moshi: late", "2:01.0 user: yes", "2:01.5 moshi: so"]


def test_a_word_is_over_a_while_after_its_latest_piece(tmp_path):
    log = WordLog(tmp_path / "log")
    log.add(" un", 1.0, "moshi")
    log.add("til", 2.0, "moshi")
    log.settle(1.5)
    assert (tmp_path / "log").read_text() == ""
    log.settle(2.5)
    assert (tmp_path / "log").read_text() == "0:01.0 moshi: until"
    log.add(" now", 4.0, "moshi")  # two seconds after the latest piece: no pause yet
    log.close()
    assert (tmp_path / "log").read_text() == "0:01.0 moshi: until now\n"


def test_a_word_is_whole_though_another_speaks_meanwhile(tmp_path):
    assert lines(
        tmp_path,
        (" Hel", 1.0, "moshi"),
        (" yes", 1.1, "user"),
        ("lo", 1.2, "moshi"),
        (" you", 1.3, "moshi"),
    ) == ["0:01.0 moshi: Hello", "0:01.1 user: yes", "0:01.3 moshi: you"]


@given(st.lists(st.tuples(st.sampled_from([" a", "b", " \u00e9", "."]), st.booleans())))
def test_every_character_is_kept_once_and_in_a_speaker_s_order(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("log")
    said = {"moshi": "", "user": ""}
    words = []
    for n, (text, is_user) in enumerate(pieces):
        speaker = "user" if is_user else "moshi"
        said[speaker] += text
        words.append((text, n * 0.1, speaker))
    kept = {"moshi": "", "user": ""}
    for line in lines(folder, *words):
        _, speaker, text = line.split(" ", 2)
        assert len(text) <= LINE_CHARS + len(pieces)
        kept[speaker.rstrip(":")] += text.replace(" ", "")
    assert kept == {name: text.replace(" ", "") for name, text in said.items()}


# ---- kill -9

TALK = """
import sys, time
import numpy as np
from moshi_ttt_mlx.keep import Keeper
sys.path.append("tests")
from fake_talk import FakeSession, voice

session = FakeSession()
keeper = Keeper("talks", {"txt": "whole.txt"}, print)
keeper.begin(session)
while True:
    user = voice(session.frame % 8 / 8)
    keeper.put(session.step(user), user)
    # All but these have come to the disk's thread, which is busy with the last one of them.
    print(session.frame - keeper._frames.qsize() - 1, flush=True)
    time.sleep(0.02)
"""


def test_kill_9_leaves_all_but_the_last_second(tmp_path):
    root = Path(__file__).resolve().parent.parent
    code = TALK.replace('"tests"', repr(str(root / "tests")))
    talk = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.append({str(root)!r}); {code}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    frames, whole = 0, tmp_path / "whole.txt"
    while frames < 120 or not whole.exists():
        frames = int(talk.stdout.readline())
    talk.send_signal(signal.SIGKILL)
    talk.wait(120)
    frames = int(([frames, *talk.stdout.read().split()])[-1])
    sound, rate = soundfile.read(only(tmp_path / "talks", ".wav"), dtype="float32")
    second = round(rate / FRAME_SIZE)
    assert frames <= len(sound) // FRAME_SIZE and len(sound) % FRAME_SIZE == 0
    user = sound[:, 1].reshape(-1, FRAME_SIZE)
    assert np.array_equal(user[:, 0], np.arange(len(user)) % 8 / 8)
    words = only(tmp_path / "talks", ".txt").read_text().replace("\n", " ").split()
    words = [word for word in words if word.startswith("w")]
    assert words == [f"w{n}" for n in range(len(words))] and len(words) >= frames - second
    said = whole.read_text().split()
    assert said == [f"w{n}" for n in range(len(said))] != []
