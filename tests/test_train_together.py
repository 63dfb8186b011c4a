"""Two processes make the steps of one with the doubled batch, started as a user starts them."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_train_run import SETTINGS, make_trainer, weights, write_talks

from moshi_ttt_mlx.train.run import Run, read_log

HERE = Path(__file__).parent
TWO = replace(SETTINGS, batch=1, steps=5)
ONE = replace(SETTINGS, batch=2, micro_batch=1, steps=5)

# What each process does; the last argument is a folder.
PART = """#!{python}
import sys
sys.path.insert(0, {tests!r})
import mlx.core as mx
from test_train_run import Run, find_shards, make_trainer, tree_flatten
from test_train_together import TWO
shards = find_shards({shards!r})
trainer = make_trainer(shards, TWO)
run = Run({out!r}, trainer, shards[:2], save_every=2, eval_every=2)
sys.stdout.write(f"begins at {{trainer.step}}\\n")  # at once: two processes write
rank = trainer.together.rank
list(run.train(stop=lambda: rank == 1 and trainer.step == {stop_at}))
mx.save_safetensors({out!r} + f"/result-{{rank}}.safetensors", dict(tree_flatten(trainer.params)))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder, shards, stop_at=None):
    """`mlx.launch -n 2` of the part above, one of them told to stop; its output."""
    script = folder / "part.py"
    places = {"tests": str(HERE), "shards": str(shards[0].path.parent), "out": str(folder / "out")}
    script.write_text(PART.format(python=sys.executable, **places, stop_at=stop_at))
    script.chmod(0o755)  # newer mlx.launch runs programs, older ones Python scripts
    mlx_launch = Path(sys.executable).parent / "mlx.launch"
    # The ring takes a port for each process.
    command = [mlx_launch, "-n", "2", "--backend", "ring", "--starting-port", str(free_port())]
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*map(str, command), str(script)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_talks(tmp_path_factory.mktemp("shards"), lengths=(24, 17, 20, 12))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, shards):
    """A finished run of two processes: its folder."""
    folder = tmp_path_factory.mktemp("pair")
    output = launch(folder, shards)
    assert (folder / "out" / "result-1.safetensors").exists(), output
    return folder


def result(folder, rank):
    arrays = mx.load(str(folder / "out" / f"result-{rank}.safetensors"))
    return {name: np.array(a) for name, a in arrays.items()}


def test_two_processes_make_the_steps_of_one_with_the_doubled_batch(tmp_path, pair, shards):
    one = Run(tmp_path / "one", make_trainer(shards, ONE), shards[:2], save_every=2, eval_every=2)
    list(one.train())
    want, start = weights(one.trainer), weights(make_trainer(shards, ONE))
    # The same passes, and the sum of two does not depend on their order: the same bits.
    for rank in (0, 1):
        for name, array in result(pair, rank).items():
            np.testing.assert_array_equal(array, want[name], name)
    assert max(np.abs(want[n] - start[n]).max() for n in want) > 1e-2
    ours, theirs = (read_log(folder) for folder in (pair / "out", tmp_path / "one"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        losses, others = line.get("held_out", line), other.get("held_out", other)
        assert losses["loss"] == pytest.approx(others["loss"], rel=1e-5)
        assert losses["tokens"] == others["tokens"]


def test_alone_each_half_would_have_made_other_steps(pair, shards):
    alone = make_trainer(shards, replace(TWO, steps=5))
    while alone.step < 5:
        alone.update()
    ours = weights(alone)
    assert any(not np.allclose(a, ours[n], atol=1e-3) for n, a in result(pair, 0).items())


def test_both_stop_when_one_is_told_to_and_both_resume(tmp_path, shards, pair):
    launch(tmp_path, shards, stop_at=3)
    pointer = tmp_path / "out" / "checkpoint" / "last.json"
    assert json.loads(pointer.read_text()) == {"step": 3, "processes": 2}
    output = launch(tmp_path, shards)
    assert output.count("begins at 3") == 2
    for rank in (0, 1):
        np.testing.assert_equal(result(tmp_path, rank), result(pair, rank))


def test_a_group_of_one_needs_nothing():
    from moshi_ttt_mlx.train.together import Together

    alone = Together()
    tree = {"a": mx.array([1.0, 2.0])}
    assert alone.sum(tree) is tree
    assert (alone.rank, alone.size, alone.leads, alone.any(True)) == (0, 1, True, True)
    assert dict(tree_flatten(tree))
