"""A talk with a memory as a user has it: load, talk, save, resume, compare, on the command line too."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from open_memory import CONFIG, save_open_memory
from test_session import assert_same, sound, talk
from tiny import SMALL

from moshi_ttt_mlx import Session, UserError, load
from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.surgery import find_memory


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory):
    """A memory with open gates for the small model."""
    return save_open_memory(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def model(adapter_path):
    return load(SMALL, adapter_path=adapter_path)


def test_the_adapter_is_loaded(model):
    assert model.memory.config == CONFIG
    assert sorted(model.memory.memories) == [2, 3]


def test_on_off_and_frozen_are_three_talks(model):
    pcm = sound(40)
    talks = {m: talk(Session(model, memory=m), pcm) for m in ("on", "off", "frozen")}
    pieces = {mode: [f.piece for f in frames] for mode, frames in talks.items()}
    assert pieces["on"] != pieces["off"] and pieces["on"] != pieces["frozen"] != pieces["off"]
    assert_same(talks["off"], talk(Session(load(SMALL)), pcm))


@pytest.mark.parametrize("at", [6, 8, 30])
def test_resumed_equals_uninterrupted(model, tmp_path, at):
    pcm = sound(40)
    whole = Session(model, seed=3)
    want = talk(whole, pcm)
    first = Session(model, seed=3)
    talk(first, pcm[:at])
    first.save(tmp_path / "talk")
    second = Session.load(tmp_path / "talk", model)
    assert_same(talk(second, pcm[at:]), want[at:])
    assert second.memory_report() == whole.memory_report()
    assert second.memory_report()[3]["updates"] == 10


def test_reset_equals_fresh(model):
    session = Session(model, seed=4)
    talk(session, sound(10, seed=2))
    session.reset()
    pcm = sound(12)
    assert_same(talk(session, pcm), talk(Session(model, seed=4), pcm))


def test_sessions_on_one_model_have_memories_of_their_own(model):
    pcm, other = sound(20), sound(20, seed=1)
    a, b = Session(model, seed=1), Session(model, seed=2)
    mixed = [(a.step(x), b.step(y)) for x, y in zip(pcm, other, strict=True)]
    assert_same([m[0] for m in mixed], talk(Session(model, seed=1), pcm))
    assert_same([m[1] for m in mixed], talk(Session(model, seed=2), other))


def test_a_talk_with_a_memory_needs_that_memory(model, tmp_path):
    session = Session(model)
    talk(session, sound(3))
    session.save(tmp_path / "talk")
    with pytest.raises(UserError, match="other weights, config or quantization"):
        Session.load(tmp_path / "talk", load(SMALL))


def test_memory_beside_a_quantized_base(adapter_path):
    """The base is quantized alone; parameters and state of the memory stay float32."""
    model = load(SMALL, quantized=8, adapter_path=adapter_path)
    assert isinstance(model.lm.text_linear, nn.QuantizedLinear)
    session = Session(model)
    frames = talk(session, sound(10))
    assert all(f.memory_ok for f in frames)
    caches = [c.self_attn for c in session.generator.caches]
    assert {a.dtype for c in caches[2:] for a in c.memory.state.values()} == {mx.float32}
    assert session.memory_report()[2]["updates"] == 2


def test_a_broken_memory_is_said_and_the_talk_goes_on(model):
    session = Session(model)
    talk(session, sound(5))
    memory = session.generator.caches[2].self_attn.memory
    memory.tail = memory.tail * mx.nan
    frames = talk(session, sound(5))
    assert not any(f.memory_ok for f in frames)
    assert all(np.isfinite(f.pcm).all() for f in frames)


@pytest.mark.parametrize(("first", "then"), [("on", "frozen"), ("frozen", "on")])
def test_a_memory_is_switched_while_the_talk_goes_on(model, tmp_path, first, then):
    pcm = sound(30)
    session = Session(model, memory=first)
    begun = talk(session, pcm[:10])
    learned = session.memory_report()[3]["updates"]
    session.set_memory(then)
    switched = talk(session, pcm[10:])
    whole = talk(Session(model, memory=first), pcm)
    assert_same(begun, whole[:10])
    assert [f.piece for f in switched] != [f.piece for f in whole[10:]]
    folds = session.memory_report()[3]["updates"] - learned
    assert folds == (0 if then == "frozen" else 5)
    # Saved and resumed, it goes on as it was switched.
    session.save(tmp_path / "talk")
    resumed = Session.load(tmp_path / "talk", model)
    assert resumed.settings.memory == then
    assert_same(talk(resumed, sound(8, seed=5)), talk(session, sound(8, seed=5)))
    session.reset()
    assert_same(talk(session, pcm[:8]), talk(Session(model, memory=then), pcm[:8]))


def test_switched_and_switched_back_before_a_frame_changes_nothing(model):
    pcm = sound(20)
    session = Session(model)
    begun = talk(session, pcm[:10])
    session.set_memory("frozen")
    session.set_memory("on")
    assert_same([*begun, *talk(session, pcm[10:])], talk(Session(model), pcm))


@pytest.mark.parametrize("mode", ["off", "full", None, ["on"]])
def test_a_talk_is_not_switched_to_another_mode(model, mode):
    session = Session(model)
    with pytest.raises(UserError, match="is on or frozen"):
        session.set_memory(mode)
    assert session.settings.memory == "on"


def test_a_talk_without_its_memory_gets_none_later(model):
    for session in (Session(model, memory="off"), Session(load(SMALL))):
        with pytest.raises(UserError, match="begun without a memory"):
            session.set_memory("on")


def test_a_memory_mode_that_is_none_is_refused(model):
    with pytest.raises(UserError, match="memory must be one of on, off, frozen"):
        Session(model, memory="maybe")


def words(capsys, *flags):
    clip = "moshi_ttt_mlx/assets/demo_clip.flac"
    assert main(["transcribe", clip, "--model", SMALL, "--quiet", *flags]) == 0
    return capsys.readouterr().out


def test_flags_of_the_command_line(adapter_path, capsys):
    base = words(capsys)
    assert words(capsys, "--adapter-path", adapter_path, "--memory", "off") == base
    assert words(capsys, "--adapter-path", adapter_path) != base


def test_a_wrong_adapter_is_one_line(tmp_path, capsys):
    clip = "moshi_ttt_mlx/assets/demo_clip.flac"
    flags = ["--model", SMALL, "--quiet", "--adapter-path", str(tmp_path)]
    assert main(["transcribe", clip, *flags]) == 2
    error = capsys.readouterr().err
    assert "has no file memory_config.json" in error and error.count("\n") == 1
    assert find_memory(load(SMALL).lm) is None
