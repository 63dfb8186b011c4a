"""Moshi on MLX without a wall: exact windows, unbounded sessions, test-time-training memory."""

__version__ = "0.1.0"
