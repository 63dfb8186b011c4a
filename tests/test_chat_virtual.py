"""The whole program on virtual sound devices: what it says is played, what is said to it is heard."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.text import Text
from tiny import SMALL

import moshi_ttt_mlx
from moshi_ttt_mlx.frame_queues import SILENT_LEVEL
from moshi_ttt_mlx.voice import level

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

from terminal_picture import Tmux  # noqa: E402
from virtual_sound import (  # noqa: E402
    MICROPHONE,
    VirtualSound,
    find_in_order,
    first,
    missing,
    samples,
)

CLIP = Path(moshi_ttt_mlx.__file__).parent / "assets" / "demo_clip.flac"
FRAME = 1920

pytestmark = [
    pytest.mark.audio_device,
    pytest.mark.skipif(missing() is not None, reason=f"virtual sound devices: {missing()}"),
]


@pytest.fixture
def folder():
    # Not tmp_path: a socket's path has to be short.
    with tempfile.TemporaryDirectory(prefix="sound-") as name:
        yield Path(name)


class Program:
    """The program with the small model, its output in files; made once it talks."""

    def __init__(self, sound, folder, *flags):
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        search = os.pathsep.join(filter(None, [str(ROOT), sound.env.get("PYTHONPATH", "")]))
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                [*first(), sys.executable, "-m", "moshi_ttt_mlx", "--model", SMALL, *flags],
                env=sound.env | {"PYTHONPATH": search},
                cwd=folder,
                stdout=out,
                stderr=err,
            )
        self.wait_for(self.out, " ")

    def wait_for(self, path, words):
        for _ in range(20 * 120):
            if words in path.read_text():
                return
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.05)
        pytest.fail(f"no {words!r} in {path.read_text()!r}")

    def end(self):
        """Exit status, words, warnings."""
        status = self.process.wait(120)
        return status, self.out.read_text(), self.err.read_text()


def frames(channel):
    """The frames of a recording that are not silent (silent ones may be left out to catch up)."""
    whole = channel[: len(channel) // FRAME * FRAME].reshape(-1, FRAME)
    return [frame for frame in whole if level(frame / 32768) >= SILENT_LEVEL]


def recording(folder):
    (path,) = folder.glob("*.wav")
    return path


def talk(folder):
    """One short talk; returns what is wrong with it."""
    voice, rate = soundfile.read(CLIP, dtype="int16")
    assert rate == 24000
    soundfile.write(folder / "clip.wav", voice, rate)
    with VirtualSound(folder) as sound, sound.recording(folder / "played.raw"):
        program = Program(sound, folder, "--max-seconds", "8", "--record", "r", "--txt", "r.txt")
        speaking = threading.Thread(target=sound.play, args=[folder / "clip.wav"])
        speaking.start()
        status, words, warnings = program.end()
        speaking.join()
    assert status == 0, warnings
    recorded, _ = soundfile.read(recording(folder / "r"), dtype="int16")
    assert len(recorded) == 100 * FRAME
    assert (folder / "r.txt").read_text().split() == words.split() != []
    return [
        *lost_on_the_way(frames(recorded[:, 0]), samples(folder / "played.raw")),
        *unheard(recorded[:, 1], voice),
    ]


def lost_on_the_way(said, played):
    """Every frame that Moshi said was played bit for bit, with nothing but silence in between."""
    starts = find_in_order(said, played)
    if None in starts or len(said) < 50:
        return [f"{len(said)} frames said, {starts.count(None)} of them not played"]
    ends = [0, *(start + FRAME for start in starts)]
    between = [played[end:start] for end, start in zip(ends, [*starts, len(played)], strict=True)]
    return ["sound that Moshi never said"] if any(gap.any() for gap in between) else []


def unheard(heard, voice):
    """Every frame heard is a piece of the clip; the clip's first and last come with silence."""
    pieces = frames(heard)[1:-1]
    starts = find_in_order(pieces, voice)
    if None in starts or len(pieces) < 50:
        return [f"{len(pieces)} frames heard, {starts.count(None)} of them not in the clip"]
    return []


def test_what_moshi_says_is_played_and_what_is_said_is_heard(folder):
    for attempt in ("first", "second"):
        (folder / attempt).mkdir()
        faults = talk(folder / attempt)
        if not faults:
            return
    # Once more was allowed: a busy machine makes the virtual devices stumble.
    pytest.fail("; ".join(faults))


def test_a_sound_server_that_dies_ends_the_talk_and_nothing_is_lost(folder):
    with VirtualSound(folder) as sound:
        flags = ("--session", "./t.session", "--record", "t", "--txt", "t.txt", "--max-wait", "3")
        program = Program(sound, folder, *flags)
        sound.stop()
        status, words, warnings = program.end()
    assert status == 1
    # What PortAudio and ALSA say at every attempt to open it again is not for the user.
    assert "is gone: plug it in again" in warnings.splitlines()[-2]
    assert "is gone: the talk is over" in warnings.splitlines()[-1]
    assert (folder / "t.txt").read_text().split() == words.split() != []
    assert (folder / "t.session").exists()
    assert soundfile.info(recording(folder / "t")).frames > 0


def test_a_microphone_that_is_plugged_in_again_is_heard_again(folder):
    with VirtualSound(folder) as sound:
        flags = ("--input-device", MICROPHONE, "--session", "./t.session", "--record", "t")
        program = Program(sound, folder, *flags)
        sound.unplug_microphone()
        program.wait_for(program.err, f"{MICROPHONE!r} is gone")
        stood_still = program.out.read_text()
        time.sleep(2.0)
        assert program.out.read_text() == stood_still
        sound.plug_microphone()
        program.wait_for(program.err, f"{MICROPHONE!r} is back")
        voice, rate = soundfile.read(CLIP, dtype="int16")
        soundfile.write(folder / "clip.wav", voice, rate)
        sound.play(folder / "clip.wav")
        program.process.send_signal(signal.SIGINT)
        status, words, warnings = program.end()
    assert status == 0
    assert warnings.count("is gone") == warnings.count("is back") == 1
    assert "is back" in warnings.splitlines()[-1], warnings  # all that PortAudio says comes before
    assert len(words) > len(stood_still)
    recorded, _ = soundfile.read(recording(folder / "t"), dtype="int16")
    assert len(frames(recorded[:, 1])) > 50  # the clip came after the microphone had been away


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_terminal_shows_the_talk_and_its_keys_and_gets_back_what_it_had(folder):
    with VirtualSound(folder) as sound:
        env = sound.env | {"PYTHONPATH": str(ROOT), "MOSHI_TTT_SESSIONS": str(folder / "talks")}
        with Tmux(folder, env) as tmux:
            tmux.type(
                f"{sys.executable} -m moshi_ttt_mlx --model {SMALL}; stty -a; echo 'it is 'over\n"
            )
            tmux.wait_for("m mute   p pause   s save   q quit")
            tmux.wait_for("0:01  lag")
            tmux.type("m")
            tmux.wait_for("MUTED")
            tmux.type("mp")
            tmux.wait_for("p go on")
            tmux.type("ps")
            tmux.wait_for("saved as talk-")
            tmux.type("q")
            tmux.wait_for("kept: go on with --session talk-")
            tmux.wait_for("it is over")
            modes = Text.from_ansi(tmux.screen()).plain.split()
            assert "icanon" in modes and "echo" in modes and "-echo" not in modes
    (kept,) = (folder / "talks").iterdir()
    assert moshi_ttt_mlx.Session.load(kept, moshi_ttt_mlx.load(SMALL)).frame > 0


def test_ctrl_c_saves_and_the_talk_goes_on_from_there(folder):
    said = []
    with VirtualSound(folder) as sound:
        for _ in range(2):
            program = Program(sound, folder, "--session", "./t.session", "--json", "t.json")
            program.process.send_signal(signal.SIGINT)
            status, words, warnings = program.end()
            assert status == 0, warnings
            said.append(words.rstrip("\n"))
    session = moshi_ttt_mlx.Session.load(folder / "t.session", moshi_ttt_mlx.load(SMALL))
    assert "".join(said).split() == [word.text for word in session.transcript.words]
    assert session.transcript.to_json() == (folder / "t.json").read_text()


AT_OTHER_RATES = """
import sys, time
import numpy as np
from moshi_ttt_mlx.devices import Loudspeaker, Microphone, find_device

heard, played = [], 0

def tone(count):
    global played
    played += count
    sine = 0.5 * np.sin(2 * np.pi * 440 * np.arange(played - count, played) / 24000)
    return sine.astype(np.float32)

microphone = Microphone(find_device("input"), rate=48000)
loudspeaker = Loudspeaker(find_device("output"), rate=44100)
microphone.start(heard.append)
loudspeaker.start(tone)
print("listening", file=sys.stderr, flush=True)
time.sleep(4)
loudspeaker.stop()
microphone.stop()
np.save("heard.npy", np.concatenate(heard))
"""


def pitch(sound):
    """The loudest frequency of its middle second, to half a hertz."""
    middle = sound[np.flatnonzero(sound)[0] :][12_000:36_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 48_000))
    return np.argmax(spectrum) / 2


def test_devices_of_other_rates_keep_the_pitch(folder):
    tone = 0.5 * np.sin(2 * np.pi * 600 * np.arange(72_000) / 24000)
    soundfile.write(folder / "tone.wav", tone, 24000)
    with VirtualSound(folder) as sound, sound.recording(folder / "played.raw"):
        program = subprocess.Popen(
            [*first(), sys.executable, "-c", AT_OTHER_RATES],
            env=sound.env | {"PYTHONPATH": str(ROOT)},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert program.stderr.readline() == "listening\n"
        sound.play(folder / "tone.wav")
        assert program.wait(120) == 0, program.stderr.read()
    # A wrong rate would be off by 8 % or more; a gap in the sound widens the peak, not moves it.
    assert pitch(np.load(folder / "heard.npy")) == pytest.approx(600, abs=2)
    assert pitch(samples(folder / "played.raw").astype(float)) == pytest.approx(440, abs=2)
