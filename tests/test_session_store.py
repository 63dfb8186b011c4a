"""Named talks in a folder: what a name may be, what files say of themselves, what is never touched."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_session import sound, talk
from tiny import SMALL

from moshi_ttt_mlx import Session, UserError, load, session_store
from moshi_ttt_mlx.session_store import SessionStore, session_label, session_path


@pytest.fixture(scope="module")
def model():
    return load(SMALL)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "sessions").mkdir()
    return SessionStore(tmp_path / "sessions")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The bytes of a session of 20 frames, and the session."""
    path = tmp_path_factory.mktemp("s") / "x.session"
    one = Session(model, seed=7, temp=0)
    talk(one, sound(20))
    one.save(path)
    return path.read_bytes(), one


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_meta(data, **changes):
    """A session file whose metadata says something else."""
    header, rest = header_of(data)
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


# ---- names and places


@pytest.mark.parametrize("name", ["monday", "a b", "2026-11-25", "Grüße", "v1.2", "x_y"])
def test_a_name_is_a_file_in_the_folder(store, name):
    assert store.path(name) == store.folder / f"{name}.session"
    assert store.path(f"{name}.session") == store.path(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        ".hidden",
        "-x",
        "a\nb",
        "a\n",
        "a\0b",
        "a.",
        "a\\b",
        "~",
        "$HOME",
        "x" * 201,
        "ü" * 101,
        " a",
        "a ",
        "a.session.session.",
    ],
)
def test_what_is_no_name_is_refused(store, name):
    with pytest.raises(UserError, match="a session's name"):
        store.path(name)


@given(st.text(max_size=30))
def test_no_text_leads_out_of_the_folder(text):
    store = SessionStore("/a/folder")
    try:
        path = store.path(text)
    except UserError:
        return
    assert os.path.dirname(os.path.normpath(path)) == "/a/folder"


@pytest.mark.parametrize(
    ("platform", "env", "end"),
    [
        ("linux", {"MOSHI_TTT_SESSIONS": "/x/y"}, "/x/y"),
        ("linux", {"XDG_DATA_HOME": "/data"}, "/data/moshi-ttt-mlx/sessions"),
        ("linux", {}, "/home/me/.local/share/moshi-ttt-mlx/sessions"),
        ("darwin", {}, "/home/me/Library/Application Support/moshi-ttt-mlx/sessions"),
    ],
)
def test_where_talks_are_kept(monkeypatch, platform, env, end):
    for name in ("MOSHI_TTT_SESSIONS", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(session_store.sys, "platform", platform)
    assert str(session_store.sessions_folder()) == end


def test_a_path_stays_a_path_and_a_name_is_kept_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_TTT_SESSIONS", str(tmp_path / "deep" / "sessions"))
    assert str(session_path("./talk")) == "talk" and str(session_path("/a/b")) == "/a/b"
    path = session_path("monday")
    assert path == tmp_path / "deep" / "sessions" / "monday.session" and path.parent.is_dir()
    assert session_label(path) == "monday" and session_label("/a/b.session") == "/a/b.session"


def test_a_file_here_of_that_name_is_not_passed_over_in_silence(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_TTT_SESSIONS", str(tmp_path / "sessions"))
    (tmp_path / "talk.session").write_bytes(saved[0])
    with pytest.raises(UserError, match=r"say \./talk.session"):
        session_path("talk.session")
    session_path("talk")
    (tmp_path / "sessions" / "talk.session").write_bytes(saved[0])
    session_path("talk.session")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOSHI_TTT_SESSIONS", str(tmp_path / "file" / "sessions"))
    with pytest.raises(UserError, match="cannot make the folder"):
        session_path("monday")


# ---- the list


def test_a_talk_says_what_it_is(store, saved, model):
    data, one = saved
    store.path("monday").write_bytes(data)
    (info,) = store.list()
    assert info == store.info("monday")
    assert (info.name, info.bytes, info.fault) == ("monday", len(data), None)
    assert (info.model, info.fingerprint) == (SMALL, model.fingerprint)
    assert info.seconds == pytest.approx(1.6) and info.words == len(one.transcript.words) > 0
    assert info.settings["seed"] == 7 and info.settings["temp"] == 0 and info.memory is None
    assert session_store.last_words(info.path, 3) == one.transcript.words[-3:]


def test_the_latest_comes_first_and_a_missing_folder_is_empty(store, saved, tmp_path):
    for age, name in enumerate(["b", "c", "a"]):
        store.path(name).write_bytes(saved[0])
        os.utime(store.path(name), (1e9 - age, 1e9 - age))
    assert [info.name for info in store.list()] == ["b", "c", "a"]
    assert SessionStore(tmp_path / "nowhere").list() == []


def broken(saved):
    """Files that are no whole session, and what the list says of them."""
    data, _ = saved
    header, _ = header_of(data)
    flat = {name: entry for name, entry in header.items() if name != "__metadata__"}
    foreign = json.dumps(flat).encode()
    return {
        "empty": (b"", "cut short in its first part"),
        "header": (data[:500], "cut short in its first part"),
        "data": (data[:-1], "cut short: "),
        "longer": (data + b"x", "cut short: "),
        "text": (b"Dear diary, " * 50, "not a session"),
        "list": (struct.pack("<Q", 2) + b"[]", "not a session"),
        "weights": (struct.pack("<Q", len(foreign)) + foreign, "not a session of moshi"),
        "newer": (with_meta(data, version="9"), "of version 9"),
        "odd": (with_meta(data, counters="[]"), "damaged"),
        "words": (with_meta(data, transcript="{"), "damaged"),
    }


def test_half_written_and_foreign_files_are_listed_with_the_reason(store, saved):
    for name, (data, _) in broken(saved).items():
        store.path(name).write_bytes(data)
    faults = {info.name: info.fault for info in store.list()}
    for name, (_, reason) in broken(saved).items():
        assert reason in faults[name], name


def test_what_is_no_regular_file_is_listed_and_neither_read_nor_removed(store, saved, tmp_path):
    outside = tmp_path / "outside.session"
    outside.write_bytes(saved[0])
    store.path("link").symlink_to(outside)
    store.path("gone").symlink_to(tmp_path / "gone")
    store.path("folder").mkdir()
    os.mkfifo(store.path("pipe"))
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / ".DS_Store").write_text("the system's")
    faults = {info.name: info.fault for info in store.list()}
    assert faults == {
        "link": "a link: not followed",
        "gone": "a link: not followed",
        "folder": "not a file",
        "pipe": "not a file",
        "notes.txt": "not a session file",
    }
    for name in ("link", "gone", "folder", "pipe"):
        with pytest.raises(UserError, match="is not a session"):
            store.remove(name)
    with pytest.raises(UserError, match="no session"):
        store.remove("notes.txt")
    assert len(list(store.folder.iterdir())) == 6 and outside.exists()


def test_what_turns_into_a_link_or_a_pipe_meanwhile_is_neither_followed_nor_waited_for(tmp_path):
    (tmp_path / "file").write_text("outside")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        session_store._open_regular(str(tmp_path / "link"), os.O_RDONLY)
    with open(tmp_path / "pipe", opener=session_store._open_regular) as pipe:
        assert pipe.read() == ""


def test_a_save_that_was_cut_short_is_listed_and_goes_with_its_talk(store, saved):
    store.path("monday").write_bytes(saved[0])
    left = store.folder / ".monday.session.ab12_x.safetensors"
    left.write_bytes(saved[0][:1000])
    other = store.folder / ".tuesday.session.ab12_x.safetensors"
    other.write_bytes(b"")
    assert {(info.name, info.fault is None) for info in store.list()} == {
        ("monday", True),
        ("monday", False),
        ("tuesday", False),
    }
    store.remove("monday")
    assert list(store.folder.iterdir()) == [other]
    store.remove("tuesday")
    assert store.list() == []


# ---- removing


@pytest.mark.parametrize("name", ["data", "newer", "odd"])
def test_a_session_that_is_damaged_can_be_removed(store, saved, name):
    store.path(name).write_bytes(broken(saved)[name][0])
    store.remove(name)
    assert store.list() == []


@pytest.mark.parametrize("name", ["empty", "text", "list", "weights"])
def test_a_file_that_is_none_stays(store, saved, name):
    store.path(name).write_bytes(broken(saved)[name][0])
    with pytest.raises(UserError, match="is not a session"):
        store.remove(name)
    assert store.path(name).exists()


def test_a_name_that_is_not_there(store):
    for ask in (store.info, store.remove):
        with pytest.raises(UserError, match="no session 'monday'"):
            ask("monday")


# ---- the memory in a file


def test_the_norms_are_those_of_the_session(tmp_path):
    from test_memory_session import CONFIG

    from moshi_ttt_mlx.surgery import add_memory, save_adapter

    adapter = add_memory(load(SMALL).lm, CONFIG)
    for memory in adapter.memories.values():
        memory.gate = memory.gate + 1.0
    save_adapter(adapter, tmp_path / "adapter")
    one = Session(load(SMALL, adapter_path=str(tmp_path / "adapter")))
    talk(one, sound(30))
    one.save(tmp_path / "talk.session")
    assert session_store.inspect(tmp_path / "talk.session").memory == "on"
    norms = session_store.memory_norms(tmp_path / "talk.session")
    report = one.memory_report()
    assert sorted(norms) == sorted(report) == [2, 3]
    arrays, _ = one.generator.state()
    for layer, found in norms.items():
        for name in ("tokens", "updates"):
            assert found[name] == report[layer][name]
        assert found["step"] == pytest.approx(report[layer]["step"])
        weights = [
            np.array(array).astype(np.float64)
            for name, array in arrays.items()
            if name.startswith(f"layers.{layer}.memory.weights.")
        ]
        heads = [np.sqrt(sum((w[0, head] ** 2).sum() for w in weights)) for head in range(2)]
        assert found["weights"] == pytest.approx(max(heads), rel=1e-9)  # both sums in float64
