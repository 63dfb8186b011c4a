"""The folder of the demo's model is put together of what training left."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice.assemble import mean


def test_weights_of_several_runs_are_averaged_before_they_are_rounded(tmp_path):
    files = []
    for number, value in enumerate((1.0, 1.001, 1.002)):
        files.append(tmp_path / f"{number}.safetensors")
        mx.save_safetensors(str(files[-1]), {"one": mx.array([value, -value]), "two": mx.zeros(3)})
    mean(files, tmp_path / "mean.safetensors")
    found = mx.load(str(tmp_path / "mean.safetensors"))
    assert {name: array.dtype for name, array in found.items()} == {
        "one": mx.float16,
        "two": mx.float16,
    }
    assert (np.array(found["one"]) == np.float16([1.001, -1.001])).all()


def test_runs_of_different_models_have_no_mean(tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        mx.save_safetensors(str(file), {file.stem: mx.zeros(1)})
    with pytest.raises(KeyError, match="a"):
        mean(files, tmp_path / "mean.safetensors")
