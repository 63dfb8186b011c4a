"""Any device becomes 24 kHz mono frames, and what is wrong with a device is said in one line."""

import ctypes
import os
import sys
from ctypes.util import find_library
from types import SimpleNamespace

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st

from moshi_ttt_mlx import devices
from moshi_ttt_mlx.audio import FRAME_SIZE, SAMPLE_RATE
from moshi_ttt_mlx.devices import (
    Device,
    Framer,
    Loudspeaker,
    Microphone,
    Resampler,
    describe_devices,
    find_device,
)
from moshi_ttt_mlx.errors import UserError

RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000]


class PortAudioError(Exception):
    pass


class FakeStream:
    """Remembers how it was opened; a test calls its callback."""

    opened = None

    def __init__(self, **settings):
        if settings["device"] == 9:
            raise PortAudioError("Device unavailable [PaErrorCode -9985]")
        self.settings, self.active, self.latency, self.ending = settings, False, 0.0, None
        FakeStream.opened = self

    def start(self):
        self.active = True

    def stop(self):
        self.ending, self.active = "stop", False

    def abort(self):
        self.ending, self.active = "abort", False

    def close(self):
        pass

    def call(self, block, status=0):
        self.settings["callback"](block, len(block), None, status)
        return block


def entry(name, inputs, outputs, rate=48000.0, host=0):
    return {
        "name": name,
        "max_input_channels": inputs,
        "max_output_channels": outputs,
        "default_samplerate": rate,
        "hostapi": host,
    }


@pytest.fixture
def portaudio(monkeypatch):
    """A sounddevice that has these devices, takes 24 kHz on all but the headset, and opens fakes."""
    table = [
        entry("Built-in Microphone", 1, 0),
        entry("Built-in Output", 0, 2),
        entry("USB Interface", 8, 8, 44100.0),
        entry("Headset", 1, 2, 16000.0),
        entry("USB Interface Mini", 2, 2),
    ]

    def check(device, samplerate, **_):
        if device == 3 and samplerate != 16000.0:
            raise PortAudioError("Invalid sample rate")

    fake = SimpleNamespace(
        table=table,
        hosts=[{"name": "ALSA"}],
        default=SimpleNamespace(device=[0, 1]),
        query_devices=lambda: table,
        query_hostapis=lambda: fake.hosts,
        check_input_settings=check,
        check_output_settings=check,
        InputStream=FakeStream,
        OutputStream=FakeStream,
        PortAudioError=PortAudioError,
    )
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def sine(rate, samples, hertz=300.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype("f4")


def cut(samples, sizes):
    """Split samples into blocks of these sizes, again and again."""
    position, number = 0, 0
    while position < len(samples):
        size = sizes[number % len(sizes)]
        yield samples[position : position + size]
        position, number = position + size, number + 1


# ---- resampling


@given(
    st.sampled_from(RATES),
    st.sampled_from(RATES),
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    st.integers(0, 2**31),
)
def test_blocks_of_any_size_become_the_same_sound_as_the_whole(source, target, sizes, seed):
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, 12_000).astype("f4")
    resample = Resampler(source, target)
    streamed = np.concatenate([resample(block) for block in cut(samples, sizes)])
    whole = soxr.resample(samples, source, target)
    # soxr holds up to 105 ms back (seen at 8 kHz); a lost or doubled sample moves all that follow.
    assert len(whole) - 0.15 * target <= len(streamed) <= len(whole)
    # The same filter over the same samples; only float32 rounding may differ.
    assert np.abs(streamed - whole[: len(streamed)]).max(initial=0) < 1e-6


@pytest.mark.parametrize("rate", RATES)
def test_length_and_phase_are_kept_for_a_minute(rate):
    resample = Resampler(rate, SAMPLE_RATE)
    samples = sine(rate, 60 * rate)
    streamed = np.concatenate([resample(block) for block in cut(samples, [rate // 50])])
    assert 60 * SAMPLE_RATE - 2400 <= len(streamed) <= 60 * SAMPLE_RATE
    # The last second: a drift by one sample would cost 0.5 * 2 pi 300 / 24000 = 0.039.
    expected = sine(SAMPLE_RATE, 60 * SAMPLE_RATE)
    last = slice(len(streamed) - SAMPLE_RATE, len(streamed))
    assert np.abs(streamed[last] - expected[last]).max() < 1e-4


def test_24_khz_is_not_touched():
    samples = np.random.default_rng(0).uniform(-1, 1, 480).astype("f4")
    assert np.array_equal(Resampler(SAMPLE_RATE, SAMPLE_RATE)(samples), samples)


@given(st.lists(st.integers(0, 5000), max_size=10))
def test_frames_hold_every_sample_in_order(sizes):
    samples = np.arange(sum(sizes), dtype=np.float32)
    frame, frames = Framer(), []
    for block in np.split(samples, np.cumsum(sizes)[:-1]) if sizes else []:
        frames += list(frame(block))
    assert len(frames) == len(samples) // FRAME_SIZE
    assert np.array_equal(np.concatenate([*frames, []]), samples[: len(frames) * FRAME_SIZE])


# ---- finding


@pytest.mark.parametrize(
    ("kind", "name", "index"),
    [
        ("input", None, 0),
        ("output", None, 1),
        ("input", "2", 2),
        ("output", "head", 3),
        ("output", "BUILT-IN", 1),
        ("input", "mini", 4),
        ("input", "usb interface", 2),  # a whole name goes before a part of another
    ],
)
def test_a_device_is_found_by_number_name_or_part_of_it(portaudio, kind, name, index):
    assert find_device(kind, name).index == index


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("input", "webcam", ["'webcam'", "0 'Built-in Microphone'", "3 'Headset'"]),
        ("input", "1", ["'1'", "0 'Built-in Microphone'"]),  # 1 only plays
        ("output", "usb", ["several", "2 'USB Interface'", "4 'USB Interface Mini'"]),
    ],
)
def test_what_is_not_found_is_answered_with_what_there_is(portaudio, kind, name, words):
    with pytest.raises(UserError) as raised:
        find_device(kind, name)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_a_default_that_does_not_exist_gives_the_first_device(portaudio):
    portaudio.default.device = [-1, -1]
    assert find_device("input").index == 0


@pytest.mark.parametrize(("kind", "word"), [("input", "microphone"), ("output", "loudspeaker")])
def test_no_device_at_all(portaudio, kind, word):
    portaudio.table.clear()
    with pytest.raises(UserError, match=f"no {word}"):
        find_device(kind)
    assert describe_devices() == "input:\n    none\noutput:\n    none"


def test_the_list_marks_what_is_used(portaudio):
    lines = describe_devices().splitlines()
    assert [line for line in lines if "*" in line] == [
        "  *   0  Built-in Microphone  (ALSA, 1 channels, 48000 Hz)",
        "  *   1  Built-in Output  (ALSA, 2 channels, 48000 Hz)",
    ]


def test_without_the_portaudio_library_one_line_says_what_to_install(monkeypatch):
    class Finder:
        def find_spec(self, name, *_):
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(UserError, match="libportaudio2"):
        find_device("input")


# ---- streams


def opened(portaudio, index, kind="input", **changes):
    device = Device(index, "x", kind, *_facts(portaudio, index, kind))
    return (Microphone if kind == "input" else Loudspeaker)(device, **changes)


def _facts(portaudio, index, kind):
    facts = portaudio.table[index]
    return facts[f"max_{kind}_channels"], facts["default_samplerate"], portaudio.hosts[0]["name"]


@pytest.mark.parametrize(
    ("host", "index", "rate", "channels"),
    [
        ("ALSA", 0, 24000, 1),
        ("ALSA", 2, 24000, 2),
        ("ALSA", 3, 16000, 1),  # it does not take 24 kHz
        ("Core Audio", 2, 44100, 2),  # it would say yes to 24 kHz
    ],
)
def test_the_rate_is_24_khz_where_that_is_safe(portaudio, host, index, rate, channels):
    portaudio.hosts[0]["name"] = host
    microphone = opened(portaudio, index)
    microphone.start(lambda frame: None)
    settings = FakeStream.opened.settings
    assert (settings["samplerate"], settings["channels"]) == (rate, channels)
    assert settings["blocksize"] == rate // 50


@pytest.mark.parametrize(("host", "burst"), [("ALSA", 1440), ("Core Audio", 0)])
def test_only_alsa_takes_its_sound_in_bursts(portaudio, host, burst):
    portaudio.hosts[0]["name"] = host
    assert opened(portaudio, 1, "output").burst == burst


def test_a_stereo_microphone_is_heard_on_either_side(portaudio):
    frames = []
    microphone = opened(portaudio, 2)
    microphone.start(frames.append)
    right_only = np.stack([np.zeros(FRAME_SIZE), np.full(FRAME_SIZE, 0.5)], axis=1).astype("f4")
    FakeStream.opened.call(right_only)
    assert len(frames) == 1 and (frames[0] == 0.25).all() and frames[0].dtype == np.float32


def test_a_16_khz_microphone_gives_24_khz_frames(portaudio):
    frames = []
    microphone = opened(portaudio, 3)
    microphone.start(frames.append)
    for block in cut(sine(16000, 32000), [320]):
        FakeStream.opened.call(block[:, None])
    assert len(frames) in (24, 25)  # two seconds less what the filter holds
    heard = np.concatenate(frames)
    # Past the filter's first 20 ms; a late or early sample would cost 0.039.
    assert np.abs(heard - sine(SAMPLE_RATE, len(heard)))[480:].max() < 1e-3
    assert microphone.calls == 100


@pytest.mark.parametrize("rate", [16000, 24000, 44100, 48000])
def test_a_loudspeaker_of_any_rate_plays_all_in_order_on_both_sides(portaudio, rate):
    source = sine(SAMPLE_RATE, 2 * SAMPLE_RATE)
    asked = []

    def fetch(count):
        asked.append(count)
        return source[sum(asked) - count : sum(asked)]

    loudspeaker = opened(portaudio, 1, "output", rate=rate)
    loudspeaker.start(fetch)
    size = rate // 50
    blocks = [FakeStream.opened.call(np.empty((size, 2), np.float32)) for _ in range(90)]
    played = np.concatenate(blocks)
    assert np.array_equal(played[:, 0], played[:, 1])
    expected = sine(rate, len(played))
    # 1e-3 as above; the first 20 ms are the filter's start.
    assert np.abs(played[:, 0] - expected)[size:].max() < 1e-3
    assert sum(asked) <= (90 + 3) * SAMPLE_RATE // 50  # no more ahead than the filter needs


def test_too_loud_a_reply_is_clipped(portaudio):
    loudspeaker = opened(portaudio, 1, "output")
    loudspeaker.start(lambda count: np.full(count, 3.0, np.float32))
    assert (FakeStream.opened.call(np.empty((480, 2), np.float32)) == 1.0).all()


def test_callbacks_and_their_losses_are_counted(portaudio):
    microphone = opened(portaudio, 0)
    microphone.start(lambda frame: None)
    for status in (0, 1, 0, 2):
        FakeStream.opened.call(np.zeros((480, 1), np.float32), status)
    assert (microphone.calls, microphone.glitches) == (4, 2)


def test_a_device_that_does_not_open_is_one_line(portaudio):
    portaudio.table += [entry("spare", 1, 1)] * 5
    microphone = opened(portaudio, 9)
    with pytest.raises(UserError, match=r"cannot open the microphone 'x'.*--input-device"):
        microphone.start(lambda frame: None)
    microphone.stop()  # harmless
    assert not microphone.active


@pytest.mark.parametrize(("end", "ending"), [("stop", "stop"), ("abandon", "abort")])
@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_lost_device_is_not_waited_for(portaudio, kind, end, ending):
    stream = opened(portaudio, 2, kind)
    stream.start(lambda argument: None)
    assert stream.active
    getattr(stream, end)()
    assert FakeStream.opened.ending == ending and not stream.active
    getattr(stream, end)()


def test_blocks_are_short_beside_a_frame():
    # A resampled frame waits for at most one block more.
    assert devices.BLOCK_SECONDS <= 0.25 * FRAME_SIZE / SAMPLE_RATE


# ---- after a device was unplugged


@pytest.fixture
def replugged(portaudio):
    """PortAudio as it is: it sees what is plugged in when it begins, and not before it has ended."""
    portaudio.plugged, portaudio._initialized = list(portaudio.table), 1

    def terminate():
        assert portaudio._initialized, "it has ended already"
        portaudio._initialized -= 1
        portaudio.table.clear()

    def initialize():
        if portaudio.plugged is None:
            raise PortAudioError("no sound system")
        portaudio._initialized += 1
        portaudio.table[:] = portaudio.plugged

    portaudio._terminate, portaudio._initialize = terminate, initialize
    return portaudio


def test_a_device_is_found_again_by_its_name_wherever_it_is_now(replugged):
    microphone = Microphone(find_device("input", "Headset"))
    loudspeaker = Loudspeaker(find_device("output"))
    assert (microphone.device.index, microphone.rate) == (3, 16000)
    del replugged.plugged[3]
    assert not devices.find_again(microphone, loudspeaker)
    replugged.plugged.insert(0, entry("Headset", 2, 2, 16000.0))
    assert devices.find_again(microphone, loudspeaker)
    assert (microphone.device.index, microphone.rate, microphone.channels) == (0, 24000, 2)
    assert (loudspeaker.device.index, loudspeaker.name) == (2, "Built-in Output")
    microphone.start(lambda frame: None)
    assert FakeStream.opened.settings["device"] == 0


def test_of_two_of_one_name_the_one_on_the_same_system_is_it(replugged):
    replugged.hosts.append({"name": "JACK"})
    microphone = Microphone(find_device("input", "Headset"))
    replugged.plugged.insert(0, entry("Headset", 1, 0, host=1))
    assert devices.find_again(microphone)
    assert (microphone.device.host, microphone.device.index) == ("ALSA", 4)


def test_a_rate_that_was_asked_for_stays(replugged):
    microphone = Microphone(find_device("input", "USB Interface Mini"), rate=48000)
    assert devices.find_again(microphone) and microphone.rate == 48000


def test_a_sound_system_that_is_gone_is_asked_again_and_again(replugged):
    microphone = Microphone(find_device("input"))
    kept, replugged.plugged = replugged.plugged, None
    assert not devices.find_again(microphone) and not devices.find_again(microphone)
    replugged.plugged = kept
    assert devices.find_again(microphone) and replugged._initialized == 1


def test_what_the_sound_system_prints_when_it_fails_stays_off_the_screen(portaudio, capfd):
    class Chatty(FakeStream):
        def __init__(self, **settings):
            os.write(2, b"ALSA lib pcm.c: no such device\n")
            raise PortAudioError("no such device")

    portaudio.InputStream = Chatty
    with pytest.raises(UserError, match="no such device"):
        opened(portaudio, 0).start(lambda frame: None)
    os.write(2, b"ours\n")
    assert capfd.readouterr().err == "ours\n"


@pytest.mark.skipif(find_library("asound") is None, reason="needs ALSA")
def test_alsa_keeps_its_troubles_off_the_screen(portaudio, capfd):
    find_device("input")
    handle = ctypes.c_void_p()
    alsa = ctypes.CDLL("libasound.so.2")
    assert alsa.snd_pcm_open(ctypes.byref(handle), b"no-such-device", 0, 0) < 0
    assert capfd.readouterr().err == ""
