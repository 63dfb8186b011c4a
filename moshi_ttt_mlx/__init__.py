"""Moshi on MLX without a wall: exact windows, unbounded sessions, test-time-training memory."""

from .errors import UserError

__version__ = "0.1.0"
__all__ = [
    "MemoryConfig",
    "Model",
    "Session",
    "Settings",
    "SpokenFrame",
    "UserError",
    "__version__",
    "load",
]

_HOMES = {
    "MemoryConfig": "memory",
    "Model": "model",
    "Session": "session",
    "Settings": "session",
    "SpokenFrame": "session",
    "load": "model",
}


def __getattr__(name: str):
    # Imported when asked for: without moshi_mlx (newest Pythons) the first thing a user meets is one
    # line that says how to install it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .lanes import ensure_compile_works, require_moshi_mlx

    require_moshi_mlx()
    ensure_compile_works()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
