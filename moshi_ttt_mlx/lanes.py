"""The two dependency lanes: which one this process runs on, and the guard that each one needs.

*floor* is what moshi_mlx 0.3.0 pins (mlx 0.26, Python 3.10-3.12). *modern* is the newest mlx with
moshi_mlx installed without its pins, the only way on Python 3.13 and newer. The code is the same on
both; what differs is how moshi_mlx gets here (:func:`require_moshi_mlx`) and what ``mx.compile``
needs on a Linux CPU (:func:`ensure_compile_works`).
"""

import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata

import mlx.core as mx

from .errors import UserError

MOSHI_MLX = "moshi_mlx==0.3.0"

_PACKAGES = (
    "moshi_mlx",
    "mlx",
    "numpy",
    "huggingface_hub",
    "safetensors",
    "sentencepiece",
    "rustymimi",
    "sphn",
    "soundfile",
    "soxr",
    "sounddevice",
    "aiohttp",
)


def lane() -> str:
    """Name the lane in use, ``"floor"`` or ``"modern"``, by the mlx that is imported."""
    major, minor = (int(part) for part in mx.__version__.split(".")[:2])
    return "floor" if (major, minor) < (0, 27) else "modern"


def describe() -> dict[str, str]:
    """Say what this process runs on, for ``doctor`` and bug reports.

    Returns ``lane``, ``python``, ``platform``, ``device``, ``compile`` (``on``, or why it is off)
    and then one entry a package with its version, or ``missing``.
    """
    reason = _compile_blocker()
    return {
        "lane": lane(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(mx.default_device().type).rpartition(".")[2],
        "compile": f"off: {reason}" if reason else "on",
        **{name: _version(name) for name in _PACKAGES},
    }


def require_moshi_mlx() -> None:
    """Check that moshi_mlx is there.

    Raises:
        UserError: it is not; the message holds the one command that installs it. This is the normal
            state right after ``pip install`` on Python 3.13 and newer, where its pins rule it out.
    """
    if importlib.util.find_spec("moshi_mlx") is None:
        raise UserError(f"moshi_mlx is not installed; run: {_install_command()}")


def ensure_compile_works() -> bool:
    """Turn ``mx.compile`` off where its first call would fail. Call before anything is compiled.

    On a CPU mlx compiles a fused kernel with g++ at run time. mlx 0.26 raises a ``RuntimeError``
    from the evaluation when there is no g++; newer ones look for it and run unfused, as this does.

    Returns whether compiled functions are fused from now on.
    """
    blocked = _compile_blocker() is not None
    if blocked:
        mx.disable_compile()
    return not blocked


def _compile_blocker() -> str | None:
    if "MLX_DISABLE_COMPILE" in os.environ:
        return "MLX_DISABLE_COMPILE is set"
    on_linux_cpu = sys.platform == "linux" and mx.default_device().type == mx.cpu
    if on_linux_cpu and shutil.which("g++") is None:
        return "no g++ on PATH (Debian: apt-get install g++)"
    return None


def _install_command() -> str:
    # An environment made by uv has no pip of its own.
    has_pip = importlib.util.find_spec("pip") is not None
    pip = f"{sys.executable} -m pip" if has_pip else "uv pip"
    # Where the pins can be met, pip is to meet them.
    flags = "" if sys.version_info < (3, 13) and lane() == "floor" else "--no-deps "
    return f"{pip} install {flags}{MOSHI_MLX}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
