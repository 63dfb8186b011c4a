"""A model that brings its memory along: `memory_path` in its config."""

import json
import shutil
from pathlib import Path

import pytest
from open_memory import CONFIG, save_open_memory
from test_session import assert_same, sound, talk
from tiny import SMALL

import moshi_ttt_mlx
from moshi_ttt_mlx import Session, UserError, load
from moshi_ttt_mlx.hub import find_files


def with_memory(folder: Path, name: object = "memory") -> Path:
    """The small model with an open memory in its folder."""
    shutil.copytree(SMALL, folder)
    save_open_memory(folder / "memory")
    config = json.loads((folder / "config.json").read_text()) | {"memory_path": name}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_memory(tmp_path_factory.mktemp("model") / "whole")


def test_it_talks_as_with_the_adapter_named(folder):
    ours, theirs = load(str(folder)), load(SMALL, adapter_path=str(folder / "memory"))
    assert ours.memory.config == CONFIG
    assert_same(talk(Session(ours), sound(30)), talk(Session(theirs), sound(30)))


def test_none_leaves_it_out(folder):
    model = load(str(folder), adapter_path="none")
    assert model.memory is None
    assert_same(talk(Session(model), sound(20)), talk(Session(load(SMALL)), sound(20)))
    assert model.fingerprint != load(str(folder)).fingerprint  # saved talks do not mix them up


def test_another_adapter_takes_its_place(folder, tmp_path):
    save_open_memory(tmp_path)
    config = json.loads((tmp_path / "memory_config.json").read_text()) | {"window": 7}
    (tmp_path / "memory_config.json").write_text(json.dumps(config))
    assert load(str(folder), adapter_path=str(tmp_path)).memory.config.window == 7


def test_other_weights_do_not_get_it(folder):
    assert find_files(str(folder)).memory is not None
    weights = Path(SMALL) / "model.safetensors"
    assert find_files(str(folder), moshi_weight=weights).memory is None


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("../elsewhere", "the config names a file outside its folder"),
        ("nowhere", "has no file nowhere/memory_config.json"),
        (3, "memory_path should be a file name, found 3"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(name, complaint, tmp_path):
    folder = with_memory(tmp_path / "model", name)
    with pytest.raises(UserError, match=complaint):
        load(str(folder))


def test_the_demo_has_a_memory_and_fits_into_the_package():
    model = load("demo")
    assert model.memory.config.window == model.lm.cfg.transformer.context == 96
    package = Path(moshi_ttt_mlx.__file__).parent
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 25e6
