"""What messages look like on `/api/talk`: raw float32 sound and JSON (docs/server.md)."""

import json
from typing import Protocol

import numpy as np
from aiohttp import WSMessage, WSMsgType

from ..errors import UserError
from .limits import Limits
from .outbox import Event


class Wire(Protocol):
    """One protocol of one connection.

    Attributes:
        resumable: whether a client that drops can come back: it has been told a key.
    """

    resumable: bool

    def decode(self, message: WSMessage) -> np.ndarray | dict | None:
        """Sound, float32 `[N]`, finite and within -1..1; a request with a `type`; or nothing.

        Raises:
            UserError: not a message of this protocol.
        """

    def encode(self, event: Event) -> bytes | str | None:
        """What to send for an event; None when this protocol has no word for it."""


class TalkWire:
    """Ours."""

    resumable = True

    def __init__(self, limits: Limits):
        self._limits = limits

    def decode(self, message: WSMessage) -> np.ndarray | dict:
        if message.type is WSMsgType.BINARY:
            return _samples(message.data)
        return _request(message.data, self._limits.text_bytes)

    def encode(self, event: Event) -> bytes | str:
        if isinstance(event, np.ndarray):
            return event.astype("<f4").tobytes()
        return json.dumps(event, ensure_ascii=False, allow_nan=False)


def clean(samples: np.ndarray) -> np.ndarray:
    """Sound as the rest may expect it: float32, what is not finite is silence, within -1..1."""
    finite = np.nan_to_num(samples.astype(np.float32), posinf=0.0, neginf=0.0)
    return np.clip(finite, -1.0, 1.0)


def _samples(data: bytes) -> np.ndarray:
    if len(data) % 4:
        raise UserError(f"expected float32 samples of 4 bytes each, got {len(data)} bytes")
    return clean(np.frombuffer(data, "<f4"))


def _request(text: str, most: int) -> dict:
    if len(text) > most:
        raise UserError(f"expected a JSON message of up to {most} characters, got {len(text)}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("expected a JSON object, got something that does not parse") from error
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise UserError('expected a JSON object with a "type"')
    return value
