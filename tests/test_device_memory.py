"""What MLX is told about memory, seen through a Mac that is not there."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from moshi_mlx.utils import Sampler

from moshi_ttt_mlx import device_memory
from moshi_ttt_mlx.bench import tiny_lm
from moshi_ttt_mlx.generate import FrameGenerator

GB = 1 << 30


@pytest.fixture
def told(monkeypatch):
    """A Mac that recommends 12 GB; what it was told, by name."""
    calls = []

    def note(name):
        return lambda *args: calls.append((name, *args))

    info = {"max_recommended_working_set_size": 12 * GB}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.metal, "device_info", lambda: info)
    monkeypatch.setattr(mx, "device_info", lambda: info, raising=False)
    for name in ("set_wired_limit", "set_cache_limit", "clear_cache"):
        monkeypatch.setattr(mx, name, note(name))
    return calls


def weights(gigabytes):
    return {"layers": [SimpleNamespace(nbytes=gigabytes * GB // 2)] * 2}


def test_weights_and_room_beside_them_are_wired(told):
    device_memory.prepare(weights(5))
    assert told == [("set_wired_limit", 9 * GB), ("set_cache_limit", GB)]


def test_never_more_than_the_system_recommends(told):
    device_memory.prepare(weights(15))
    assert told[0] == ("set_wired_limit", 12 * GB)


def test_without_metal_nothing_is_set(told, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    device_memory.prepare(weights(5))
    assert told == []


def test_a_generator_tells_before_its_first_frame_and_clears_now_and_then(told, monkeypatch):
    monkeypatch.setattr(device_memory, "CLEAR_EVERY", 3)
    lm = tiny_lm(layers=1, dim=32, codebooks=2, depformer_layers=1, context=20)
    generator = FrameGenerator(lm, Sampler(), Sampler())
    size = sum(array.nbytes for _, array in tree_flatten(lm.parameters()))
    assert told == [("set_wired_limit", size + 4 * GB), ("set_cache_limit", GB)]
    told.clear()
    for _ in range(7):
        generator.step(np.zeros((1, 2), int)).read()
    assert told == [("clear_cache",)] * 2
