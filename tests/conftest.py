"""Skip what this machine cannot run; no test fails because the machine is busy."""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

# Both measure time, and on a shared machine it is not the test's.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_collection_modifyitems(items):
    if mx.metal.is_available():
        return
    skip = pytest.mark.skip(reason="needs Metal, so a Mac")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
