"""`moshi-ttt-mlx demo` from the recording to the files, with tiny models in processes of their own."""

import contextlib
import functools
import io
import json
import os

import mlx.core as mx
import numpy as np
import pytest
import soundfile
import tiny
from demo_talk import FRAMES, write_talk

from moshi_ttt_mlx import MemoryConfig, Session, load
from moshi_ttt_mlx.audio import iter_frames
from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.demo import turns
from moshi_ttt_mlx.demo.record import Record
from moshi_ttt_mlx.demo.runs import Runs
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.surgery import add_memory, save_adapter
from moshi_ttt_mlx.train.plots import can_plot

SIDES = ("with memory", "without memory")


def demo(*argv, status=0):
    """Run the verb; what it wrote to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["demo", *map(str, argv)]) == status
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    return write_talk(tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.tiny_moshi(tmp_path_factory.mktemp("model") / "moshi", context=20))


def adapter(model, folder, gate):
    mx.random.seed(2)
    config = MemoryConfig(layers="top:1", heads=2, head_dim=8, hidden=16, mini_batch=4)
    memory = add_memory(load(model).lm, config)
    for layer in memory.memories.values():
        layer.gate = gate * mx.random.normal(layer.gate.shape)
    save_adapter(memory, folder)
    return str(folder)


@pytest.fixture(scope="module")
def open_memory(model, tmp_path_factory):
    return adapter(model, tmp_path_factory.mktemp("open"), 3.0)


@pytest.fixture(scope="module")
def held(talk, model, open_memory, tmp_path_factory):
    """One run with a memory that does something: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("held") / "out"
    flags = ["--model", model, "--adapter-path", open_memory, "--out", folder]
    return folder, *demo("--recording", talk, *flags)


def words_of(folder, speaker):
    words = json.loads((folder / "transcript.json").read_text())["words"]
    return [word for word in words if word["speaker"] == speaker]


@pytest.mark.parametrize("side, mode", [(SIDES[0], "on"), (SIDES[1], "off")])
def test_each_run_is_the_session_of_its_own(side, mode, held, talk, model, open_memory):
    """The codec hears once, in another process: words and sound are those of a session, bit for bit."""
    session = Session(load(model, adapter_path=open_memory), temp=0, memory=mode)
    with iter_frames(talk) as frames:
        spoken = [session.step(pcm) for pcm in frames]
    replies = np.concatenate([one.pcm for one in spoken if one.pcm is not None])
    sound, _ = soundfile.read(held[0] / f"{side.replace(' ', '_')}.wav", always_2d=True)
    np.testing.assert_array_equal(
        np.rint(np.clip(replies, -1, 32767 / 32768) * 32768), sound[: len(replies), 0] * 32768
    )
    said = [(word["text"], word["start"]) for word in words_of(held[0], side)]
    assert said == [(word.text, word.start) for word in session.transcript.words] != []


def test_the_memory_makes_a_difference(held):
    on, off = ([word["text"] for word in words_of(held[0], side)] for side in SIDES)
    assert on != off


def test_all_files_are_there_and_named(held):
    folder, out, _ = held
    names = {path.name for path in folder.iterdir()}
    wanted = {f"transcript.{kind}" for kind in ("txt", "json", "srt")}
    wanted |= {"with_memory.wav", "without_memory.wav"}
    assert names == wanted | ({"demo.png"} if can_plot() else set())
    assert all(name in out for name in names)


def test_the_talk_is_printed_at_80_columns_without_a_bar(held):
    _, out, err = held
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    assert "You: What is my cat?" in out and "wrong" in out
    assert "real time, a window is 20 frames, 1.6 s" in out
    assert err == ""


def test_a_shut_memory_says_the_same_and_without_matplotlib_the_rest_is_written(
    talk, model, tmp_path, monkeypatch
):
    monkeypatch.setattr("moshi_ttt_mlx.train.plots.can_plot", lambda: False)
    shut, folder = adapter(model, tmp_path / "shut", 0.0), tmp_path / "out"
    out, _ = demo("--recording", talk, "--model", model, "--adapter-path", shut, "--out", folder)
    on, off = ([(w["text"], w["start"]) for w in words_of(folder, side)] for side in SIDES)
    assert on == off != []
    sounds = [(folder / f"{side.replace(' ', '_')}.wav").read_bytes() for side in SIDES]
    assert sounds[0] == sounds[1]
    assert "no demo.png: pip install matplotlib" in out and not (folder / "demo.png").exists()


def test_without_a_memory_one_run_is_held_and_ctrl_c_keeps_it(talk, model, tmp_path, monkeypatch):
    take = Record.take

    def interrupted(self, step):
        if step.spoken.index == 30:
            raise KeyboardInterrupt
        return take(self, step)

    monkeypatch.setattr(Record, "take", interrupted)
    out, _ = demo("--recording", talk, "--model", model, "--out", tmp_path / "out")
    assert "has no memory: one run only" in out and "interrupted: keeping" in out
    sound, _ = soundfile.read(tmp_path / "out" / "moshi.wav", always_2d=True)
    assert len(sound) == 30 * 1920 < FRAMES * 1920
    assert "You: Remember," in (tmp_path / "out" / "transcript.txt").read_text()


def test_refusals_are_one_line(talk, model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "alone.flac").write_bytes(talk.read_bytes())
    (tmp_path / "gone.json").write_bytes(talk.with_suffix(".json").read_bytes())
    stt = tiny.tiny_stt(tmp_path / "stt")
    monkeypatch.setattr(turns, "BUNDLED", tmp_path / "demo_talk.flac")
    for argv, message in [
        ([], f"the bundled recording {tmp_path / 'demo_talk.flac'} is missing"),
        (["--recording", tmp_path / "alone.flac"], "alone.json: expected what is said"),
        (["--recording", tmp_path / "gone.flac"], "found no such file"),
        (["--recording", talk, "--out", tmp_path / "file"], "cannot make the folder"),
        (["--recording", talk, "--out", tmp_path, "--model", stt], "only writes"),
        (["--recording", talk, "--out", tmp_path, "--model", model, "--temp", -1], "temp must be"),
    ]:
        _, err = demo(*argv, status=2)
        assert message in err and len(err.splitlines()) == 1


def broken():
    raise KeyError("what")


@pytest.mark.parametrize(
    "load_model, error, message",
    [
        (functools.partial(os._exit, 1), UserError, "'Moshi' was ended from outside"),
        (broken, RuntimeError, "KeyError: 'what'"),
    ],
)
def test_a_process_that_fails_is_told_of(load_model, error, message):
    class Ear:
        def encode(self, pcm):
            return np.zeros(8, np.int32)

    with Runs(load_model, {"Moshi": {}}) as runs, pytest.raises(error, match=message):
        list(runs.hear(Ear(), [np.zeros(1920, np.float32)] * 100))
