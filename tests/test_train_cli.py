"""`tokenize` and `train` as a user runs them: an adapter comes out, and errors are one line."""

import json
import signal

import pytest
import tiny
from test_train_data import add_talk, sound

from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.model import load
from moshi_ttt_mlx.session import Session
from moshi_ttt_mlx.train.run import read_log
from moshi_ttt_mlx.train.trainer import Trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.tiny_moshi(tmp_path_factory.mktemp("model") / "moshi"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, model):
    """Folders of shards: two talks to learn from, one held out."""
    folder = tmp_path_factory.mktemp("data")
    for part, lengths in (("talks", (2.0, 1.2)), ("held", (1.0,))):
        (folder / part).mkdir()
        for i, seconds in enumerate(lengths):
            words = [["hello", [0.3, 0.6], "SPEAKER_MAIN"]]
            add_talk(folder / part, f"{i}", sound(seconds, seed=i), words)
        argv = ["tokenize", str(folder / part), "--out", str(folder / f"{part}.shards")]
        assert main([*argv, "--hf-repo", model]) == 0
    return {part: str(folder / f"{part}.shards") for part in ("talks", "held")}


@pytest.fixture
def train(model, shards, tmp_path, capfd):
    """Run `train` into `tmp_path / "out"`; what it wrote to stderr."""

    def run(*args, status=0, talks=shards["talks"]):
        usual = ["--segment", "9", "--window", "6", "--steps", "4", "--warmup", "1", "--lr", "1e-2"]
        argv = ["train", talks, "--out", str(tmp_path / "out"), "--hf-repo", model, *usual, *args]
        assert main(argv) == status
        return capfd.readouterr().err

    return run


def test_an_adapter_comes_out_and_talks(train, shards, model, tmp_path):
    err = train("--held-out", shards["held"], "--eval-every", "2", "--batch", "2")
    out = tmp_path / "out"
    assert "GiB (computed)" in err
    assert f"--adapter-path {out / 'best'}" in err
    assert "update 0: held out" in err
    assert len(err.partition("codebooks ")[2].splitlines()[0].split()) == 8
    talking = load(model, adapter_path=str(out / "last"))
    assert talking.memory.config.layers == (1,) or talking.memory.config.layers == "top:1"
    assert talking.memory.config.window == 6  # talks beside what it learned beside
    session = Session(talking, seed=1)
    for _ in range(20):
        assert session.step(sound(0.08)[:, 0]).memory_ok
    assert session.memory_report()[1]["gate"] > 0


def test_learning_from_an_adapter_goes_on_from_it(train, tmp_path):
    train()
    first = load_adapter_arrays(tmp_path / "out" / "last")
    (tmp_path / "out").rename(tmp_path / "first")
    train("--adapter-path", str(tmp_path / "first" / "last"), "--lr", "1e-9", "--steps", "1")
    for name, array in load_adapter_arrays(tmp_path / "out" / "last").items():
        assert abs(array - first[name]).max() < 1e-6


def load_adapter_arrays(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "memory.safetensors")


def test_ctrl_c_saves_and_the_same_command_goes_on(train, tmp_path, monkeypatch):
    update = Trainer.update

    def interrupted(trainer):
        report = update(trainer)
        if report.step == 2:
            signal.raise_signal(signal.SIGINT)
        return report

    monkeypatch.setattr(Trainer, "update", interrupted)
    err = train(status=130)
    assert "saved at update 2: the same command goes on" in err
    monkeypatch.undo()
    err = train()
    assert "resumed at update 2" in err
    steps = [line["step"] for line in read_log(tmp_path / "out")]
    assert steps == [1, 2, 3, 4]


def test_without_matplotlib_there_is_a_note(train, tmp_path, monkeypatch):
    monkeypatch.setattr("moshi_ttt_mlx.train.plots.can_plot", lambda: False)
    monkeypatch.setattr("moshi_ttt_mlx.train.run.can_plot", lambda: False)
    assert "no plots: pip install matplotlib" in train()
    assert not (tmp_path / "out" / "training.png").exists()


def test_curves(train, shards, tmp_path):
    pytest.importorskip("matplotlib")
    assert "curves: " in train("--held-out", shards["held"])
    data = (tmp_path / "out" / "training.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--layers", "5"], "layers"),
        (["--layers", "depformer:1"], "depformer"),
        (["--segment", "0"], "segment must be at least 1"),
        (["--batch", "3", "--micro-batch", "2"], "does not divide"),
        (["--lr", "-1"], "memory_rate must be above 0"),
        (["--window", "0"], "window 0 must be above 0"),
        (["--save-every", "0"], "at least 1"),
        (["--held-out", "nowhere"], "nowhere does not exist"),
        (["--phase", "all", "-q", "4"], "quantized to 4 bits"),
        (["--memory-config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_errors_are_one_line(train, args, why):
    lines = [line for line in train(*args, status=2).splitlines() if "moshi-ttt-mlx:" in line]
    assert len(lines) == 1
    assert why in lines[0]


def test_held_out_talks_are_not_learned_from(train, shards):
    assert "both held out and learned from" in train("--held-out", shards["talks"], status=2)


def test_phrases_kept_for_testing_come_from_a_file(train, tmp_path):
    phrases = tmp_path / "kept.txt"
    phrases.write_text("hello hello\n\n hello there hello \n", encoding="utf-8")
    train("--kept", str(phrases))
    begun = json.loads((tmp_path / "out" / "run.json").read_text())
    assert begun["settings"]["kept"] == ["hello hello", "hello there hello"]
    phrases.write_text("hello")
    assert "two words or more, not 'hello'" in train("--kept", str(phrases), status=2)
    phrases.write_bytes(b"\xff hello")
    for path in (phrases, tmp_path / "gone.txt"):
        assert f"could not read --kept {path}" in train("--kept", str(path), status=2)


def test_a_place_for_the_run_is_needed(capfd):
    assert main(["train"]) == 2
    assert "SHARDS and --out" in capfd.readouterr().err


def test_a_memory_of_its_own(train, tmp_path):
    config = {"format": 1, "layers": [0, 1], "placement": "after", "heads": 2, "head_dim": 8}
    path = tmp_path / "memory.json"
    path.write_text(json.dumps(config))
    train("--memory-config", str(path), "--layers", "0")
    written = json.loads((tmp_path / "out" / "last" / "memory_config.json").read_text())
    assert written["layers"] == [0]
    assert (written["placement"], written["head_dim"], written["window"]) == ("after", 8, 6)


def test_the_estimate_needs_no_model(capfd):
    assert main(["train", "--estimate", "--window", "125"]) == 0
    out = capfd.readouterr().out
    assert "Moshi 7B, 4 bits: computed from shapes" in out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert 4.4 < float(rows["base"].split("│")[2]) < 4.6
    assert float(rows["all"].split("│")[2]) < 7


def test_the_estimate_of_a_named_model(capfd, model):
    assert main(["train", "--estimate", "--hf-repo", model]) == 0
    assert "bfloat16: computed" in capfd.readouterr().out


def test_a_base_learns_without_a_memory(train, model, tmp_path):
    train("--phase", "base", "--base-rate", "1e-2")
    last = tmp_path / "out" / "last"
    assert [path.name for path in last.iterdir()] == ["model.safetensors"]
    before, after = load(model), load(model, moshi_weight=str(last / "model.safetensors"))
    assert after.memory is None
    change = before.lm.text_linear.weight - after.lm.text_linear.weight
    assert 1e-3 < float(abs(change).max()) < 0.1


def test_a_base_without_a_memory_refuses_an_adapter(train, tmp_path):
    train()
    err = train("--phase", "base", "--adapter-path", str(tmp_path / "out" / "last"), status=2)
    assert "without memory" in err


def test_learning_from_words_alone_never_runs_the_depformer(train, shards, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the depformer was run")

    train("--steps", "1")
    (line,) = [line for line in read_log(tmp_path / "out") if "loss" in line]
    monkeypatch.setattr("moshi_ttt_mlx.train.segments.audio_losses", never)
    train("--steps", "1", "--audio", "0", "--out", str(tmp_path / "words"))
    (words,) = [line for line in read_log(tmp_path / "words") if "loss" in line]
    assert words["codebooks"] == []
    assert words["text"] == line["text"] and words["said"] == line["said"]
    assert 0 < words["loss"] < line["loss"]


def test_an_impossible_weight_of_audio_is_refused(train):
    assert "audio must be at least 0, got -1" in train("--audio", "-1", status=2)
