"""What messages look like on `/api/chat`: Kyutai's protocol, Ogg/Opus behind a byte for the kind.

From their description of it, `rust/protocol.md` of github.com/kyutai-labs/moshi.
"""

from collections.abc import Mapping

import numpy as np
import sphn
from aiohttp import WSMessage, WSMsgType

from ..audio import SAMPLE_RATE
from ..errors import UserError
from .limits import Limits
from .outbox import Event
from .wire import clean

HANDSHAKE, SOUND, TEXT, ERROR = 0, 1, 2, 5

_VERSION_AND_MODEL = bytes(8)  # two little-endian u32

# sphn decodes five seconds in one call and no more. In so few bytes no page of a usual length ends
# twice, while a whole message may hold minutes: a packet of two bytes may stand for 120 ms.
_SLICE_BYTES = 128

# Their page's query parameters that mean the same here.
_WHOLE = {"text_topk": "text_top_k", "audio_topk": "top_k", "audio_seed": "seed"}
_NUMBERS = {"text_temperature": "text_temp", "audio_temperature": "temp"}


class ChatWire:
    """Kyutai's: one Opus stream each way, so one of these a connection."""

    resumable = False

    def __init__(self, limits: Limits):
        self._limits = limits
        self._reader = sphn.OpusStreamReader(SAMPLE_RATE)
        self._soundless_bytes = 0
        self._writer = sphn.OpusStreamWriter(SAMPLE_RATE)

    def decode(self, message: WSMessage) -> np.ndarray | None:
        # Kinds that it does not know are to be ignored, says the protocol.
        if message.type is not WSMsgType.BINARY or message.data[:1] != bytes([SOUND]):
            return None
        if len(message.data) > self._limits.text_bytes:
            raise UserError(f"expected up to {self._limits.text_bytes} bytes of Ogg/Opus at once")
        try:
            return clean(self._read(message.data[1:]))
        except ValueError as error:
            raise UserError(f"expected Ogg/Opus sound: {error}") from error

    def _read(self, pages: bytes) -> np.ndarray:
        """Sound of a message, float32 `[N]`; a little more than a burst at most, see `Limits`.

        Whoever sends more is disconnected for it: the rest need not be decoded.
        """
        parts, samples = [np.empty(0, np.float32)], 0
        for start in range(0, len(pages), _SLICE_BYTES):
            if samples > self._limits.burst_seconds * SAMPLE_RATE:
                break
            parts.append(self._read_slice(pages[start : start + _SLICE_BYTES]))
            samples += len(parts[-1])
        return np.concatenate(parts)

    def _read_slice(self, data: bytes) -> np.ndarray:
        # The reader keeps what it cannot decode yet, and a packet may go on from page to page.
        if self._soundless_bytes > self._limits.message_bytes:
            raise ValueError(f"none in {self._soundless_bytes} bytes")
        self._soundless_bytes += len(data)
        sound = self._reader.append_bytes(data)
        if len(sound):
            self._soundless_bytes = 0
        return sound

    def encode(self, event: Event) -> bytes | None:
        if isinstance(event, np.ndarray):
            pages = self._writer.append_pcm(event)
            return bytes([SOUND]) + pages if pages else None
        kind, text = _KINDS.get(event["type"], (None, None))
        return None if kind is None else bytes([kind]) + text(event)


_KINDS = {
    "ready": (HANDSHAKE, lambda event: _VERSION_AND_MODEL),
    "word": (TEXT, lambda event: event["text"].encode()),
    "error": (ERROR, lambda event: event["message"].encode()),
    "ended": (ERROR, lambda event: event["reason"].encode()),
}


def start_request(query: Mapping[str, str]) -> dict:
    """The `start` that a connection's query stands for.

    Raises:
        UserError: a parameter that is no number.
    """
    try:
        numbers = {own: float(query[name]) for name, own in _NUMBERS.items() if name in query}
        whole = {own: int(query[name]) for name, own in _WHOLE.items() if name in query}
    except ValueError as error:
        raise UserError(f"query: expected numbers: {error}") from error
    return {"type": "start", "settings": numbers | whole}
