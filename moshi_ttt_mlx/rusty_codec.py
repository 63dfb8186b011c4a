"""Kyutai's rustymimi as a codec that never reaches the end of its position table.

What lives here: when a tokenizer is replaced by the next one, and how a talk is resumed bit for
bit. What does not: the protocol (`codec.py`), Mimi on MLX (`mlx_codec.py`).

A `rustymimi.Tokenizer` raises once its RoPE table is used up (8,192 steps = 4,096 frames = 327 s),
its key/value cache grows until then, its `reset()` leaves the position where it is, and its state
cannot be read. So time is cut into epochs. Epoch `e` covers frames `[e * epoch, (e + 1) * epoch)`
and is served by a new tokenizer that has listened to the `warmup` frames before it, in a second
thread:

    frame      0 ............... epoch ............... 2 * epoch ...............
    epoch 0    [serves          ]
    epoch 1             [warms up|serves              ]
    epoch 2                                    [warms up|serves  ...

The seams are fixed in time, so the state at frame `n` is a function of the frames since the serving
tokenizer's start: these frames *are* the saved state, and resuming is listening to them again.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
import rustymimi

from .codec_checks import check_codes, check_pcm, check_state
from .errors import UserError
from .mimi_weights import fingerprint

STEPS_PER_FRAME = 2  # Mimi's transformers run at 25 Hz, its frames at 12.5 Hz
FRAME_SIZE = 1920
BINS = 2048  # entries of a codebook

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Grid:
    """Where the seams are, in frames."""

    epoch: int
    warmup: int

    def __post_init__(self) -> None:
        if not 1 <= self.warmup <= self.epoch:
            raise ValueError(
                f"[Grid] warmup must be in 1..epoch, got {self.warmup} of {self.epoch}"
            )

    def start(self, epoch: int) -> int:
        """The first frame that this epoch's tokenizer hears."""
        return max(0, epoch * self.epoch - self.warmup)

    def end(self, epoch: int) -> int:
        """The first frame that it does not serve any more."""
        return (epoch + 1) * self.epoch

    @property
    def steps(self) -> int:
        """Positions one tokenizer needs: its table and its key/value cache are this long."""
        return STEPS_PER_FRAME * (self.epoch + self.warmup)


class _Tokenizer:
    """A `rustymimi.Tokenizer` with flat arrays in and out, for several threads."""

    def __init__(self, path: Path, codebooks: int, steps: int):
        try:
            self._it = rustymimi.Tokenizer(str(path), num_codebooks=codebooks, max_seq_len=steps)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"codec weights: {path} is not Kyutai's Mimi with {codebooks} codebooks ({reason})"
            ) from error
        self._lock = (
            Lock()
        )  # rustymimi refuses a second call while one runs, even in the other direction

    def encode(self, pcm: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._it.encode_step(pcm[None, None])[0, :, 0].astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._it.decode_step(codes.astype(np.uint32)[None, :, None])[0, 0]


class _Tokenizers:
    """Makes the tokenizer of an epoch; the two directions share it while both are in that epoch."""

    def __init__(self, path: Path, grid: Grid):
        self.path, self.grid = path, grid
        self.thread = ThreadPoolExecutor(1, "codec-warmup")  # rustymimi lets go of the GIL
        self._alive: WeakValueDictionary[tuple[int, int], _Tokenizer] = WeakValueDictionary()

    def of(self, epoch: int, codebooks: int) -> _Tokenizer:
        tokenizer = self._alive.get((epoch, codebooks))
        if tokenizer is None:
            tokenizer = _Tokenizer(self.path, codebooks, self.grid.steps)
            self._alive[epoch, codebooks] = tokenizer
        return tokenizer


class _Direction:
    """Encoding or decoding of one stream: who serves, who warms up, and what they have heard."""

    def __init__(self, tokenizers: _Tokenizers, codebooks: int, step: Callable, epoch: int = 0):
        self.codebooks, self.epoch = codebooks, epoch
        self.frames = tokenizers.grid.start(epoch)
        self.heard: list[np.ndarray] = []  # all frames since the serving tokenizer's start
        self._tokenizers, self._step = tokenizers, step
        self._serving = tokenizers.of(epoch, codebooks)
        self._next: _Tokenizer | None = None
        self._warming: Future | None = None

    def run(self, frame: np.ndarray) -> np.ndarray:
        grid = self._tokenizers.grid
        if self.frames == grid.start(self.epoch + 1):
            self._next = self._tokenizers.of(self.epoch + 1, self.codebooks)
        if self._next is not None:
            self._warm_up(frame)
        out = self._step(self._serving, frame)
        self.heard.append(frame)
        self.frames += 1
        if self.frames == grid.end(self.epoch):
            self._roll_over(grid)
        return out

    def _warm_up(self, frame: np.ndarray) -> None:
        if self._warming is not None:
            self._warming.result()  # never more than one frame behind
        self._warming = self._tokenizers.thread.submit(self._step, self._next, frame)

    def _roll_over(self, grid: Grid) -> None:
        self._warming.result()
        self._serving, self._next, self._warming = self._next, None, None
        self.epoch += 1
        del self.heard[: -grid.warmup]


class RustyCodec:
    """`codec.Codec` on rustymimi: Kyutai's standard Mimi on the CPU, in Rust.

    One tokenizer is alive, two while the next one warms up: its weights and caches are then in
    memory twice (figures: `docs/codec.md`).

    Args:
        path: Mimi's `.safetensors` file.
        num_codebooks: codebooks of `encode`. Default: 8.
        epoch, warmup: frames between seams, and frames that a tokenizer hears before it serves.

    Raises:
        UserError: the file is missing, broken or not Kyutai's Mimi.
    """

    name = "rustymimi"
    sample_rate = 24000
    frame_size = FRAME_SIZE

    def __init__(
        self, path: str | Path, num_codebooks: int = 8, epoch: int = 375, warmup: int = 125
    ):
        self.path, self.num_codebooks = Path(path), num_codebooks
        self.grid = Grid(epoch, warmup)
        self._weights = fingerprint(self.path)
        self.reset()

    def reset(self) -> None:
        """Start over with a new tokenizer: equal to a fresh codec, bit for bit."""
        self._tokenizers = _Tokenizers(self.path, self.grid)
        self._encoding = _Direction(self._tokenizers, self.num_codebooks, _Tokenizer.encode)
        self._decoding: _Direction | None = None

    def fresh(self) -> "RustyCodec":
        """Another stream from the same file. rustymimi cannot share weights between tokenizers."""
        return RustyCodec(self.path, self.num_codebooks, self.grid.epoch, self.grid.warmup)

    def encode(self, pcm: np.ndarray) -> np.ndarray:
        """One frame: float32 `[1920]` -> int32 `[K]`."""
        check_pcm(self, pcm)
        return self._encoding.run(np.array(pcm, np.float32))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """One frame: int `[K']` -> float32 `[1920]`; `K' <= K`, the same for a whole stream.

        With `K' < K` decoding needs a tokenizer of its own: the weights are in memory once more.
        """
        check_codes(self, codes, BINS)
        if self._decoding is None:
            self._decoding = _Direction(self._tokenizers, len(codes), _Tokenizer.decode)
        if len(codes) != self._decoding.codebooks:
            raise ValueError(
                f"[{self.name}] this stream began with {self._decoding.codebooks} codes a frame, "
                f"got {len(codes)}"
            )
        return self._decoding.run(np.array(codes, np.int32))

    # -- state --------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """What both directions have heard since their tokenizers' start, and where they are.

        Returns:
            Arrays `pcm` float32 `[N, 1920]` and `codes` int32 `[M, K']`, at most `epoch + warmup`
            frames each and absent where there are none; and string metadata.
        """
        arrays = {}
        meta = {
            "backend": self.name,
            "weights": self._weights,
            "num_codebooks": str(self.num_codebooks),
            "epoch": str(self.grid.epoch),
            "warmup": str(self.grid.warmup),
            "encoder_epoch": str(self._encoding.epoch),
        }
        if self._encoding.heard:  # mlx cannot write an empty array to a file
            arrays["pcm"] = np.stack(self._encoding.heard)
        if self._decoding is not None:
            arrays["codes"] = np.stack(self._decoding.heard)
            meta["decoder_epoch"] = str(self._decoding.epoch)
        return arrays, meta

    def load_state(
        self,
        arrays: dict[str, np.ndarray],
        meta: dict[str, str],
        progress: Progress | None = None,
    ) -> None:
        """Go on from `state()` bit for bit, by listening again to what was heard.

        Args:
            arrays, meta: what `state()` returned. The seams stay where they were.
            progress: called with (frames done, frames in all).

        Raises:
            UserError: the state of another backend, other weights or another number of codebooks.
        """
        check_state(meta, backend=self.name, weights=self._weights, codebooks=self.num_codebooks)
        self.grid = Grid(int(meta["epoch"]), int(meta["warmup"]))
        self._tokenizers = _Tokenizers(self.path, self.grid)
        self._encoding = _Direction(
            self._tokenizers, self.num_codebooks, _Tokenizer.encode, int(meta["encoder_epoch"])
        )
        work = [(self._encoding, frame) for frame in arrays.get("pcm", ())]
        self._decoding = None
        if "codes" in arrays:
            codes = arrays["codes"]
            self._decoding = _Direction(
                self._tokenizers, codes.shape[1], _Tokenizer.decode, int(meta["decoder_epoch"])
            )
            work += [(self._decoding, frame) for frame in codes]
        for done, (direction, frame) in enumerate(work):
            direction.run(frame)
            if progress is not None:
                progress(done + 1, len(work))
