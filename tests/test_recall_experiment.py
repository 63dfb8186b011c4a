"""The recall experiment's own parts: the rival computes its rule, parts resume, tables say what is in
the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from recall import report  # noqa: E402
from recall.gated_delta import GatedDelta  # noqa: E402


def token_by_token(q, k, v, write, decay):
    """The gated delta rule as it is written down, one head, float64."""
    matrix, outs = np.zeros((q.shape[1], q.shape[1])), []
    for t in range(len(q)):
        matrix = decay[t] * matrix
        matrix = matrix + write[t] * np.outer(k[t], v[t] - matrix.T @ k[t])
        outs.append(matrix.T @ q[t])
    return np.array(outs)


@pytest.mark.parametrize("cuts", [[40], [16, 24], [5, 1, 34]])
def test_the_rival_computes_the_gated_delta_rule(cuts):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 3, 40, 8))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    write, decay = rng.uniform(0.1, 1, (2, 3, 40)), rng.uniform(0.7, 1, (2, 3, 40))
    learner, outs, start = GatedDelta(3, 8), [], 0
    state = learner.init_state(2)
    for size in cuts:
        part = [mx.array(x[:, :, start : start + size]) for x in (q, k, v, write)]
        out, state = learner(*part, state, decay=mx.array(decay[:, :, start : start + size]))
        outs.append(np.array(out))
        start += size
    found = np.concatenate(outs, axis=2)
    for b in range(2):
        for h in range(3):
            want = token_by_token(*(x[b, h] for x in (q, k, v, write, decay)))
            np.testing.assert_allclose(found[b, h], want, atol=2e-5)
    assert state.tokens == 40


def part(recall, **more):
    by_distance = dict.fromkeys(report.DISTANCES, recall)
    return {
        "recall": by_distance,
        **dict.fromkeys(("memory_off", "gate_closed", "shuffled"), by_distance),
        "in_window": recall,
        "in_window_base": 1.0,
        "cpu_seconds": 10.4,
    } | more


@pytest.mark.parametrize("plots", [True, False])
def test_summary_is_mean_and_spread_over_seeds(tmp_path, plots, monkeypatch, capsys):
    if plots:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(report, "can_plot", lambda: False)
    for seed, recall in enumerate((0.9, 1.0)):
        folder = tmp_path / f"seed_{seed}"
        folder.mkdir()
        (folder / "base.json").write_text('{"cpu_seconds": 3}')
        (folder / "default.json").write_text(json.dumps(part(recall, loss=[2.0, recall])))
    (tmp_path / "evidence.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(tmp_path, ["default", "never run"], 0.25, tmp_path)
    document = json.loads((tmp_path / "evidence.json").read_text())
    assert list(document["variants"]) == ["default"]
    row = document["variants"]["default"]
    assert row["recall"] == dict.fromkeys(report.DISTANCES, 0.95)
    assert row["std"]["recall"]["4W"] == pytest.approx(0.05)
    assert row["command"].endswith("--variants default --seeds 0 1")
    assert (row["chance"], row["seeds"], row["cpu_seconds"]) == (0.25, [0, 1], [10, 10])
    page = (tmp_path / "evidence.md").read_text()
    assert "95.0 ± 5.0" in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    images = {path.name for path in (tmp_path / "images").iterdir()}
    assert images == ({"recall.png", "recall_training.png"} if plots else set())
    assert ("pip install matplotlib" in capsys.readouterr().err) == (not plots)


def test_nothing_finished_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no finished variant"):
        report.write(tmp_path, ["default"], 0.25, tmp_path)


@pytest.mark.slow
def test_parts_run_and_are_not_run_again(tmp_path):
    command = [sys.executable, str(SCRIPTS / "recall_experiment.py"), "--quick", "--jobs", "1"]
    command += ["--seeds", "0", "--work", str(tmp_path), "--variants", "gated delta", "spoken"]
    first = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "seed_0 spoken base" in first.stdout
    names = {"base", "spoken base", "gated delta", "spoken"}
    parts = {name: tmp_path / "seed_0" / f"{name}.json" for name in names}
    times = {name: path.stat().st_mtime_ns for name, path in parts.items()}
    document = json.loads((tmp_path / "evidence.json").read_text())
    assert set(document["variants"]) == {"gated delta", "spoken"}
    for group in ("recall", "memory_off", "shuffled", "gate_closed"):
        assert set(document["variants"]["gated delta"][group]) == {"2W", "4W", "8W", "16W"}
    assert document["variants"]["spoken"]["stream_difference"] < 1e-4
    parts["spoken"].unlink()
    subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    again = {name: path.stat().st_mtime_ns for name, path in parts.items()}
    assert {name for name in names if times[name] != again[name]} == {"spoken"}
