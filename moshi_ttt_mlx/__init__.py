"""Moshi on MLX without a wall: exact windows, unbounded sessions, test-time-training memory."""

from .errors import UserError
from .model import Model, load
from .session import Session, Settings, SpokenFrame

__version__ = "0.1.0"
__all__ = ["Model", "Session", "Settings", "SpokenFrame", "UserError", "__version__", "load"]
