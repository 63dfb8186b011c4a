"""A picture of a real talk in a terminal: `chat` in tmux on virtual sound devices.

    python scripts/terminal_picture.py [OUT.svg] [--seconds 16] [--keys m,m]

The user of the bundled recording speaks to the bundled model, and keys are pressed; prints the screen
as text, too. Needs tmux and PulseAudio, see virtual_sound.py.
"""

import argparse
import io
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import soundfile
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from virtual_sound import VirtualSound, first, missing

import moshi_ttt_mlx

USER = Path(moshi_ttt_mlx.__file__).parent / "assets" / "demo_talk.flac"
COLUMNS, ROWS = 96, 20
# Without the fonts that rich's picture fetches from elsewhere.
SVG = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


class Tmux:
    """One program in a terminal of a fixed size; ended by `with`."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self._base = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self._env = env | {"TERM": "xterm-256color"}

    def __enter__(self) -> "Tmux":
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        self._run("new-session", "-d", *size, "sh")
        self._run("set-option", "-g", "status", "off")
        return self

    def __exit__(self, *_: object) -> None:
        self._run("kill-server")

    def _run(self, *words: str) -> str:
        command = [*self._base, *words]
        done = subprocess.run(command, env=self._env, check=True, capture_output=True, text=True)
        return done.stdout

    def type(self, text: str) -> None:
        """Press keys: letters as they are, or tmux's names such as `Enter`."""
        self._run("send-keys", text)

    def screen(self) -> str:
        """What is to be seen, with colours."""
        return self._run("capture-pane", "-p", "-e")

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Wait until words are to be seen.

        Raises:
            TimeoutError: they did not come.
        """
        for _ in range(round(seconds * 10)):
            if words in Text.from_ansi(self.screen()).plain:
                return
            time.sleep(0.1)
        raise TimeoutError(f"no {words!r} on the screen:\n{self.screen()}")


def save_picture(screen: str, path: Path) -> None:
    """The screen as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen.rstrip()))
    path.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(path), title="moshi-ttt-mlx", code_format=SVG)


def talk(folder: Path, seconds: float, keys: list[str]) -> str:
    """Hold a talk; returns the screen at its end."""
    rate = soundfile.info(USER).samplerate
    voice, _ = soundfile.read(USER, dtype="int16", frames=round(seconds * rate))
    # No room is as still as a recording made of sentences: exact zeros are a muted microphone's.
    room = np.random.default_rng(0).integers(-2, 3, len(voice), np.int16)
    soundfile.write(folder / "user.wav", voice + room, rate)
    program = [*first(), sys.executable, "-m", "moshi_ttt_mlx", "--model", "demo"]
    program += ["--session", "monday"]
    with VirtualSound(folder) as sound:
        env = sound.env | {
            "PYTHONPATH": str(Path(moshi_ttt_mlx.__file__).resolve().parent.parent),
            "MOSHI_TTT_SESSIONS": str(folder / "sessions"),
        }
        with Tmux(folder, env) as tmux:
            tmux.type(f"clear; {shlex.join(program)}\n")
            tmux.wait_for("talk now")
            speaking = threading.Thread(target=sound.play, args=[folder / "user.wav"])
            speaking.start()
            time.sleep(seconds)
            for key in keys:
                tmux.type(key)
                time.sleep(0.5)
            shown = tmux.screen()
            tmux.type("q")
            tmux.wait_for("kept: go on with --session monday")
            speaking.join()
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="SVG to write")
    parser.add_argument("--seconds", type=float, default=16.0)
    parser.add_argument("--keys", default="s", help="keys to press before the picture")
    args = parser.parse_args()
    if reason := missing():
        sys.exit(f"virtual sound devices: {reason}")
    with tempfile.TemporaryDirectory(prefix="sound-") as name:
        shown = talk(Path(name), args.seconds, [key for key in args.keys.split(",") if key])
    print(shown)
    if args.out:
        save_picture(shown, args.out)


if __name__ == "__main__":
    main()
