"""Skip what this machine cannot run."""

import mlx.core as mx
import pytest


def pytest_collection_modifyitems(items):
    if mx.metal.is_available():
        return
    skip = pytest.mark.skip(reason="needs Metal, so a Mac")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
