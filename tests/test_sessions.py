"""The verb `sessions`, and talks that go on by name through the command line."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from test_cli import FRAME, voice, write
from test_memory_session import adapter_path  # noqa: F401, a fixture
from tiny import SMALL

from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.session_store import SessionStore


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_TTT_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def transcribe(wav, out, name, *flags):
    flags = ["--hf-repo", SMALL, "--quiet", "--session", name, *flags]
    assert main(["transcribe", str(wav), str(out), *flags]) == 0


def tensors(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def held(tmp_path_factory, adapter_path):  # noqa: F811
    """A folder with a talk of 40 frames, held in one go and in two, by name and with a memory."""
    folder = tmp_path_factory.mktemp("held")
    samples = voice(40)
    parts = {"whole": samples, "first": samples[: 17 * FRAME], "second": samples[17 * FRAME :]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MOSHI_TTT_SESSIONS", str(folder / "sessions"))
        for name, part in parts.items():
            write(f"{name}.wav", part)
        for part, name in (("whole", "whole"), ("first", "halves"), ("second", "halves")):
            flags = ["--adapter-path", adapter_path, "--json", f"{part}.json"]
            transcribe(f"{part}.wav", f"{part}-out.wav", name, *flags)
    return folder


@pytest.fixture
def halves(folder, held):
    """A copy of it, and the folder to be in."""
    shutil.copytree(held, folder.parent, dirs_exist_ok=True)
    return SessionStore(folder)


def test_a_named_talk_goes_on_bit_for_bit_in_the_next_process_s_place(halves):
    a, meta_a = tensors(halves.path("whole"))
    b, meta_b = tensors(halves.path("halves"))
    assert a.keys() == b.keys() and meta_a == meta_b
    # Voice (codec), memory, window, history and key: every array of the talk.
    for name, array in a.items():
        np.testing.assert_array_equal(b[name], array, err_msg=name)
    assert any(".memory.weights." in name for name in a)
    assert any(name.startswith("codec.") for name in a)
    with open("whole.json") as whole, open("second.json") as second:
        assert json.load(whole)["words"] == json.load(second)["words"] != []


def test_list_shows_each_talk_and_why_one_cannot_be_read(halves, capsys):
    (halves.folder / "notes.txt").write_text("x")
    halves.path("bad").write_bytes(halves.path("whole").read_bytes()[:-5])
    assert main(["sessions", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:]}
    assert sorted(rows) == ["bad", "halves", "notes.txt", "whole"]
    with open("whole.json") as file:
        words = len(json.load(file)["words"])
    name, rest = rows["whole"].split(SMALL)
    assert (name.strip(), rest.split()[:2]) == ("whole", ["0:03", str(words)])
    assert " on " in rows["whole"] and "kB" in rows["whole"]
    assert "unreadable: cut short" in rows["bad"]
    assert "unreadable: not a session file" in rows["notes.txt"]


def test_json_is_the_same_for_programs(halves, capsys):
    assert main(["sessions", "list", "--json"]) == 0
    found = {info["name"]: info for info in json.loads(capsys.readouterr().out)}
    assert found["whole"]["memory"] == "on" and found["whole"]["seconds"] == pytest.approx(3.2)
    assert found["whole"]["path"] == str(halves.path("whole")) and found["whole"]["fault"] is None
    assert main(["sessions", "show", "whole", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    with open("whole.json") as file:
        assert shown["last_words"] == json.load(file)["words"][-60:]
    assert shown["layers"]["3"]["updates"] == 10 and shown["settings"]["memory"] == "on"


def test_show_tells_settings_last_words_and_memory(halves, capsys):
    assert main(["sessions", "show", "whole"]) == 0
    out = capsys.readouterr().out
    with open("whole.json") as file:
        last = json.load(file)["words"][-1]["text"]
    assert "seed 299792458" in out and last in out and "Moshi:" in out
    assert "weights" in out and [*out.splitlines()[-1].split()[:3]] == ["3", "10", "40"]


def test_rm_removes_what_is_named_and_stops_at_what_is_none(halves, capsys):
    (halves.folder / "mine.session").write_text("a diary")
    assert main(["sessions", "rm", "whole", "mine", "halves"]) == 2
    out, err = capsys.readouterr()
    assert out == "removed whole\n" and "mine.session is not a session" in err
    assert sorted(os.listdir(halves.folder)) == ["halves.session", "mine.session"]
    assert main(["sessions", "rm", "../sessions/halves"]) == 2
    assert halves.path("halves").exists()


def test_an_empty_folder_and_a_name_that_is_not_there(folder, capsys):
    assert main(["sessions", "list"]) == 0
    assert f"no sessions in {folder}" in capsys.readouterr().out
    assert main(["sessions", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["sessions", "show", "monday"]) == 2
    assert "no session 'monday'" in capsys.readouterr().err


def test_a_damaged_one_is_not_shown_but_explained(folder, capsys):
    folder.mkdir()
    (folder / "bad.session").write_bytes(b"x" * 100)
    assert main(["sessions", "show", "bad"]) == 2
    assert "the talk 'bad' cannot be resumed: not a session" in capsys.readouterr().err


def test_what_is_no_name_is_refused_before_anything_is_loaded(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["transcribe", "x.wav", "--session", "a\nb"])
    assert "argument --session: expected a session's name" in capsys.readouterr().err
