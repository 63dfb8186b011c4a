"""A codec's work on a thread of its own, so that the next frame is heard while the model thinks.

For sound that is there already (a recording). rustymimi computes outside of Python and MLX, so both
can run at once; a codec on MLX stays on the thread of the model. One thread does all of a codec's
work in the order it was asked for: the numbers are those of the codec alone, bit for bit.

    with hearing_ahead(session) as ahead:
        for pcm in ahead(frames):        # the frame after `pcm` is being encoded
            session.step(pcm)
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .codec import Codec, finite

if TYPE_CHECKING:
    from .session import Session

Frames = Iterable[np.ndarray]


class CodecThread:
    """`codec.Codec`: another codec, moved to a thread. Frames may be announced before their turn.

    Args:
        codec: used by nobody else from now on, until `close`.
    """

    def __init__(self, codec: Codec):
        self.codec, self.name = codec, codec.name
        self.sample_rate, self.frame_size = codec.sample_rate, codec.frame_size
        self.num_codebooks = codec.num_codebooks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codec")
        self._announced: deque[tuple[np.ndarray, Future]] = deque()

    def announce(self, pcm: np.ndarray) -> None:
        """Begin to encode a frame; `encode` will ask for the announced ones in this order."""
        pcm = finite(pcm)
        self._announced.append((pcm, self._thread.submit(self.codec.encode, pcm)))

    @property
    def announced(self) -> list[np.ndarray]:
        """Frames that were announced and not asked for."""
        return [pcm for pcm, _ in self._announced]

    def encode(self, pcm: np.ndarray) -> np.ndarray:
        """The next frame in, as `Codec.encode`.

        Raises:
            ValueError: another frame was announced.
        """
        if not self._announced:
            return self._do(self.codec.encode, pcm)
        promised, codes = self._announced.popleft()
        if not np.array_equal(promised, pcm):
            raise ValueError("[CodecThread] this is not the frame that was announced")
        return codes.result()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The next frame out, after what was announced before."""
        return self._do(self.codec.decode, codes)

    def reset(self) -> None:
        """As `Codec.reset`; what was announced is forgotten."""
        self._announced.clear()
        self._do(self.codec.reset)

    def fresh(self) -> Codec:
        """Another codec, with no thread."""
        return self._do(self.codec.fresh)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """As `Codec.state`.

        Raises:
            ValueError: a frame was announced: the codec is ahead of its talk.
        """
        if self._announced:
            raise ValueError("[CodecThread] step the announced frames before the state is taken")
        return self._do(self.codec.state)

    def load_state(self, arrays: dict[str, np.ndarray], meta: dict[str, str]) -> None:
        """As `Codec.load_state`; what was announced is forgotten."""
        self._announced.clear()
        self._do(self.codec.load_state, arrays, meta)

    def close(self) -> None:
        """End the thread after what it has to do."""
        self._thread.shutdown()

    def _do(self, work: Callable, *args):
        return self._thread.submit(work, *args).result()


def one_ahead(codec: CodecThread, frames: Frames) -> Iterator[np.ndarray]:
    """The frames as they are; when one is given out the next one has been announced."""
    frames = iter(frames)
    following = next(frames, None)
    if following is not None:
        codec.announce(following)
    while following is not None:
        frame, following = following, next(frames, None)
        if following is not None:
            codec.announce(following)
        yield frame


@contextmanager
def hearing_ahead(session: "Session") -> Iterator[Callable[[Frames], Iterator[np.ndarray]]]:
    """While entered, a session's rustymimi works on a thread; other codecs stay where they are.

    Whoever leaves the frames before their end steps `session.codec.announced` too, or the codec
    has heard more than the model.
    """
    codec = session.codec
    if codec is None or codec.name != "rustymimi":
        yield iter
        return
    session.codec = thread = CodecThread(codec)
    try:
        yield lambda frames: one_ahead(thread, frames)
    finally:
        thread.close()
        session.codec = codec
