"""The verb `chat` from flags to exit status, with a fake session and fake devices."""

import io
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from fake_talk import FakeDevice, FakeSession, PlayingDevice, voice
from rich.console import Console
from tiny import SMALL

from moshi_ttt_mlx import live
from moshi_ttt_mlx.cli import chat, main, screen
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.live import MemoryStatus, Status, Talk

WAIT = 120  # seconds until a test gives up


class SpeakingDevice(FakeDevice):
    """A microphone that hears a frame every 5 ms; `after` frames it calls `then`."""

    def __init__(self, after=5, then=lambda: None):
        super().__init__("mic")
        self.after, self.then = after, then

    def start(self, exchange):
        super().start(exchange)
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self):
        pause, heard = threading.Event(), 0
        while self.active:
            self.speak(voice())
            heard += 1
            if heard == self.after:
                self.then()
            pause.wait(0.005)


class Terminal(io.StringIO):
    """Takes the place of a stream that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def stage(monkeypatch):
    """Puts fakes in the place of devices and model; returns what a test may look at and change."""

    class Stage:
        session = FakeSession()
        is_plugged_in = True
        microphone = SpeakingDevice()
        answers = ()

        def run(self, *flags):
            return main(["--model", SMALL, *flags])

    def remembering(*args, **kwargs):
        stage.talk = Talk(*args, **kwargs)
        return stage.talk

    stage = Stage()
    monkeypatch.setattr(chat, "Talk", remembering)
    monkeypatch.setattr(chat, "find_device", lambda kind, name: (kind, name))
    monkeypatch.setattr(chat, "Microphone", lambda device: stage.microphone)
    monkeypatch.setattr(chat, "Loudspeaker", lambda device: PlayingDevice("speaker"))
    monkeypatch.setattr(chat, "find_again", lambda *streams: stage.is_plugged_in)
    monkeypatch.setattr(chat, "load_model", lambda args, console: None)
    monkeypatch.setattr(chat, "open_session", lambda args, model, console, listener: stage.session)
    return stage


@pytest.fixture
def terminal(monkeypatch):
    """Makes stdin and stdout a terminal, with these answers to the prompt; returns stdout."""

    def make(*answers):
        out = Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{a}\n" for a in answers)))
        monkeypatch.setenv("TERM", "dumb")
        return out

    return make


@pytest.fixture
def sessions(tmp_path, monkeypatch):
    """The folder of named sessions."""
    monkeypatch.setenv("MOSHI_TTT_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def interrupt(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


def test_user_stt_is_loaded_beside_moshi(stage, monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "load_user_stt", lambda args, console: args.user_stt)
    monkeypatch.setattr(
        chat,
        "open_session",
        lambda args, model, console, listener: (seen.append(listener), stage.session)[1],
    )
    stage.run("--max-seconds", "0.1", "--user-stt", "some/stt")
    assert seen == ["some/stt"]


def test_both_sides_words_are_shown_and_kept_to_the_last(stage, capsys, tmp_path):
    stage.session = FakeSession(hears=True)
    flags = ["--txt", str(tmp_path / "txt"), "--json", str(tmp_path / "json")]
    assert stage.run("--max-seconds", "0.4", *flags, "--record", str(tmp_path / "talks")) == 0
    out = capsys.readouterr().out
    # The user's word of a frame is written two frames later; the last two after the talk.
    assert out == (" w0 w1 w2\nYou: u0\nMoshi: w3\nYou: u1 u2 u3\nMoshi: w4\nYou: u4\n")
    words = json.loads((tmp_path / "json").read_text())["words"]
    assert [(w["text"], w["start"]) for w in words if w["speaker"] == "user"] == [
        (f"u{i}", round(0.08 * i, 3)) for i in range(5)
    ]
    assert (tmp_path / "txt").read_text() == "Moshi: w0 w1 w2 w3 w4\nYou: u0 u1 u2 u3 u4\n"
    (log,) = (tmp_path / "talks").glob("*.txt")
    mine = [line.split(" ", 2) for line in log.read_text().splitlines() if " user: " in line]
    assert " ".join(words for _, _, words in mine) == "u0 u1 u2 u3 u4"
    assert mine[0][0] == "0:00.0"


def test_chat_is_the_verb_when_none_is_named(stage, capsys):
    assert stage.run("--max-seconds", "0.4") == 0
    assert stage.session.frame == 5


def test_into_a_pipe_go_words_alone_and_warnings_beside(stage, capsys):
    stage.run("--max-seconds", "0.4")
    out, err = capsys.readouterr()
    assert out == " w0 w1 w2 w3 w4\n"
    assert err == ""


def test_the_demo_says_what_it_is(stage, capsys):
    stage.run("--max-seconds", "0.4", "--model", "demo")
    assert capsys.readouterr().err == f"warning: {chat.DEMO_NOTE}\n"


@pytest.fixture(autouse=True)
def _not_under_nohup():
    """Under nohup the tests inherit a SIGHUP that is ignored, and chat rightly leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_talk_cleanly_and_saves_it(stage, tmp_path, number, capsys):
    stage.microphone = SpeakingDevice(then=interrupt(number))
    before = signal.getsignal(number)
    words, kept = tmp_path / "t.txt", tmp_path / "kept"
    flags = ["--session", str(tmp_path / "s"), "--txt", str(words), "--record", str(kept)]
    assert stage.run(*flags) == 0
    assert stage.session.saved == [str(tmp_path / "s")]
    assert words.read_text().split() == [f"w{n}" for n in range(stage.session.frame)]
    (sound,) = kept.glob("*.wav")
    assert sound.stat().st_size > stage.session.frame * 1920 * 4
    assert not stage.microphone.active
    assert signal.getsignal(number) == before


def test_a_terminal_that_closes_sends_two_signals_and_the_talk_is_saved(stage, tmp_path):
    def hang_up():
        interrupt(signal.SIGTERM)()
        stage.talk._stopping.wait(WAIT)  # the first one has been understood
        interrupt(signal.SIGHUP)()

    saved = []

    def save(path):
        interrupt(signal.SIGHUP)()
        saved.append(path)

    stage.microphone = SpeakingDevice(then=hang_up)
    stage.session.save = save
    assert stage.run("--session", str(tmp_path / "s")) == 0
    assert saved == [str(tmp_path / "s")]


@pytest.mark.parametrize("ending", ["by Ctrl-C", "by a lost device"])
def test_ctrl_c_at_the_prompt_leaves(stage, terminal, monkeypatch, ending):
    class Quit(BaseException):
        pass

    def quit(status):
        raise Quit(status)

    def unplug():
        stage.microphone.active = False

    terminal()
    monkeypatch.setattr(os, "_exit", quit)
    monkeypatch.setattr(chat, "_ask", lambda console: interrupt()() or "kept")
    stage.microphone = SpeakingDevice(then=interrupt() if ending == "by Ctrl-C" else unplug)
    with pytest.raises(Quit, match="130"):
        stage.run("--max-wait", "0")
    assert stage.session.saved == []


def test_without_a_terminal_and_without_a_name_nothing_is_kept(stage):
    stage.microphone = SpeakingDevice(then=interrupt())
    assert stage.run() == 0
    assert stage.session.saved == []


@pytest.mark.parametrize("answer", ["", "n", "No"])
def test_on_a_terminal_ctrl_c_asks_and_no_keeps_nothing(stage, terminal, answer):
    out = terminal(answer)
    stage.microphone = SpeakingDevice(then=interrupt())
    assert stage.run() == 0
    assert "keep this talk?" in out.getvalue() and "talked 0:00" in out.getvalue()
    assert stage.session.saved == []


def test_yes_keeps_the_talk_under_the_proposed_name(stage, terminal, sessions):
    out = terminal("y")
    stage.microphone = SpeakingDevice(then=interrupt())
    stage.run()
    (path,) = map(Path, stage.session.saved)
    assert path.parent == sessions and path.name.startswith("talk-")
    assert f"--session {path.stem}\n" in out.getvalue()


def test_a_name_is_a_name_at_the_prompt_too(stage, terminal, sessions):
    terminal("../x y", "a\tb", "monday")
    stage.microphone = SpeakingDevice(then=interrupt())
    stage.session.save = refusing("../x y", stage.session.saved)
    stage.run()
    assert stage.session.saved == [str(sessions / "monday.session")]


def refusing(path, saved):
    def save(asked):
        if asked == path:
            raise UserError("could not save the session")
        saved.append(asked)

    return save


def test_a_name_that_is_taken_or_cannot_be_written_is_asked_again(stage, terminal, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("an earlier talk")
    out = terminal(taken, "nowhere/x", tmp_path / "new")
    saved = []

    def save(path):
        if path == "nowhere/x":
            raise UserError("could not save the session to nowhere/x")
        saved.append(path)

    stage.session.save = save
    stage.microphone = SpeakingDevice(then=interrupt())
    stage.run()
    assert saved == [str(tmp_path / "new")]
    assert "exists" in out.getvalue() and "could not save" in out.getvalue()


def test_a_talk_that_has_a_file_is_not_asked_about(stage, terminal, tmp_path):
    out = terminal()
    stage.microphone = SpeakingDevice(then=interrupt())
    stage.run("--session", str(tmp_path / "s"))
    assert stage.session.saved == [str(tmp_path / "s")] and "keep" not in out.getvalue().split()


def test_sigterm_and_the_end_of_time_ask_nothing(stage, terminal):
    out = terminal("y")
    stage.run("--max-seconds", "0.2")
    stage.microphone = SpeakingDevice(then=interrupt(signal.SIGTERM))
    stage.session = FakeSession()
    stage.run()
    assert "keep" not in out.getvalue()


@pytest.mark.parametrize("waiting", ["for the model", "for a step"])
def test_a_second_ctrl_c_or_one_while_loading_quits_at_once(stage, monkeypatch, waiting):
    class Quit(BaseException):
        pass

    def quit(status):
        raise Quit(status)

    monkeypatch.setattr(os, "_exit", quit)
    hung = threading.Event()
    if waiting == "for the model":
        monkeypatch.setattr(chat, "load_model", lambda *args: (interrupt()(), hung.wait(WAIT)))
    else:

        def step(user):
            interrupt()()
            stage.talk._stopping.wait(WAIT)  # the first one has been understood
            interrupt()()
            hung.wait(WAIT)

        stage.session.step = step
    with pytest.raises(Quit, match="130"):
        stage.run()
    assert not hung.is_set()
    hung.set()


def test_a_lost_device_is_told_and_everything_is_saved(stage, tmp_path, capsys):
    def unplug():
        stage.microphone.active = False

    stage.microphone = SpeakingDevice(then=unplug)
    flags = ["--max-wait", "0", "--session", str(tmp_path / "s"), "--txt", str(tmp_path / "t")]
    assert stage.run(*flags) == 1
    assert "'mic' is gone: the talk is over" in capsys.readouterr().err
    assert stage.session.saved and (tmp_path / "t").read_text().startswith("w0")


def test_a_device_that_comes_back_is_one_warning_and_one_note(stage, monkeypatch, capsys):
    monkeypatch.setattr(live, "_RETRY_SECONDS", 0.01)

    def unplug():
        stage.microphone.active, stage.microphone.then = False, lambda: None

    stage.microphone = SpeakingDevice(then=unplug)
    assert stage.run("--max-seconds", "1.6") == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: 'mic' is gone: plug it in again, the talk waits for it",
        "'mic' is back: the talk goes on",
    ]
    assert stage.session.frame == 20


def test_a_quiet_start_reaches_the_talk_and_only_a_model_that_speaks(stage, capsys):
    assert stage.run("--no-greeting", "--max-seconds", "0.4") == 0
    assert capsys.readouterr().out == ""  # the first frame is taken for the room
    stage.session = FakeSession(speaks=False)
    stage.session.model.name = "an stt model"
    assert stage.run("--no-greeting") == 2
    assert "an stt model only writes: leave out --no-greeting" in capsys.readouterr().err


def test_a_talk_whose_terminal_goes_away_is_saved(stage, tmp_path, monkeypatch, capsys):
    def said(self, text, time, speaker):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen.PlainScreen, "said", said)
    assert stage.run("--session", str(tmp_path / "s")) == 1
    assert stage.session.saved == [str(tmp_path / "s")]


def test_an_error_of_loading_is_one_line(stage, monkeypatch, capsys):
    def load(args, console):
        raise UserError("no such model: expected a repository, found nothing")

    monkeypatch.setattr(chat, "load_model", load)
    assert stage.run() == 2
    assert capsys.readouterr().err == (
        "moshi-ttt-mlx: no such model: expected a repository, found nothing\n"
    )


def test_bad_flags_cost_no_loading(stage, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(chat, "load_model", lambda *args: pytest.fail("loaded"))
    assert stage.run("--txt", str(tmp_path / "nowhere" / "t.txt")) == 2
    assert stage.run("--record", str(tmp_path / "talk.wav")) == 2

    def no_device(kind, name):
        raise UserError("found no microphone")

    monkeypatch.setattr(chat, "find_device", no_device)
    assert stage.run() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "nowhere" in lines[0] and "microphone" in lines[2]


def test_devices_are_listed_and_passed_on(stage, monkeypatch, capsys):
    monkeypatch.setattr(chat, "describe_devices", lambda: "input:\n  * 0  Mic")
    assert stage.run("--list-devices") == 0
    assert capsys.readouterr().out == "input:\n  * 0  Mic\n"
    asked = []
    monkeypatch.setattr(chat, "find_device", lambda *args: asked.append(args))
    stage.run("--max-seconds", "0.1", "--input-device", "usb", "--output-device", "3")
    assert asked == [("input", "usb"), ("output", "3")]


# ---- keys


class FakeKeys:
    """Presses one key each time it is asked once the talk has begun, then waits for what it did."""

    fd = 0

    def __init__(self, stage, presses):
        self.stage, self.presses, self.restored = stage, list(presses), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.restore()

    def restore(self):
        self.restored = True

    def read(self):
        frames = self.stage.session.frame
        if not self.presses or not self.stage.talk.started or frames < self.presses[0][0]:
            return ""
        return self.presses.pop(0)[1]


@pytest.fixture
def keys(stage, monkeypatch):
    """Makes chat read these keys, each once so many frames have passed; returns what it prints."""

    def make(*presses):
        stage.keys = FakeKeys(stage, presses)
        console = Console(file=io.StringIO(), width=300)
        live_screen = screen.LiveScreen(console, has_keys=True)
        monkeypatch.setattr(chat, "make_screen", lambda: (live_screen, console, stage.keys))
        return console.file

    return make


def test_q_ends_the_talk_as_ctrl_c_does(stage, keys, tmp_path):
    out = keys((3, "q"))
    assert stage.run("--session", str(tmp_path / "s")) == 0
    assert stage.session.saved == [str(tmp_path / "s")] and "talked 0:" in out.getvalue()
    assert stage.keys.restored


def test_ctrl_c_just_when_the_terminal_was_changed_gives_it_back(stage, keys, monkeypatch):
    class Quit(BaseException):
        pass

    def quit(status):
        raise Quit(status)

    def interrupted(self):
        raise KeyboardInterrupt

    keys()
    monkeypatch.setattr(os, "_exit", quit)
    monkeypatch.setattr(FakeKeys, "__enter__", interrupted)
    with pytest.raises(Quit):
        stage.run()
    assert stage.keys.restored


def test_m_mutes_and_unmutes(stage, keys):
    keys((3, "m"), (10, "mm"), (20, "m"), (30, "q"))
    stage.run()
    loud = [bool(user.any()) for user in stage.session.users]
    first, last = loud.index(False), len(loud) - loud[::-1].index(False)
    assert all(loud[:first]) and not any(loud[first:last]) and all(loud[last:])
    assert 3 <= first <= last - 10 and last < len(loud)


def test_p_stops_the_talk_and_starts_it_again(stage, keys, monkeypatch):
    keys((5, "p"), (5, ""), (5, "p"), (12, "q"))
    paused = []

    def press(key, args, talk):
        if key == "p" and talk.paused:
            paused.append((talk.session.frame, talk.status().paused))
        real(key, args, talk)

    real = chat._press
    monkeypatch.setattr(chat, "_press", press)
    stage.run()
    # That it costs no underrun is shown in test_live.py, where no loudspeaker runs against the clock.
    assert len(paused) == 1 and paused[0][1] and stage.session.frame >= 12


def test_s_names_a_talk_once_and_saves_it_there_at_the_end_too(stage, keys, sessions):
    out = keys((3, "s"), (10, "s"), (20, "q"))
    stage.run()
    (name,) = set(stage.session.saved)
    assert len(stage.session.saved) == 3 and Path(name).parent == sessions
    assert f"saved as {Path(name).stem}\n" in out.getvalue()


def test_s_saves_where_the_talk_came_from(stage, keys, sessions):
    keys((3, "s"), (10, "q"))
    stage.run("--session", "monday")
    assert stage.session.saved == [str(sessions / "monday.session")] * 2


def test_s_on_a_full_disk_is_a_warning_and_the_talk_goes_on(stage, keys, tmp_path):
    def save(path):
        raise UserError(f"could not save the session to {path}: the disk is full")

    stage.session.save = save
    out = keys((3, "s"), (20, "q"))
    assert stage.run("--session", str(tmp_path / "s")) == 2  # nor could it be saved at the end
    assert "the disk is full; the talk goes on" in out.getvalue() and stage.session.frame >= 20


def test_s_where_no_folder_can_be_made_is_a_warning(stage, keys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOSHI_TTT_SESSIONS", str(tmp_path / "file" / "x"))
    out = keys((3, "s"), (10, "xyz\n"), (20, "q"))
    monkeypatch.setattr(chat, "_ask", lambda console: None)
    assert stage.run() == 0
    assert "cannot make the folder" in out.getvalue() and stage.session.frame >= 20


# ---- the screen


def drawn(actions, width=60):
    file = io.StringIO()
    with screen.LiveScreen(Console(file=file, width=width)) as live:
        actions(live)
    return file.getvalue()


def test_paragraphs_begin_after_a_pause_and_carry_their_time():
    def actions(live):
        live.said(" Hel", 1.0, "moshi")
        live.show(Status())
        live.said("lo", 1.08, "moshi")
        live.said(" there", 1.2, "moshi")
        live.said(" again", 65.0, "moshi")

    assert drawn(actions).splitlines()[:2] == ["0:01 Hello there", "1:05 again"]


def test_a_pause_inside_a_word_does_not_break_it():
    def actions(live):
        live.said(" Hel", 1.0, "moshi")
        live.said("lo", 9.0, "moshi")

    assert "0:01 Hello" in drawn(actions)


def test_a_long_paragraph_goes_up_so_that_the_live_part_stays_small():
    lines = drawn(
        lambda live: [live.said(f" word{n}", n * 0.2, "moshi") for n in range(200)]
    ).splitlines()
    words = " ".join(lines).split()
    assert [w for w in words if w.startswith("word")] == [f"word{n}" for n in range(200)]
    assert sum(":" in w for w in words) > 3


def test_markup_in_words_and_warnings_is_text():
    def actions(live):
        live.said(" [red]x[/red]", 0.0, "moshi")
        live.warn("device [bold]usb[/bold]")

    out = drawn(actions)
    assert "[red]x[/red]" in out and "[bold]usb[/bold]" in out


def test_the_status_line_shows_lag_pace_and_only_what_went_wrong():
    calm = screen.status_line(Status(age=3671, frame_ms=23.4, user_level=0, reply_level=-100)).plain
    assert calm == "1:01:11  lag 0 + 0 ms  frame 23/80 ms  you ▮▮▮▮▮▮▮▮  moshi ▯▯▯▯▯▯▯▯"
    late = screen.status_line(
        Status(lag_ms=960, ahead_ms=80, frame_ms=95.0, dropped=7, underruns=2)
    ).plain
    assert "lag 960 + 80 ms  frame 95/80 ms" in late and late.endswith("dropped 7  underruns 2")


def test_the_status_line_leaves_room_for_the_terminal_s_own_ctrl_c():
    file = io.StringIO()
    console = Console(file=file, width=60, force_terminal=True, color_system=None)
    with screen.LiveScreen(console) as live:
        live.show(Status(dropped=100_000, underruns=100_000, skipped=100_000))
        (line,) = [line for line in file.getvalue().splitlines() if "lag" in line]
    assert line.endswith("…") and len(line[line.index("0:00") :]) <= 57


@pytest.mark.parametrize(("level", "lit"), [(-100, 0), (-56, 0), (-28, 4), (0, 8), (6, 8)])
def test_level_bars(level, lit):
    assert screen.bar(level).count("▮") == lit and len(screen.bar(level)) == 8


def test_into_a_pipe_two_speakers_words_go_whole(capsys):
    with screen.PlainScreen() as plain:
        for text, speaker in [(" one", "moshi"), (" Hel", "moshi"), (" yes", "user")]:
            plain.said(text, 0.0, speaker)
        assert capsys.readouterr().out == " one Hel"
        later = [(" sir", "user"), ("lo", "moshi"), (" two", "moshi"), (" ma", "user")]
        for text, speaker in [*later, ("s", "moshi"), ("dam", "user")]:
            plain.said(text, 0.0, speaker)
    lines = ["", "You: yes", "Moshi:lo", "You: sir", "Moshi: twos", "You: madam", ""]
    assert capsys.readouterr().out.split("\n") == lines


def test_two_speakers_have_names_and_a_paragraph_each():
    def actions(live):
        live.said(" Hello", 1.0, "moshi")
        live.said(" yes", 1.2, "user")
        live.said(" there", 1.4, "moshi")
        live.show(Status())

    lines = drawn(actions).splitlines()
    assert lines[:2] == ["0:01 Moshi Hello there", "0:01 You yes"]


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (Status(muted=True), "MUTED"),
        (Status(paused=True, muted=True), "PAUSED"),
        (Status(waiting_for="usb [mic]", paused=True), "WAITING FOR usb [mic]"),
        (Status(hushed=True), "SPEAK FIRST"),
    ],
)
def test_why_it_is_silent_comes_first(status, word):
    assert screen.status_line(status).plain.startswith(f"{word}  0:00")


def test_the_memory_line():
    line = screen.memory_line(Status(window=3000, filled=525))
    assert line.plain == "window 525/3000"
    shut = screen.memory_line(Status(window=9, filled=9, memory=MemoryStatus(0)))
    assert shut.plain == "window 9/9  memory off"
    memory = MemoryStatus(layers=16, updates=131, step=0.00213, drift=0.0134, gate=0.42)
    line = screen.memory_line(Status(memory=memory)).plain
    assert line.endswith("memory 16 layers  131 updates  step 0.0021  drift 0.013  gate 0.42")


def test_keys_say_what_they_do_now():
    assert screen.key_line(Status()).plain.split()[:4] == ["m", "mute", "p", "pause"]
    now = screen.key_line(Status(muted=True, paused=True)).plain
    assert now.split() == ["m", "unmute", "p", "go", "on", "s", "save", "q", "quit"]
