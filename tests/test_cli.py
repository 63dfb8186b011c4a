"""The command line: flags of moshi_mlx, and what `transcribe` does with a recording."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from moshi_ttt_mlx.cli import build_parser, main
from moshi_ttt_mlx.cli.common import DEMO_NOTE

RATE = 24000
FRAME = 1920


def voice(frames, seed=0):
    """A gliding tone in noise: float32 `[frames * 1920]`."""
    t = np.arange(frames * FRAME) / RATE
    rng = np.random.default_rng(seed)
    tone = np.sin(2 * np.pi * (200 + 90 * np.sin(2 * np.pi * 1.3 * t)) * t)
    return (0.2 * tone + 0.05 * rng.standard_normal(t.size)).astype(np.float32)


def write(path, samples, rate=RATE, subtype="FLOAT"):
    soundfile.write(path, samples, rate, subtype=subtype)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Moshi and a tiny stt; stt's own silence is whole frames."""
    folder = tmp_path_factory.mktemp("models")
    seconds = {"audio_delay_seconds": 0.16, "audio_silence_prefix_seconds": 0.24}
    return {
        "moshi": str(tiny.tiny_moshi(folder / "moshi")),
        "stt": str(tiny.tiny_stt(folder / "stt", stt_config=seconds)),
    }


@pytest.fixture
def run(models, capfd):
    """Run `transcribe`; what it wrote to stdout."""

    def transcribe(*args, model="moshi", status=0):
        argv = ["transcribe", *map(str, args), "--hf-repo", models[model]]
        assert main(argv) == status
        out, err = capfd.readouterr()
        return out if status == 0 else err

    return transcribe


@pytest.fixture
def wav(tmp_path):
    return write(tmp_path / "in.wav", voice(12))


def read(path):
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == RATE
    return samples.T


# -- flags ----------------------------------------------------------------------------------------


def parse(*flags):
    return build_parser().parse_args(["transcribe", "in.wav", *flags])


@pytest.mark.parametrize(
    "flags, name, value",
    [
        (["--hf-repo", "a/b"], "hf_repo", "a/b"),
        (["--model", "demo"], "hf_repo", "demo"),
        (["--moshi-weight", "m"], "moshi_weight", "m"),
        (["--moshi-weights", "m"], "moshi_weight", "m"),
        (["--mimi-weight", "m"], "mimi_weight", "m"),
        (["--mimi-weights", "m"], "mimi_weight", "m"),
        (["--tokenizer", "t"], "tokenizer", "t"),
        (["-q", "4"], "quantized", 4),
        (["--quantized", "8"], "quantized", 8),
        (["--lm-config", "c"], "lm_config", "c"),
        (["--cfg-coef", "2.5"], "cfg_coef", 2.5),
        (["--temp", "0.7"], "temp", 0.7),
        (["--steps", "4000"], "steps", 4000),
        (["--verbose"], "verbose", True),
        (["out.wav"], "outfile", "out.wav"),
        (["--max-kv-size", "100"], "context", 100),
    ],
)
def test_the_flags_of_moshi_mlx_and_mlx_lm_are_understood(flags, name, value):
    assert getattr(parse(*flags), name) == value


@pytest.mark.parametrize("flags", [["-q", "3"], ["--temp", "warm"], ["--moshi"], ["--no-such"]])
def test_other_flags_end_with_status_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*flags)
    assert caught.value.code == 2


def test_steps_are_accepted_and_said_to_be_needless(run, wav, models, capfd):
    assert main(["transcribe", wav, "--hf-repo", models["moshi"], "--steps", "1"]) == 0
    err = capfd.readouterr().err
    assert "--steps is not needed: a talk has no limit here" in err
    assert "12 frames" in err  # all of them


def test_version_and_help(capsys):
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as caught:
            main([flag])
        assert caught.value.code == 0
        assert "moshi-ttt-mlx" in capsys.readouterr().out


def test_it_runs_as_a_module(wav, models):
    command = [sys.executable, "-m", "moshi_ttt_mlx", "transcribe", wav, "--quiet"]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([*command, "--hf-repo", models["moshi"]], capture_output=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.strip()


# -- a recording in, reply and words out ------------------------------------------------------------


def test_the_reply_is_as_long_as_the_recording_less_the_delay(run, wav, tmp_path):
    run(wav, tmp_path / "out.wav")
    reply = read(tmp_path / "out.wav")
    assert reply.shape == (1, 11 * FRAME)  # delays of one frame
    assert np.abs(reply).max() > 1e-3


def test_stereo_has_the_reply_left_and_the_user_right_in_step(run, wav, tmp_path):
    run(wav, tmp_path / "mono.wav")
    run(wav, tmp_path / "stereo.wav", "--stereo")
    left, right = read(tmp_path / "stereo.wav")
    np.testing.assert_array_equal(left[: 11 * FRAME], read(tmp_path / "mono.wav")[0])
    assert not left[11 * FRAME :].any()
    # 16 bits: half a step, and as much again for rounding at the edge.
    np.testing.assert_allclose(right, voice(12), rtol=0, atol=1.0 / 32768)


def test_words_go_to_stdout_and_to_every_format(run, wav, tmp_path):
    flags = [x for kind in ("txt", "json", "srt", "vtt") for x in (f"--{kind}", tmp_path / kind)]
    out = run(wav, *flags)
    words = [word["text"] for word in words_of(tmp_path / "json")]
    assert words and "".join(words) == out.replace(" ", "").strip()
    assert (tmp_path / "txt").read_text().split() == words
    assert (tmp_path / "srt").read_text().startswith("1\n00:00:0")
    assert (tmp_path / "vtt").read_text().startswith("WEBVTT")


def words_of(path):
    return json.loads(path.read_text())["words"]


def test_a_seed_makes_a_talk_again(run, wav, tmp_path):
    first = run(wav, tmp_path / "a.wav", "--seed", 1)
    assert run(wav, tmp_path / "b.wav", "--seed", 1) == first
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert run(wav, "--seed", 2) != first


def test_greedy_does_not_depend_on_the_seed(run, wav):
    assert run(wav, "--temp", 0, "--seed", 1) == run(wav, "--temp", 0, "--seed", 2)


def test_any_rate_and_number_of_channels(run, tmp_path):
    samples = voice(12)
    stereo = write(tmp_path / "s.flac", np.stack([samples, -samples], 1), subtype="PCM_16")
    mono = write(tmp_path / "m.flac", samples, subtype="PCM_16")
    assert run(stereo, "--channel", 0) == run(mono)
    slow = write(tmp_path / "slow.wav", voice(6)[::3].copy(), rate=8000)
    run(slow, tmp_path / "out.wav")
    assert read(tmp_path / "out.wav").shape == (1, 5 * FRAME)


def test_stdin_is_a_dash(run, wav, monkeypatch):
    want = run(wav)
    data = Path(wav).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run("-") == want


@pytest.mark.parametrize("model", ["moshi", "stt"])
@pytest.mark.parametrize("cut", [1, 5])
def test_two_halves_of_a_talk_are_the_whole(model, cut, run, tmp_path):
    samples, talk = voice(12), tmp_path / "talk.session"
    whole = write(tmp_path / "whole.wav", samples)
    halves = [
        write(tmp_path / "1.wav", samples[: cut * FRAME]),
        write(tmp_path / "2.wav", samples[cut * FRAME :]),
    ]
    run(whole, "--json", tmp_path / "whole.json", model=model)
    for half in halves:
        run(half, "--json", tmp_path / "half.json", "--session", talk, model=model)
    assert words_of(tmp_path / "half.json") == words_of(tmp_path / "whole.json") != []


def test_the_reply_of_two_halves_is_the_reply_of_the_whole(run, tmp_path):
    samples, talk = voice(12), tmp_path / "talk.session"
    run(write(tmp_path / "whole.wav", samples), tmp_path / "whole-out.wav")
    replies = []
    for i, half in enumerate((samples[: 5 * FRAME], samples[5 * FRAME :])):
        wav, out = write(tmp_path / f"{i}.wav", half), tmp_path / f"{i}-out.wav"
        run(wav, out, "--session", talk)
        replies.append(read(out)[0])
    np.testing.assert_array_equal(np.concatenate(replies), read(tmp_path / "whole-out.wav")[0])


@pytest.mark.parametrize(
    "flags, ignored",
    [
        ([], None),
        (["--seed", "7"], None),  # what it was begun with
        (["--memory", "off", "--temp", "0.5"], "--temp, --memory not used"),
        (["--condition", "description=x"], "--condition not used"),
    ],
)
def test_a_resumed_talk_says_which_flags_it_does_not_use(
    flags, ignored, models, wav, tmp_path, capfd
):
    first = ["transcribe", str(wav), "--hf-repo", models["moshi"], "--session", str(tmp_path / "s")]
    assert main([*first, "--seed", "7"]) == 0
    assert "not used" not in capfd.readouterr().err
    assert main([*first, *flags]) == 0
    error = " ".join(capfd.readouterr().err.split())
    assert (ignored in error) if ignored else ("not used" not in error)


def test_a_resumed_talk_in_stereo_stays_in_step(run, tmp_path):
    samples, talk = voice(12), tmp_path / "talk.session"
    run(write(tmp_path / "whole.wav", samples), tmp_path / "whole-out.wav")
    run(write(tmp_path / "1.wav", samples[: 5 * FRAME]), "--session", talk)
    second = write(tmp_path / "2.wav", samples[5 * FRAME :])
    run(second, tmp_path / "2-out.wav", "--stereo", "--session", talk)
    left, right = read(tmp_path / "2-out.wav")
    # The first reply is to the last frame of the first half.
    assert not right[:FRAME].any()
    np.testing.assert_allclose(right[FRAME:], samples[5 * FRAME :], rtol=0, atol=1.0 / 32768)
    whole = read(tmp_path / "whole-out.wav")[0]
    np.testing.assert_array_equal(left[: 7 * FRAME], whole[4 * FRAME :])


def test_stt_writes_what_it_heard_and_when(run, wav, tmp_path):
    out = run(wav, "--json", tmp_path / "json", model="stt")
    words = words_of(tmp_path / "json")
    assert words and "".join(w["text"] for w in words) == out.replace(" ", "").strip()
    assert all(0 <= w["start"] <= w["end"] for w in words)


@pytest.mark.parametrize(
    "delay, prefix, frames",
    [(0.16, 0.24, 3 + 12 + 15), (0.5, 1.0, 13 + 12 + 19), (0.0, 0.0, 0 + 12 + 13)],
)
def test_stt_gets_the_silence_it_was_trained_with(delay, prefix, frames, wav, tmp_path, capfd):
    seconds = {"audio_delay_seconds": delay, "audio_silence_prefix_seconds": prefix}
    folder = str(tiny.tiny_stt(tmp_path / "stt", stt_config=seconds))
    for already in (0, 13 if prefix == 1.0 else round(prefix / 0.08)):  # a resumed talk had it
        assert main(["transcribe", wav, "--hf-repo", folder, "--session", str(tmp_path / "s")]) == 0
        assert f"{frames - already} frames" in capfd.readouterr().err


# -- the user's words, too -------------------------------------------------------------------------


def by_speaker(path, speaker):
    words = json.loads(path.read_text())["words"]
    return [word for word in words if word["speaker"] == speaker]


def test_user_stt_adds_the_users_words_and_changes_no_other(run, models, wav, tmp_path):
    both, moshi, stt = (tmp_path / name for name in ("both", "moshi", "stt"))
    listening = ["--user-stt", models["stt"]]
    out = run(wav, tmp_path / "both.wav", "--json", both, "--txt", tmp_path / "txt", *listening)
    run(wav, tmp_path / "moshi.wav", "--json", moshi)
    run(wav, "--json", stt, "--temp", 0, model="stt")
    assert by_speaker(both, "moshi") == by_speaker(moshi, "moshi") != []
    assert by_speaker(both, "user") == by_speaker(stt, "user") != []
    assert (tmp_path / "both.wav").read_bytes() == (tmp_path / "moshi.wav").read_bytes()
    assert out == (tmp_path / "txt").read_text()
    assert {line.partition(": ")[0] for line in out.splitlines()} == {"Moshi", "You"}


def test_user_stt_goes_on_in_a_session(run, models, tmp_path):
    samples, talk, listening = voice(12), tmp_path / "talk.session", ["--user-stt", models["stt"]]
    run(write(tmp_path / "whole.wav", samples), "--json", tmp_path / "whole", *listening)
    for i, half in enumerate((samples[: 5 * FRAME], samples[5 * FRAME :])):
        wav = write(tmp_path / f"{i}.wav", half)
        run(wav, "--json", tmp_path / "half", "--session", talk, *listening)
    assert words_of(tmp_path / "half") == words_of(tmp_path / "whole")
    assert "name it again" in run(wav, "--session", talk, status=2)


def test_user_stt_takes_the_right_kind_of_model(run, models, wav):
    assert "expected a speech-to-text" in run(wav, "--user-stt", models["moshi"], status=2)
    assert "leave out --user-stt" in run(wav, "--user-stt", models["stt"], model="stt", status=2)
    assert "no folder ./none" in run(wav, "--user-stt", "./none", status=2)


# -- odd recordings -------------------------------------------------------------------------------


def spoiled():
    samples = voice(6)
    samples[100:300] = np.nan
    samples[500] = np.inf
    return samples


ODD = {
    "empty": (np.zeros(0, np.float32), 0),
    "one sample": (np.full(1, 0.1, np.float32), 1),
    "a frame": (voice(1), 1),
    "a frame and a sample": (voice(2)[: FRAME + 1], 2),
    "silence": (np.zeros(6 * FRAME, np.float32), 6),
    "not finite": (spoiled(), 6),
    "clipped": (np.clip(voice(6) * 1000, -1, 1), 6),
    "far too loud": (voice(6) * 1e6, 6),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("model", ["moshi", "stt"])
def test_odd_recordings_behave(kind, model, run, tmp_path):
    samples, frames = ODD[kind]
    wav = write(tmp_path / "in.wav", samples)
    if model == "stt":
        run(wav, "--txt", tmp_path / "txt", model="stt")
        assert (tmp_path / "txt").exists()
        return
    run(wav, tmp_path / "out.wav", "--stereo")
    sound = read(tmp_path / "out.wav")
    assert sound.shape == (2, frames * FRAME) and np.isfinite(sound).all()


# -- what is refused ------------------------------------------------------------------------------


def test_refusals_are_one_line_and_leave_files_alone(run, wav, tmp_path):
    before = Path(wav).read_bytes()
    (tmp_path / "link.wav").symlink_to(wav)
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out.wav"
    for args, message in [
        ([tmp_path / "none.wav"], "none.wav"),
        ([wav, wav], "is the input already"),
        ([wav, tmp_path / "." / "link.wav"], "is the input already"),
        ([wav, "--txt", wav], "is the input already"),
        ([wav, "--session", wav], "is the input already"),
        ([wav, out, "--srt", out], "is an output already"),
        ([wav, tmp_path / "no" / "out.wav"], "no folder"),
        ([wav, "--vtt", tmp_path / "no" / "v"], "no folder"),
        ([wav, tmp_path / "folder"], "is a folder"),
        ([wav, "--stereo"], "--stereo needs an output file"),
        ([wav, "--channel", 3], "channel"),
        ([wav, "--condition", "good"], "expected NAME=VALUE"),
        ([wav, "--condition", "mood=good"], "no condition 'mood'"),
        ([wav, "--context", 0], "context must be 1..100"),
        ([wav, "--context", 101], "context must be 1..100"),
        ([wav, "--sinks", 100], "sinks must be 0..99"),
        ([wav, "--temp", -1], "temp"),
    ]:
        err = run(*args, status=2)
        assert message in err and len(err.splitlines()) == 1
    assert Path(wav).read_bytes() == before and not out.exists()


def test_stt_makes_no_sound(run, wav, tmp_path):
    err = run(wav, tmp_path / "out.wav", model="stt", status=2)
    assert "only writes: leave out" in err and not (tmp_path / "out.wav").exists()


def test_a_text_model_does_not_listen(wav, tmp_path, capfd):
    folder = tiny.tiny_helium(tmp_path / "helium")
    assert main(["transcribe", wav, "--hf-repo", str(folder)]) == 2
    assert "is a text model: it neither listens nor speaks" in capfd.readouterr().err


def test_a_session_of_another_model_is_refused(run, wav, tmp_path):
    run(wav, "--session", tmp_path / "talk")
    kept = (tmp_path / "talk").read_bytes()
    err = run(wav, "--session", tmp_path / "talk", model="stt", status=2)
    assert "a session of" in err and (tmp_path / "talk").read_bytes() == kept


def test_verbose_shows_the_traceback(wav):
    with pytest.raises(Exception, match="no folder"):
        main(["transcribe", wav, "--hf-repo", "./none", "--verbose"])


def test_the_demo_says_what_it_is(wav, capfd):
    assert main(["transcribe", wav, "--model", "demo"]) == 0
    assert DEMO_NOTE in " ".join(capfd.readouterr().err.split())
