"""Audio files in and out: any format and rate to 24 kHz frames; a WAV that survives a crash.

What lives here: :func:`read_audio` (a whole file), :func:`iter_frames` (a file of any length, one
80 ms frame at a time), :class:`WavWriter`. What does not: sound devices, and the neural codec.

    with iter_frames("talk.mp3") as frames, WavWriter("reply.wav", channels=2) as out:
        for user in frames:                             # float32 [1920]
            out.write(np.stack([reply_to(user), user]))

soundfile (libsndfile) decodes and soxr resamples. sphn, which moshi_mlx already brings, was tried
first: sphn 0.2.1 reads no Ogg Opus through ``read``, counts an MP3's encoder padding as sound,
reads paths only, and has no reader of bounded memory that also resamples.
"""

import errno
import logging
import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from .errors import UserError

SAMPLE_RATE = 24_000
"""Samples per second of everything past this file."""

FRAME_SIZE = 1_920
"""Samples in one frame: 80 ms at 24 kHz."""

FRAMES_PER_SECOND = SAMPLE_RATE / FRAME_SIZE
FRAME_SECONDS = FRAME_SIZE / SAMPLE_RATE
FRAME_MS = 1000 * FRAME_SIZE / SAMPLE_RATE

SILENCE = np.zeros(FRAME_SIZE, np.float32)
"""A frame of sound in which nothing is said."""

FORMATS = "wav, flac, mp3 or ogg (vorbis or opus)"

_log = logging.getLogger(__name__)
# Bounds memory, not sound: any size gives the same samples.
_BLOCK_SAMPLES = 1 << 16
# libsndfile's SF_COUNT_MAX: a container that does not tell its length.
_UNKNOWN_LENGTH = 2**63 - 1
_HEADER_BYTES = 80


@dataclass(frozen=True)
class Audio:
    """A decoded file.

    Args:
        samples: float32 ``[channels, N]`` at the rate asked for, finite, within -1..1.
        source_rate: samples per second in the file.
        duration: seconds of sound in the file.
    """

    samples: np.ndarray
    source_rate: int
    duration: float


def read_audio(path: str | os.PathLike, sample_rate: int = SAMPLE_RATE) -> Audio:
    """Read a whole file into memory (4 bytes a sample and channel: 3 hours of mono are 1 GB).

    Args:
        path: a file, or ``"-"`` for standard input, which goes through a temporary file, since
            FLAC, MP3 and Ogg decoders seek.
        sample_rate: samples per second of the result.

    Raises:
        UserError: no such file, a directory, empty, not audio, or broken on the way.
    """
    with _Source(path) as source:
        chunks = list(_resample(source.blocks(), source, source.channels, sample_rate))
        samples = np.concatenate([np.empty((0, source.channels), np.float32), *chunks])
        return Audio(
            np.ascontiguousarray(samples.T), source.rate, source.samples_read / source.rate
        )


def iter_frames(
    path: str | os.PathLike,
    frame_size: int = FRAME_SIZE,
    sample_rate: int = SAMPLE_RATE,
    channel: int | None = None,
) -> "FrameReader":
    """Open a file of any length, to be read one mono frame at a time in a ``with`` block.

    Args:
        path: a file, or ``"-"`` for standard input.
        frame_size: samples per frame.
        sample_rate: samples per second of the frames.
        channel: the channel to read, 0 for the left; ``None`` mixes all of them.

    Raises:
        UserError: as :func:`read_audio`; no such channel.
    """
    return FrameReader(path, frame_size, sample_rate, channel)


def to_mono(samples: np.ndarray, channel: int | None = None) -> np.ndarray:
    """Mix ``[channels, N]`` down to float32 ``[N]``, or pick one channel (0 is the left).

    Raises:
        UserError: there is no such channel.
    """
    _check_channel(channel, len(samples))
    return samples.mean(axis=0, dtype=np.float32) if channel is None else samples[channel]


class _Closing(AbstractContextManager):
    """``with`` closes it."""

    def __exit__(self, *_: object) -> None:
        self.close()


class FrameReader(_Closing):
    """Iterate over a file's mono frames, float32 ``[frame_size]``, in memory that does not grow.

    The last frame is filled up with zeros. A reader is read once. Made by :func:`iter_frames`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        frame_size: int,
        sample_rate: int,
        channel: int | None,
    ):
        self.frame_size = frame_size
        self.sample_rate = sample_rate
        self.channel = channel
        self._source = _Source(path)
        try:
            _check_channel(channel, self._source.channels)
        except UserError:
            self.close()
            raise

    @property
    def total_frames(self) -> int | None:
        """Frames to come in all, or None where the container does not tell.

        For a progress bar: a truncated file, or an MP3 without a length tag, may differ.
        """
        if self._source.length is None:
            return None
        # soxr rounds half a sample up.
        samples = math.floor(self._source.length * self.sample_rate / self._source.rate + 0.5)
        return math.ceil(samples / self.frame_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        rest = np.empty(0, np.float32)
        for chunk in _resample(self._mono_blocks(), self._source, 1, self.sample_rate):
            rest = np.concatenate([rest, chunk[:, 0]])
            whole = len(rest) - len(rest) % self.frame_size
            yield from rest[:whole].reshape(-1, self.frame_size)
            rest = rest[whole:]
        if len(rest):
            yield np.pad(rest, (0, self.frame_size - len(rest)))

    def _mono_blocks(self) -> Iterator[np.ndarray]:
        for block in self._source.blocks():
            yield to_mono(block.T, self.channel)[:, None]

    def close(self) -> None:
        """Close the file."""
        self._source.close()


class WavWriter(_Closing):
    """Write 16-bit PCM WAV as it comes: after every ``write`` the file is complete and valid.

    Samples go to the operating system before the header counts them, with no buffer of our own, so
    a crash or a full disk loses nothing that was counted. Past 4 GiB (12 hours of stereo) the
    header turns into RF64, the same file with 64-bit sizes.

    Args:
        path: file to create or replace.
        channels: 1, or 2 for left Moshi and right user.
        sample_rate: samples per second.

    Raises:
        UserError: the file cannot be made or written, or the disk is full.
    """

    def __init__(self, path: str | os.PathLike, channels: int = 1, sample_rate: int = SAMPLE_RATE):
        self.path = Path(path)
        self.channels = channels
        self.sample_rate = sample_rate
        self._data_bytes = 0
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._write_header()
        except UserError:
            self.close()
            raise

    @property
    def samples_written(self) -> int:
        """Samples per channel in the file so far."""
        return self._data_bytes // (2 * self.channels)

    def write(self, samples: np.ndarray) -> None:
        """Append float ``[channels, N]`` (mono: or ``[N]``), clipped to -1..1; NaN is silence.

        Raises:
            UserError: the disk is full or gone. What was written before stays a valid file.
        """
        samples = np.atleast_2d(samples)
        if samples.ndim != 2 or len(samples) != self.channels:
            raise ValueError(
                f"[WavWriter] expected samples [{self.channels}, N], found {list(samples.shape)}"
            )
        self._append(memoryview(_to_int16(samples).T.tobytes()))

    def _append(self, data: memoryview) -> None:
        position, done, failure = _HEADER_BYTES + self._data_bytes, 0, None
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], position + done)
        except OSError as error:
            failure = error
        # A full disk may have taken part of the data: count whole samples of all channels.
        self._data_bytes += done - done % (2 * self.channels)
        self._write_header()
        if failure:
            raise self._failure(failure) from failure

    def _write_header(self) -> None:
        try:
            os.pwrite(self._fd, _wav_header(self._data_bytes, self.channels, self.sample_rate), 0)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(
                f"{self.path}: no space left after "
                f"{self.samples_written / self.sample_rate:.1f} s; "
                "those are kept. Free some space, or write elsewhere."
            )
        return UserError(f"{self.path}: cannot write this WAV file: {error.strerror}")

    def close(self) -> None:
        """Close the file. Nothing is pending: ``write`` leaves it complete."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _to_int16(samples: np.ndarray) -> np.ndarray:
    # 32768, not 32767: libsndfile reads k back as k / 32768, so 16-bit sound copies bit for bit.
    full_scale = np.clip(np.nan_to_num(samples), -1.0, 1.0) * 32768.0
    return np.minimum(np.rint(full_scale), 32767).astype("<i2")


def _wav_header(data_bytes: int, channels: int, sample_rate: int) -> bytes:
    """80 bytes: RIFF, a JUNK chunk as room for RF64's 64-bit sizes (EBU 3306), fmt, data."""
    fmt = struct.pack(
        "<HHIIHH", 1, channels, sample_rate, sample_rate * channels * 2, 2 * channels, 16
    )
    riff_bytes = 72 + data_bytes
    if riff_bytes < 2**32:
        root, spare, sizes = b"RIFF", b"JUNK" + struct.pack("<I28x", 28), (riff_bytes, data_bytes)
    else:
        ds64 = struct.pack("<QQQI", riff_bytes, data_bytes, data_bytes // (2 * channels), 0)
        root, spare, sizes = b"RF64", b"ds64" + struct.pack("<I", 28) + ds64, (2**32 - 1,) * 2
    head = root + struct.pack("<I", sizes[0]) + b"WAVE" + spare
    return head + b"fmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", sizes[1])


def _check_channel(channel: int | None, channels: int) -> None:
    if channel is not None and not 0 <= channel < channels:
        raise UserError(
            f"expected a channel from 0 to {channels - 1} (0 is the left), found {channel}: "
            f"this file has {channels}"
        )


def _resample(
    blocks: Iterator[np.ndarray], source: "_Source", channels: int, rate: int
) -> Iterator[np.ndarray]:
    """Turn blocks ``[n, channels]`` at the source's rate into blocks at ``rate``, within -1..1."""
    if source.rate == rate:
        yield from blocks
        return
    try:
        stream = soxr.ResampleStream(source.rate, rate, channels, dtype="float32")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{source.name}: cannot resample from {source.rate} Hz: {error}") from error
    for block in blocks:
        yield _clip(stream.resample_chunk(block))
    yield _clip(stream.resample_chunk(np.empty((0, channels), np.float32), last=True))


def _clip(samples: np.ndarray) -> np.ndarray:
    # A resampler rings past full scale on loud sound.
    return np.clip(samples, -1.0, 1.0)


class _ForwardFile(soundfile.SoundFile):
    """A SoundFile that is read from front to back.

    soundfile seeks to where it already is after each read. In an Opus file that changes the
    samples, and in a FLAC file without a length it fails, so this one says that it cannot seek.
    """

    def seekable(self) -> bool:
        return False


class _Source(_Closing):
    """An open audio file: its facts, and its samples block by block, repaired and counted."""

    def __init__(self, path: str | os.PathLike):
        self.name = "standard input" if str(path) == "-" else str(path)
        self._file = _open_stdin() if str(path) == "-" else _open_file(Path(path))
        try:
            self._sound = self._open_sound()
        except UserError:
            self._file.close()
            raise
        self.rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        self.length = None if self._sound.frames == _UNKNOWN_LENGTH else self._sound.frames
        self.samples_read = 0

    def _open_sound(self) -> _ForwardFile:
        if os.fstat(self._file.fileno()).st_size == 0:
            raise UserError(f"{self.name}: expected {FORMATS}, found an empty file (0 bytes)")
        try:
            # By descriptor: given a name, soundfile trusts its ending over what the file holds.
            return _ForwardFile(self._file.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            raise UserError(
                f"{self.name}: expected {FORMATS}, found nothing that decodes as audio: "
                "convert it first, for example with ffmpeg"
            ) from error

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield float32 ``[n, channels]``, finite and within -1..1; warn once, at the end.

        Raises:
            UserError: the file breaks off in a way that its decoder cannot bridge.
        """
        broken = clipped = 0
        while len(block := self._read()):
            self.samples_read += len(block)
            bad = ~np.isfinite(block)
            block[bad] = 0.0
            broken += int(np.count_nonzero(bad))
            clipped += int(np.count_nonzero(np.abs(block) > 1.0))
            yield _clip(block)
        self._warn(broken, "NaN or infinite; they became silence")
        self._warn(clipped, "beyond -1..1; they were clipped")

    def _read(self) -> np.ndarray:
        # At most a second: a low rate grows when resampled.
        size = max(1, min(_BLOCK_SAMPLES // self.channels, self.rate))
        try:
            return self._sound.read(size, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UserError(
                f"{self.name}: broken after {self.samples_read / self.rate:.1f} s: expected more "
                f"{self._sound.format} data, found none that decodes. Repair or convert it first."
            ) from error

    def _warn(self, count: int, what: str) -> None:
        if count:
            _log.warning("%s: %d samples were %s", self.name, count, what)

    def close(self) -> None:
        self._sound.close()
        self._file.close()


def _open_file(path: Path) -> BinaryIO:
    if path.is_dir():
        raise UserError(f"{path}: expected an audio file ({FORMATS}), found a directory")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: expected an audio file ({FORMATS}), found no such file"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot read this file: {error.strerror}") from error


def _open_stdin() -> BinaryIO:
    if sys.stdin.isatty():
        raise UserError(f"standard input: expected piped audio ({FORMATS}), found a terminal")
    try:
        with ExitStack() as cleanup:
            file = cleanup.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.seek(0)
            cleanup.pop_all()
            return file
    except OSError as error:
        raise UserError(f"standard input: cannot keep it in a file: {error.strerror}") from error
