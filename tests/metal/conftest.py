"""Fixtures that put the Metal emulator under the package's kernels."""

import metal_emulator
import mlx.core as mx
import pytest

from moshi_ttt_mlx import ttt_kernels


def _forget_built():
    ttt_kernels._kernel.cache_clear()
    ttt_kernels._agrees.cache_clear()


@pytest.fixture
def emulator():
    """The emulator, or a skip that says why it cannot work here."""
    if metal_emulator.UNAVAILABLE:
        pytest.skip(metal_emulator.UNAVAILABLE)
    return metal_emulator


@pytest.fixture
def on_metal(emulator, monkeypatch):
    """Let `ttt_kernels` believe in a Mac: its kernels run in the emulator."""
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    monkeypatch.setattr(ttt_kernels, "_on_metal", lambda: True)
    monkeypatch.delenv("MOSHI_TTT_KERNEL", raising=False)
    _forget_built()
    yield emulator
    _forget_built()
