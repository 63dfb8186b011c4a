"""A microphone and a loudspeaker made of software: PulseAudio with two null sinks in its own folder.

    with VirtualSound(folder) as sound:
        with sound.recording("heard.wav"):
            program = subprocess.Popen([...], env=sound.env)
            sound.play("speech.wav")

Needs Debian's pulseaudio, pulseaudio-utils and libasound2-plugins; works as root, without dbus.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MICROPHONE, MICROPHONE_SINK, LOUDSPEAKER_SINK = "vmic", "vmic_in", "vspk"
_MICROPHONE_MODULE = (
    f"module-remap-source source_name={MICROPHONE} master={MICROPHONE_SINK}.monitor channels=1 "
    "rate=24000"
)
_MODULES = [
    f"module-null-sink sink_name={MICROPHONE_SINK} rate=24000 channels=1",
    _MICROPHONE_MODULE,
    f"module-null-sink sink_name={LOUDSPEAKER_SINK} rate=24000 channels=1",
]
_OPTIONS = ["-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no", "--disable-shm=yes"]
_ASOUNDRC = (
    "pcm.!default { type pulse }\nctl.!default { type pulse }\n"
    f"pcm.{MICROPHONE} {{ type pulse\n device {MICROPHONE} }}\n"
)


def missing() -> str | None:
    """What keeps virtual devices from working here, None if nothing does."""
    gone = [name for name in ("pulseaudio", "pactl", "parec", "paplay") if not shutil.which(name)]
    return f"not installed: {', '.join(gone)}" if gone else None


def first() -> list[str]:
    """A prefix that lets a command go before others where that is allowed: sound does not wait."""
    return ["nice", "-n", "-15"] if os.geteuid() == 0 and shutil.which("nice") else []


class VirtualSound:
    """PulseAudio, started and stopped by `with`.

    Args:
        folder: empty; becomes the home of PulseAudio and of the programs that use it.

    Attributes:
        env: environment for a program whose default devices shall be the virtual ones.
    """

    def __init__(self, folder: Path):
        home, run = folder / "home", folder / "run"
        home.mkdir(parents=True)
        run.mkdir(mode=0o700)
        (home / ".asoundrc").write_text(_ASOUNDRC)
        self.socket, self._orders = run / "native", run / "orders"
        self._log_path = folder / "pulseaudio.log"
        places = {"HOME": home, "XDG_RUNTIME_DIR": run, "PULSE_RUNTIME_PATH": run}
        self.env = os.environ | {name: str(path) for name, path in places.items()}
        self.env["PULSE_SERVER"] = f"unix:{self.socket}"

    def __enter__(self) -> "VirtualSound":
        modules = [
            f"module-native-protocol-unix auth-anonymous=1 socket={self.socket}",
            f"module-cli-protocol-unix socket={self._orders}",
            *_MODULES,
        ]
        loads = [word for module in modules for word in ("-L", module)]
        with open(self._log_path, "wb") as log:
            command = [*first(), "pulseaudio", *_OPTIONS, *loads]
            self._server = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        try:
            self._wait_for_server()
            self._pactl("set-default-sink", LOUDSPEAKER_SINK)
            self._pactl("set-default-source", MICROPHONE)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_for_server(self) -> None:
        for _ in range(100):
            if self._server.poll() is not None:
                break
            found = subprocess.run(["pactl", "info"], env=self.env, capture_output=True)
            if found.returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"pulseaudio did not start: {self._log_path.read_text()}")

    def _pactl(self, *words: str) -> None:
        subprocess.run(["pactl", *words], env=self.env, check=True)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End PulseAudio: for a program that uses it, its devices are gone."""
        if self._server.poll() is None:
            self._server.kill()
        self._server.wait()

    def unplug_microphone(self) -> None:
        """Take the microphone away from whatever listens to it."""
        self._pactl("unload-module", "module-remap-source")
        # PulseAudio would let the listeners go on, on the monitor of a loudspeaker.
        listeners = subprocess.run(
            ["pactl", "list", "short", "source-outputs"],
            env=self.env,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        with socket.socket(socket.AF_UNIX) as orders:
            orders.connect(str(self._orders))
            for listener in listeners:
                orders.sendall(f"kill-source-output {listener.split()[0]}\n".encode())
            orders.shutdown(socket.SHUT_WR)
            while orders.recv(4096):  # until all is done
                pass

    def plug_microphone(self) -> None:
        """Bring it back, by the same name."""
        self._pactl("load-module", *_MICROPHONE_MODULE.split())

    def play(self, path: Path) -> None:
        """Say a WAV file into the microphone; waits until it is over."""
        command = [*first(), "paplay", "-d", MICROPHONE_SINK, str(path)]
        subprocess.run(command, env=self.env, check=True)

    @contextmanager
    def recording(self, path: Path) -> Iterator[None]:
        """Record what the loudspeaker plays as raw 16-bit samples; read it with `samples`."""
        words = (
            f"parec -d {LOUDSPEAKER_SINK}.monitor --rate=24000 --channels=1 --format=s16le --raw"
        )
        with open(path, "wb") as file:
            process = subprocess.Popen([*first(), *words.split()], env=self.env, stdout=file)
            try:
                yield
                time.sleep(1.0)  # what is on its way
            finally:
                process.terminate()
                process.wait()


def samples(path: Path) -> np.ndarray:
    """What `recording` wrote: int16 `[N]`."""
    return np.fromfile(path, "<i2")


def find_in_order(pieces: list[np.ndarray], sound: np.ndarray) -> list[int | None]:
    """Where each piece lies in a sound, bit for bit, after the piece before it; None where it does not.

    All are int16; a piece begins and ends with any samples, not only zeros.
    """
    found: list[int | None] = []
    position = 0
    for piece in pieces:
        start = _find(piece, sound, position)
        found.append(start)
        position = position if start is None else start + len(piece)
    return found


def _find(piece: np.ndarray, sound: np.ndarray, position: int) -> int | None:
    starts = np.arange(position, max(position, len(sound) - len(piece) + 1))
    for offset, value in enumerate(piece):
        starts = starts[sound[starts + offset] == value]
        if len(starts) <= 1:
            break
    if len(starts) and np.array_equal(sound[starts[0] : starts[0] + len(piece)], piece):
        return int(starts[0])
    return None
