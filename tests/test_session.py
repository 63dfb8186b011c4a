"""A session is a talk: saved and resumed it goes on bit for bit; two on one model never meet."""

import json
import os
import re
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiny import SMALL

from moshi_ttt_mlx import Session, UserError, load
from moshi_ttt_mlx.session import VERSION


@pytest.fixture(scope="module")
def model():
    return load(SMALL)


def sound(frames, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((frames, 1920))).astype(np.float32)


def talk(session, pcm):
    return [session.step(frame) for frame in pcm]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a.index, a.time, a.text, a.piece) == (b.index, b.time, b.text, b.piece)
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.pcm, b.pcm)


def test_a_frame_holds_what_it_says(model):
    frames = talk(Session(model, seed=3), sound(5))
    assert [f.index for f in frames] == [0, 1, 2, 3, 4]
    assert frames[3].time == pytest.approx(0.24)
    assert (
        frames[0].codes is None and frames[0].pcm is None
    )  # the second codebook comes a frame late
    for frame in frames[1:]:
        assert frame.codes.shape == (8,) and frame.pcm.shape == (1920,)
        assert frame.pcm.dtype == np.float32 and np.isfinite(frame.pcm).all()
    assert np.abs(frames[4].pcm).max() > 1e-4


def test_codes_in_place_of_sound(model):
    pcm = sound(6)
    codec = model.codec.fresh()
    codes = [codec.encode(frame) for frame in pcm]
    assert_same(talk(Session(model), codes), talk(Session(model), pcm))


@settings(max_examples=5)
@given(at=st.integers(1, 44))
def test_resumed_equals_uninterrupted(model, tmp_path_factory, at):
    path = tmp_path_factory.mktemp("s") / "talk.session"
    pcm = sound(45)
    whole = Session(model, seed=1, context=20, sinks=2)
    want = talk(whole, pcm)
    first = Session(model, seed=1, context=20, sinks=2)
    talk(first, pcm[:at])
    first.save(path)
    second = Session.load(path, model)
    assert_same(talk(second, pcm[at:]), want[at:])
    assert second.transcript.to_json() == whole.transcript.to_json()


def test_saving_does_not_disturb_the_talk(model, tmp_path):
    pcm = sound(20)
    session = Session(model)
    got = []
    for frame in pcm:
        got.append(session.step(frame))
        session.save(tmp_path / "talk.session")
    assert_same(got, talk(Session(model), pcm))


def test_settings_come_back(model, tmp_path):
    given = {"seed": 9, "temp": 0.5, "text_temp": 0.3, "top_k": 5, "context": 60, "sinks": 1}
    session = Session(model, **given)
    talk(session, sound(3))
    session.save(tmp_path / "a")
    assert Session.load(tmp_path / "a", model).settings == session.settings


def test_sessions_on_one_model_do_not_touch_each_other(model):
    pcm, other = sound(15), sound(15, seed=1)
    a, b = Session(model, seed=1), Session(model, seed=2)
    mixed = [(a.step(x), b.step(y)) for x, y in zip(pcm, other, strict=True)]
    assert_same([m[0] for m in mixed], talk(Session(model, seed=1), pcm))
    assert_same([m[1] for m in mixed], talk(Session(model, seed=2), other))


def test_reset_equals_fresh(model):
    session = Session(model, seed=4, context=20)
    talk(session, sound(30, seed=2))
    session.reset()
    pcm = sound(20)
    assert_same(talk(session, pcm), talk(Session(model, seed=4, context=20), pcm))


@pytest.mark.parametrize("at", [0, 4, 25])
def test_warming_up_does_not_disturb_the_talk(model, at):
    pcm = sound(30)
    session = Session(model, context=20, sinks=2)
    got = talk(session, pcm[:at])
    session.warm_up()
    assert session.frame == at
    assert_same(got + talk(session, pcm[at:]), talk(Session(model, context=20, sinks=2), pcm))


def test_after_warming_up_nothing_is_traced(model, monkeypatch):
    session, seen = Session(model), []
    session.warm_up()
    frame = session.generator._frame
    monkeypatch.setattr(
        session.generator, "_frame", lambda *a: seen.append(session.frame) or frame(*a)
    )
    talk(session, sound(8))
    assert seen == [0]  # the first frame of a talk is never traced, and no later one was


def test_parameters_never_change_while_talking(model):
    before = {n: np.array(a) for n, a in tree_flatten(model.lm.parameters())}
    talk(Session(model), sound(30))
    for name, array in tree_flatten(model.lm.parameters()):
        np.testing.assert_array_equal(np.array(array), before[name])


def test_samples_that_are_not_numbers_are_silence(model):
    bad = sound(4)
    bad[2, 100:200] = np.nan
    bad[3, 5] = np.inf
    clean = np.where(np.isfinite(bad), bad, 0)
    assert_same(talk(Session(model), bad), talk(Session(model), clean))


def test_a_frame_of_another_length_is_refused(model):
    with pytest.raises(ValueError, match=r"a frame is \[1920\] samples, got \[1919\]"):
        Session(model).step(np.zeros(1919, np.float32))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"context": 101}, "context must be 1..100 frames"),
        ({"context": 0}, "context must be 1..100 frames"),
        ({"sinks": 100}, "sinks must be 0..99"),
        ({"conditions": {"description": "good"}}, "no condition 'description'"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, given, message):
    with pytest.raises(UserError, match=message):
        Session(model, **given)


# -- files that are not this talk ------------------------------------------------------------------


def saved(model, folder):
    session = Session(model)
    talk(session, sound(3))
    session.save(folder / "talk")
    return folder / "talk"


def rewritten(path, **changes):
    with path.open("rb") as file:
        arrays, meta = mx.load(file, format="safetensors", return_metadata=True)
    mx.save_safetensors(f"{path}.safetensors", arrays, meta | changes)
    return f"{path}.safetensors"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"fingerprint": "x"},
            re.escape(f"a session of {SMALL}; the loaded model {SMALL} has other weights"),
        ),
        ({"version": str(VERSION + 1)}, f"version {VERSION + 1}, this program reads {VERSION}"),
        ({"format": "something"}, "not a session of moshi-ttt-mlx"),
        ({"counters": "{}"}, "a damaged session file"),
        ({"settings": json.dumps({"volume": 11})}, "a damaged session file"),
    ],
)
def test_a_file_of_something_else_is_refused(model, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Session.load(rewritten(saved(model, tmp_path), **changes), model)


@pytest.mark.parametrize("left", [0.01, 0.5, 0.999999])
def test_a_file_cut_short_is_refused(model, tmp_path, left):
    path = saved(model, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(UserError, match="not a whole session file"):
        Session.load(path, model)


def test_no_file(model, tmp_path):
    with pytest.raises(UserError, match="no session file"):
        Session.load(tmp_path / "none", model)


def test_a_failed_save_keeps_the_old_file(model, tmp_path, monkeypatch):
    path = saved(model, tmp_path)
    old = path.read_bytes()
    session = Session.load(path, model)
    talk(session, sound(2))

    def full(name, arrays, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("[write] unable to write")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(UserError, match="could not save the session"):
        session.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["talk"]


@pytest.fixture
def small_disk(tmp_path):
    """Makes a disk of so many bytes, where one may."""
    folder = tmp_path / "disk"

    def mount(size):
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a disk")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_is_named_and_the_older_talk_stays(model, tmp_path, small_disk):
    session = Session(model)
    talk(session, sound(2))
    session.save(tmp_path / "talk")
    disk = small_disk((tmp_path / "talk").stat().st_size * 3 // 2)
    session.save(disk / "talk")
    old = (disk / "talk").read_bytes()
    talk(session, sound(1))
    with pytest.raises(UserError, match="the disk is full"):
        session.save(disk / "talk")
    assert (disk / "talk").read_bytes() == old and os.listdir(disk) == ["talk"]
    talk(session, sound(1))


def test_a_folder_that_is_not_there(model, tmp_path):
    with pytest.raises(UserError, match="could not save the session"):
        Session(model).save(tmp_path / "no" / "talk")
