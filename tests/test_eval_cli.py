"""`eval` as a user runs it: tables, a document, a picture, and errors in one line."""

import json
import shlex
import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_memory import BASE

from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.model import load
from moshi_ttt_mlx.surgery import add_memory, save_adapter
from moshi_ttt_mlx.train.data import write_shard

VARIANTS = ["exact", "sinks", "off", "on", "frozen", "shuffled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an adapter that is in use and one that was never trained, three talks."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.tiny_moshi(folder / "model")
    lm = load(str(folder / "model")).lm
    adapter = add_memory(lm, BASE)
    save_adapter(adapter, folder / "untrained")
    for memory in adapter.memories.values():
        memory.gate = mx.random.normal(memory.gate.shape, key=mx.random.key(2))
    save_adapter(adapter, folder / "adapter")
    rng = np.random.default_rng(0)
    for i, frames in enumerate((40, 12, 25)):
        codes = rng.integers(0, lm.cfg.audio_vocab_size - 1, (17, frames))
        codes[0] = np.where(rng.random(frames) < 0.4, 3, rng.integers(4, tiny.TEXT_CARD, frames))
        write_shard(folder / "shards" / f"{i}.safetensors", codes, {"source": f"{i}.wav"})
    return folder


@pytest.fixture
def run(folder, capfd, monkeypatch):
    """Run `eval`; what it wrote to stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def evaluate(*args, status=0, adapter="adapter", shards=None):
        argv = [
            "eval",
            *map(str, shards or [folder / "shards"]),
            "--hf-repo",
            str(folder / "model"),
        ]
        argv += ["--adapter-path", str(folder / adapter)] if adapter else []
        monkeypatch.setattr(sys, "argv", ["moshi-ttt-mlx", *argv, *map(str, args)])
        assert main() == status
        return capfd.readouterr()

    return evaluate


def rows(table):
    """A printed table by the first cell of each row."""
    lines = [line.strip("│").split("│") for line in table.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_one_run_measures_everything(run, tmp_path):
    out, err = run("--json", tmp_path / "out.json", "--segment", 7, "--sinks", 3)
    document = json.loads((tmp_path / "out.json").read_text())
    assert list(document["variants"]) == VARIANTS
    assert document["settings"] == {"window": 9, "sinks": 3, "segment": 7}
    assert document["adapter"]["window"] == 9
    assert document["versions"]["mlx"] == mx.__version__
    assert document["command"] == shlex.join(sys.argv)
    assert list(document["positions"]) == ["0-1W", "1-2W", "2-4W", "4-8W"]
    exact, off, on = (document["variants"][name]["all"] for name in ("exact", "off", "on"))
    for stream in document["streams"]:
        assert off[stream]["nll"] == exact[stream]["nll"]
        assert on[stream]["nll"] != exact[stream]["nll"]
        assert exact[stream]["talks"] == 3
    assert exact["codebook 1"]["tokens"] == 77
    assert exact["codebook 2"]["tokens"] == 77 - 3  # a delay of one frame

    tables = out.split("by position")
    overall = rows(tables[0])
    assert list(overall) == [*VARIANTS, "guessing"]
    assert overall["on"][0] == f"{on['text']['nll']:.3f}"
    words = rows(tables[1])
    assert words["off"] == ["+0.000 ±0.000"] * 3 + ["+0.000"]  # one talk alone has no error
    entry = document["variants"]["shuffled"]["by_position"]["1-2W"]["words"]
    assert words["shuffled"][1] == f"{entry['minus_exact']:+.3f} ±{entry['minus_exact_se']:.3f}"
    assert "talks: 3, files skipped: 0" in err


def test_an_untrained_model_is_told_plainly(run):
    _, err = run()
    assert "NO BETTER THAN GUESSING" in err
    assert "codebook 8" in err


def test_an_untrained_memory_changes_nothing(run, tmp_path):
    _, err = run("--json", tmp_path / "out.json", adapter="untrained")
    assert "every gate of this memory is shut" in err
    variants = json.loads((tmp_path / "out.json").read_text())["variants"]
    for name in ("off", "on", "frozen", "shuffled"):
        for entry in variants[name]["by_position"].values():
            assert {stream["minus_exact"] for stream in entry.values()} == {0}


def test_without_an_adapter_its_variants_are_skipped_with_a_line_each(run):
    out, err = run("--window", 9, adapter=None)
    assert list(rows(out.split("by position")[0])) == ["exact", "sinks", "guessing"]
    lines = [line for line in err.splitlines() if "no --adapter-path" in line]
    assert [line.split(":")[0] for line in lines] == ["off", "on", "frozen", "shuffled"]


def test_bad_files_are_named_skipped_and_counted(run, folder, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no shard")
    good = folder / "shards" / "1.safetensors"
    _, err = run(shards=[bad, good, good])
    assert f"skipped {bad}: not a whole shard" in err
    assert f"skipped {good}: named twice" in err
    assert "talks: 1, files skipped: 2" in err
    assert "shuffled: not run: needs two talks" in err


def test_a_window_larger_than_the_memorys_is_told(run):
    assert "layers with a memory see 9 keys, as trained: give --window 9" in run("--window", 20)[1]


def test_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("--plot", tmp_path / "out.png")
    data = (tmp_path / "out.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


def test_without_matplotlib_there_is_a_note(run, tmp_path, monkeypatch):
    monkeypatch.setattr("moshi_ttt_mlx.train.plots.can_plot", lambda: False)
    out, err = run("--plot", tmp_path / "out.png")
    assert "no plot: pip install matplotlib" in err
    assert "shuffled" in out
    assert not (tmp_path / "out.png").exists()


def test_a_full_disk_does_not_cost_the_tables(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    out, err = run("--json", tmp_path / "out.json", status=2)
    assert "the disk is full" in err
    assert "shuffled" in out


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--window", "0"], "window 0 must be above 0"),
        (["--window", "101"], "made for 100 keys"),
        (["--sinks", "9"], "above sinks 9"),
        (["--segment", "0"], "segment must be at least 1"),
        (["--json", "nowhere/out.json"], "no folder"),
        (["--json", "."], "is a folder"),
        (["--plot", "out.jpg"], "ends in .png"),
        (["--adapter-path", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(run, args, why):
    lines = run(*args, status=2)[1].splitlines()
    lines = [line for line in lines if line.startswith("moshi-ttt-mlx:")]
    assert len(lines) == 1
    assert why in lines[0]


def test_a_typo_costs_no_loading(run, monkeypatch):
    monkeypatch.setattr("moshi_ttt_mlx.cli.eval.load_model", None)
    assert "nowhere does not exist" in run(shards=["nowhere"], status=2)[1]
