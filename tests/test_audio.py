"""Any audio file in, frame by frame; a WAV out that is valid whenever one looks."""

import io
import json
import logging
import os
import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import moshi_ttt_mlx
from moshi_ttt_mlx.audio import (
    FRAME_SIZE,
    SAMPLE_RATE,
    WavWriter,
    iter_frames,
    read_audio,
    to_mono,
)
from moshi_ttt_mlx.errors import UserError

# Container, codec, and the largest error of a decoded 0.4 sine at 48 kHz: half a step or a step of
# rounding for the exact ones; for the lossy ones a bound that a shift by one sample breaks (it
# costs 0.4 * 2 pi 440 / 48000 = 0.023). 48 kHz: Opus written at 24 kHz comes back a sample late.
CODECS = {
    "wav": ("WAV", "PCM_16", 2**-15),
    "wav-float": ("WAV", "FLOAT", 1e-7),
    "wav-24": ("WAV", "PCM_24", 2**-23),
    "flac": ("FLAC", "PCM_16", 2**-15),
    "mp3": ("MP3", "MPEG_LAYER_III", 0.02),
    "vorbis": ("OGG", "VORBIS", 0.02),
    "opus": ("OGG", "OPUS", 0.02),
}
CLIP = Path(moshi_ttt_mlx.__file__).parent / "assets" / "demo_clip.flac"


def sine(seconds, rate=SAMPLE_RATE, hertz=440.0, level=0.4):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        "f4"
    )


def save(path, samples, rate=SAMPLE_RATE, codec="wav"):
    """Write ``[N]`` or ``[channels, N]``; with soundfile, never with the code under test."""
    container, subtype, _ = CODECS[codec]
    soundfile.write(path, np.asarray(samples).T, rate, format=container, subtype=subtype)
    return path


def frames_of(path, **kwargs):
    with iter_frames(path, **kwargs) as reader:
        return reader.total_frames, [frame.copy() for frame in reader]


def middle(samples, rate=SAMPLE_RATE):
    """Without the first and last 50 ms, where lossy codecs and resamplers fade."""
    return samples[..., rate // 20 : -rate // 20]


# ---- reading


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_mono_and_stereo(tmp_path, codec, channels):
    sound = np.stack([sine(1.0, 48000), sine(1.0, 48000, hertz=660.0)])[:channels]
    audio = read_audio(save(tmp_path / "a", sound, 48000, codec), sample_rate=48000)
    assert audio.samples.dtype == np.float32 and audio.samples.shape == sound.shape
    assert (audio.source_rate, audio.duration) == (48000, 1.0)
    error = np.abs(middle(audio.samples, 48000) - middle(sound, 48000)).max()
    assert error < CODECS[codec][2]


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_every_rate_becomes_24_khz(tmp_path, rate):
    audio = read_audio(save(tmp_path / "a.wav", sine(1.0, rate), rate, "wav-float"))
    assert audio.samples.shape == (1, SAMPLE_RATE)
    assert (audio.source_rate, audio.duration) == (rate, 1.0)
    # soxr's high quality holds about 20 bits; a straight line between samples misses by 1e-3.
    assert np.abs(middle(audio.samples[0]) - middle(sine(1.0))).max() < 1e-5


def test_resampling_leaves_no_alias(tmp_path):
    too_high = sine(1.0, 48000, hertz=15_000.0)  # above 12 kHz: nothing of it may come through
    audio = read_audio(save(tmp_path / "a.wav", too_high, 48000, "wav-float"))
    assert np.abs(middle(audio.samples)).max() < 1e-4


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rate", [24000, 48000])
def test_frames_equal_the_whole_file(tmp_path, codec, rate):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 5 * rate + 77)).astype("f4")
    path = save(tmp_path / "a", noise, rate, codec)
    whole = to_mono(read_audio(path).samples)
    total, frames = frames_of(path)
    assert {frame.shape for frame in frames} == {(FRAME_SIZE,)}
    assert len(frames) == total == -(-len(whole) // FRAME_SIZE)
    joined = np.concatenate(frames)
    # The mix is made before resampling there and after it here: float32 rounding, no more.
    assert np.abs(joined[: len(whole)] - whole).max() < 1e-6
    assert not joined[len(whole) :].any()


def test_opus_read_in_blocks_equals_opus_read_at_once(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 5 * SAMPLE_RATE).astype("f4")
    path = save(tmp_path / "a.ogg", noise, codec="opus")
    at_once, _ = soundfile.read(path, dtype="float32")
    assert np.array_equal(read_audio(path).samples[0], np.clip(at_once, -1, 1))


@settings(max_examples=40)
@given(
    count=st.integers(0, 9000),
    rate=st.sampled_from([8000, 16000, 24000, 44100]),
    frame_size=st.sampled_from([1, 480, 1920]),
)
def test_total_frames_is_what_comes(tmp_path_factory, count, rate, frame_size):
    path = save(tmp_path_factory.mktemp("a") / "a.wav", np.ones(count) * 0.1, rate)
    total, frames = frames_of(path, frame_size=frame_size)
    assert len(frames) == total


def test_channels_are_mixed_or_picked(tmp_path):
    left, right = sine(0.2), sine(0.2, hertz=660.0)
    path = save(tmp_path / "a.wav", np.stack([left, right]), codec="wav-float")
    for channel, expected in ((None, (left + right) / 2), (0, left), (1, right)):
        joined = np.concatenate(frames_of(path, channel=channel)[1])[: len(left)]
        assert np.abs(joined - expected).max() < 1e-7
        assert np.array_equal(to_mono(read_audio(path).samples, channel), joined)
    with pytest.raises(UserError, match=r"channel from 0 to 1 .*found 2"):
        iter_frames(path, channel=2)


def test_a_container_without_a_length_is_read_to_its_end(tmp_path):
    path = save(tmp_path / "a.flac", sine(1.0), codec="flac")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO's 36 bits of total samples, as a piped encoder leaves them
    data[22:26] = bytes(4)
    path.write_bytes(data)
    total, frames = frames_of(path)
    assert total is None and len(frames) == 13


# ---- odd input


def test_silence_stays_silent(tmp_path, caplog):
    path = save(tmp_path / "a.wav", np.zeros(5000))
    _, frames = frames_of(path)
    assert len(frames) == 3 and not np.any(frames) and not caplog.records


@pytest.mark.parametrize("rate", [24000, 16000, 48000])
def test_no_samples_and_one_sample(tmp_path, rate):
    empty = save(tmp_path / "0.wav", np.zeros((2, 0)), rate)
    assert read_audio(empty).samples.shape == (2, 0) and read_audio(empty).duration == 0
    assert frames_of(empty) == (0, [])
    one = save(tmp_path / "1.wav", np.full(1, 0.5), rate)
    assert read_audio(one).samples.shape[0] == 1 and read_audio(one).duration == 1 / rate
    total, frames = frames_of(one)
    assert total == len(frames) == 1 and frames[0].shape == (FRAME_SIZE,)


def test_broken_samples_become_silence_with_one_warning(tmp_path, caplog):
    sound = np.tile(sine(5.0), (2, 1))
    sound[0, [0, 70_000]] = np.nan, np.inf
    sound[1, 119_999] = -np.inf
    audio = read_audio(save(tmp_path / "a.wav", sound, codec="wav-float"))
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == [
        "3 samples were NaN or infinite; they became silence"
    ]
    assert audio.samples[0, 0] == audio.samples[0, 70_000] == audio.samples[1, 119_999] == 0
    good = np.isfinite(sound)
    assert np.array_equal(audio.samples[good], sound[good])


@pytest.mark.parametrize("rate", [24000, 16000])
def test_samples_past_full_scale_are_clipped_with_one_warning(tmp_path, caplog, rate):
    sound = sine(4.0, rate)
    sound[[5, 60_000]] = 1e30, -1.5
    _, frames = frames_of(save(tmp_path / "a.wav", sound, rate, "wav-float"))
    assert [(r.levelno, r.getMessage().split(": ")[1]) for r in caplog.records] == [
        (logging.WARNING, "2 samples were beyond -1..1; they were clipped")
    ]
    assert np.abs(frames).max() <= 1.0


def test_full_scale_stays_within_full_scale_when_resampled(tmp_path, caplog):
    square = np.sign(sine(0.5, 16000))
    audio = read_audio(save(tmp_path / "a.wav", square, 16000, "wav-float"))
    assert np.abs(audio.samples).max() == 1.0 and not caplog.records


def wav_bytes(samples, rate=SAMPLE_RATE, codec="wav"):
    file = io.BytesIO()
    container, subtype, _ = CODECS[codec]
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_from_a_pipe_does_not_know_its_size(tmp_path, size):
    data = bytearray(wav_bytes(sine(1.0)))
    data[4:8] = data[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    total, frames = frames_of(tmp_path / "a.wav")
    assert total == len(frames) == 13


def test_a_truncated_wav_gives_what_is_there(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(sine(1.0))[: 44 + 2 * 12_000])
    assert read_audio(tmp_path / "a.wav").duration == 0.5


NOT_AUDIO = {
    "empty": b"",
    "text": b"The quick brown fox.\n" * 500,
    "zeros": bytes(5000),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8,
    "half a header": wav_bytes(sine(0.1))[:20],
    "rate 0": wav_bytes(sine(0.1))[:24] + bytes(4) + wav_bytes(sine(0.1))[28:],
}


@pytest.mark.parametrize("what", NOT_AUDIO)
@pytest.mark.parametrize("suffix", ["wav", "mp3", "raw"])
def test_what_is_not_audio_is_said_in_one_line(tmp_path, what, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(NOT_AUDIO[what])
    for read in (read_audio, iter_frames):
        with pytest.raises(UserError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: expected wav, flac, mp3 or ogg (vorbis or opus), found")
        assert "\n" not in message


@settings(max_examples=60)
@given(data=st.binary(max_size=400), head=st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, head):
    path = tmp_path_factory.mktemp("a") / "a.mp3"
    path.write_bytes(head + data)
    try:
        audio = read_audio(path)
    except UserError:
        return
    assert np.isfinite(audio.samples).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "found a directory"), ("nothing.wav", "found no such file")],
)
def test_no_file(tmp_path, name, message):
    with pytest.raises(UserError, match=rf"expected an audio file \(wav, flac.*{message}"):
        read_audio(tmp_path / name)


def test_a_file_that_breaks_off_says_where(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 10 * SAMPLE_RATE)
    path = save(tmp_path / "a.flac", noise, codec="flac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = []
    with pytest.raises(UserError, match=r"broken after [2-5]\.\d s"), iter_frames(path) as reader:
        frames.extend(reader)
    assert len(frames) > 25  # what came before the break was given


# ---- standard input


@pytest.mark.parametrize("codec", CODECS)
def test_standard_input_in_any_format(tmp_path, monkeypatch, codec):
    path = save(tmp_path / "a", sine(1.0), codec=codec)
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read())))
    piped = read_audio("-")
    assert np.array_equal(piped.samples, read_audio(path).samples)


def test_a_real_pipe(tmp_path):
    path = save(tmp_path / "a.mp3", sine(1.0), codec="mp3")
    code = (
        "from moshi_ttt_mlx.audio import iter_frames\n"
        "with iter_frames('-') as reader: print(reader.total_frames, len(list(reader)))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, input=path.read_bytes(), capture_output=True, check=True)
    assert done.stdout.split() == [b"13", b"13"]


def test_nothing_on_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(UserError, match=r"standard input: expected wav.*empty"):
        read_audio("-")


# ---- long input

THREE_HOURS = 3 * 3600

PEAK = """
import json, resource, sys
from moshi_ttt_mlx.audio import iter_frames
def peak():
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
def count(path):
    with iter_frames(path) as reader:
        return reader.total_frames, sum(1 for _ in reader)
short = count(sys.argv[1]), peak()
print(json.dumps([short, (count(sys.argv[2]), peak())]))
"""


def test_three_hours_take_no_more_memory_than_a_minute(tmp_path):
    # 8 kHz in a sparse file: silence that takes neither disk nor, here, long to read.
    short, long = tmp_path / "short.wav", tmp_path / "long.wav"
    for path, seconds in ((short, 60), (long, THREE_HOURS)):
        data = seconds * 8000 * 2
        head = bytearray(wav_bytes(np.zeros(0), 8000))
        head[4:8], head[40:44] = struct.pack("<I", 36 + data), struct.pack("<I", data)
        path.write_bytes(head)
        os.truncate(path, len(head) + data)
    run = [sys.executable, "-c", PEAK, short, long]
    done = subprocess.run(run, capture_output=True, check=True)
    (short_count, short_peak), (long_count, long_peak) = json.loads(done.stdout)
    assert short_count == [60 * 12.5, 60 * 12.5]
    assert long_count == [THREE_HOURS * 12.5, THREE_HOURS * 12.5]
    # All of it would be 1 GB; 10 MB is room for the allocator.
    assert long_peak - short_peak < 10e6


# ---- writing


def test_a_16_bit_file_copies_bit_for_bit(tmp_path):
    ints = np.random.default_rng(0).integers(-32768, 32768, (2, 5000)).astype("<i2")
    with WavWriter(tmp_path / "a.wav", channels=2) as out:
        out.write(ints / np.float32(32768))
    with wave.open(str(tmp_path / "a.wav")) as file:  # Python's own reader
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 24000, 5000)
        assert file.readframes(5000) == ints.T.tobytes()
    assert np.array_equal(read_audio(tmp_path / "a.wav").samples, ints / np.float32(32768))


@pytest.mark.parametrize("channels", [1, 2])
def test_the_file_is_valid_after_every_write(tmp_path, channels):
    path = tmp_path / "a.wav"
    sound = np.stack([sine(0.4), -sine(0.4)])[:channels]
    out = WavWriter(path, channels)
    assert read_audio(path).samples.shape == (channels, 0)
    for end in range(FRAME_SIZE, sound.shape[1] + 1, FRAME_SIZE):
        out.write(sound[:, end - FRAME_SIZE : end])
        assert np.abs(read_audio(path).samples - sound[:, :end]).max() <= 2**-16
        assert path.stat().st_size == 80 + 2 * channels * end
        assert out.samples_written == end
    out.close()
    out.close()


def test_a_killed_program_leaves_what_it_wrote(tmp_path):
    code = (
        "import os, signal, sys\n"
        "import numpy as np\n"
        "from moshi_ttt_mlx.audio import WavWriter\n"
        "out = WavWriter(sys.argv[1])\n"
        "for _ in range(7): out.write(np.full(1920, 0.5))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.wav"], check=False)
    samples = read_audio(tmp_path / "a.wav").samples
    assert samples.shape == (1, 7 * 1920) and (samples == 0.5).all()


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path):
    path = tmp_path / "a.wav"
    code = (
        "import resource, sys\n"
        "import numpy as np\n"
        "from moshi_ttt_mlx.audio import WavWriter\n"
        # Ends inside the third frame, and inside one sample of it: 1 byte of 4.
        "limit = 80 + 4 * (2 * 1920 + 500) + 1\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "out = WavWriter(sys.argv[1], channels=2)\n"
        "for _ in range(5): out.write(np.full((2, 1920), 0.5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert f"UserError: {path}: no space left after 0.2 s; those are kept" in done.stderr
    counted = struct.unpack("<I", path.read_bytes()[76:80])[0]
    assert counted == 4 * (2 * 1920 + 500)  # whole samples only: the odd byte is not one
    samples = read_audio(path).samples
    assert samples.shape == (2, 2 * 1920 + 500) and (samples == 0.5).all()


def test_loud_and_broken_samples_do_not_wrap(tmp_path):
    with WavWriter(tmp_path / "a.wav") as out:
        out.write(np.array([2.0, -2.0, np.nan, np.inf, -np.inf, 1.0], np.float32))
    ints, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert ints.tolist() == [32767, -32768, 0, 32767, -32768, 32767]


def test_past_4_gib_the_header_counts_in_64_bits(tmp_path):
    path = tmp_path / "a.wav"
    samples = 2**31 + 5
    with WavWriter(path) as out:
        out.write(np.zeros(10))
        out._data_bytes = 2 * samples - 20  # as after 24 hours
        out.write(np.full(10, 0.5))
    assert path.stat().st_size == 80 + 2 * samples  # sparse: nothing of it is on disk
    with soundfile.SoundFile(path) as file:
        assert (file.format, file.frames) == ("RF64", samples)
        file.seek(samples - 11)
        assert file.read().tolist() == [0.0] + [0.5] * 10


@pytest.mark.parametrize(
    ("name", "message"), [("no/a.wav", "No such file or directory"), ("", "Is a directory")]
)
def test_a_place_that_cannot_be_written(tmp_path, name, message):
    with pytest.raises(UserError, match=f"cannot write this WAV file: {message}"):
        WavWriter(tmp_path / name)


def test_the_wrong_number_of_channels_is_a_mistake(tmp_path):
    with (
        WavWriter(tmp_path / "a.wav", channels=2) as out,
        pytest.raises(ValueError, match=r"expected samples \[2, N\], found \[1, 5\]"),
    ):
        out.write(np.zeros(5))


# ---- the bundled clip


def test_the_demo_clip_is_a_few_seconds_of_sound():
    audio = read_audio(CLIP)
    assert audio.samples.shape == (1, 198_960) and audio.source_rate == SAMPLE_RATE
    assert 0.03 < np.sqrt(np.mean(audio.samples**2)) < 0.2
    assert CLIP.stat().st_size < 400_000
    assert CLIP.name in (CLIP.parent / "LICENSES.md").read_text()
