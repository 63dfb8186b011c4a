"""Keys on a real pseudo-terminal: read at once, unechoed, and the terminal as it was in every case."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from moshi_ttt_mlx.cli.keys import Keys, foreground_terminal

ROOT = Path(__file__).resolve().parent.parent
WAIT = 120  # seconds until a test gives up: a busy machine is slow to start a program
ECHOES = termios.ICANON | termios.ECHO


@pytest.fixture
def terminal():
    """Its two ends: what a user types into, and what a program reads from."""
    user, program = pty.openpty()
    yield user, program
    os.close(user)
    os.close(program)


def modes(fd):
    return termios.tcgetattr(fd)[3] & ECHOES


def test_keys_come_without_enter_and_without_echo(terminal):
    user, program = terminal
    with Keys(program) as keys:
        assert keys.read() == ""
        os.write(user, b"mp")
        wait_until(lambda: typed(keys, "mp"))
        assert modes(program) == 0
        os.write(user, b"\x1b[A")
        time.sleep(0.05)
        assert keys.read() == ""
    assert modes(program) == ECHOES


def typed(keys, text):
    typed.so_far = getattr(typed, "so_far", "") + keys.read()
    return typed.so_far == text


def wait_until(true):
    for _ in range(100 * WAIT):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it never came true")


def test_an_error_gives_the_terminal_back_and_the_signals(terminal):
    before = signal.getsignal(signal.SIGTSTP), signal.getsignal(signal.SIGQUIT)
    with pytest.raises(RuntimeError), Keys(terminal[1]):
        raise RuntimeError
    assert modes(terminal[1]) == ECHOES
    assert (signal.getsignal(signal.SIGTSTP), signal.getsignal(signal.SIGQUIT)) == before


def test_a_terminal_that_went_away_is_no_error():
    user, program = pty.openpty()
    with Keys(program) as keys:
        os.close(user)
        assert keys.read() == ""
    os.close(program)


def test_without_a_terminal_there_are_no_keys(tmp_path):
    with Keys(None) as keys:
        assert keys.read() == ""
    with open(tmp_path / "file", "w") as file:
        assert foreground_terminal(file) is None
    assert foreground_terminal(file) is None and foreground_terminal(None) is None
    user, program = pty.openpty()  # a terminal, but not this process's
    with open(program) as stream:
        assert foreground_terminal(stream) is None
    os.close(user)


PROGRAM = """
import os, sys, time
from moshi_ttt_mlx.cli.keys import Keys, foreground_terminal
with Keys(foreground_terminal(sys.stdin)) as keys:
    print("reading", flush=True)
    while True:
        for key in keys.read():
            print("key", key, flush=True)
            if key == "x":
                keys.restore()
                os._exit(130)
            if key == "e":
                raise ValueError
        time.sleep(0.01)
"""


SHELL = f"""
import fcntl, os, signal, subprocess, sys, termios

def in_front():
    os.setpgrp()
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a script runs in the background

os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
program = subprocess.Popen([sys.executable, "-c", {PROGRAM!r}], preexec_fn=in_front)
print("pid", program.pid, flush=True)
program.wait()
"""
"""Without a shell over it no program on a terminal can be stopped. This one restores nothing."""


class Program:
    """The program above under its shell, on a terminal."""

    def __init__(self, fd, out):
        self._out = out
        with open(out, "wb") as file:
            self.shell = subprocess.Popen(
                [sys.executable, "-c", SHELL],
                stdin=fd,
                stdout=file,
                stderr=file,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        self.wait_for("reading")
        self.wait_for("pid ")
        self.pid = int(self._out.read_text().split("pid ")[1].split()[0])

    def wait_for(self, words):
        wait_until(lambda: words in self._out.read_text())


@pytest.fixture
def program(terminal, tmp_path):
    one = Program(terminal[1], tmp_path / "out")
    yield one
    if one.shell.poll() is None:
        os.kill(one.pid, signal.SIGKILL)
    one.shell.wait(WAIT)


@pytest.mark.parametrize(
    "ending", [b"x", b"e", b"\x03", b"\x1c"], ids=["exit", "error", "ctrl-c", "ctrl-backslash"]
)
def test_every_way_out_gives_the_terminal_back(program, terminal, ending):
    assert modes(terminal[1]) == 0
    os.write(terminal[0], ending)
    program.shell.wait(WAIT)
    assert modes(terminal[1]) == ECHOES


def test_ctrl_z_gives_the_terminal_back_and_going_on_reads_keys_again(program, terminal):
    os.write(terminal[0], b"a")
    program.wait_for("key a")
    os.write(terminal[0], b"\x1a")
    wait_until(lambda: modes(terminal[1]) == ECHOES)
    os.kill(program.pid, signal.SIGCONT)
    wait_until(lambda: modes(terminal[1]) == 0)
    os.write(terminal[0], b"b")
    program.wait_for("key b")
