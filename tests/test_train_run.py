"""A run learns, resumes after `kill -9` with the same bits, and loses nothing to a full disk."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import test_generate
from mlx.utils import tree_flatten
from test_train_loss import talk

from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.memory import MemoryConfig
from moshi_ttt_mlx.surgery import Adapter, add_memory, load_adapter
from moshi_ttt_mlx.train import checkpoint
from moshi_ttt_mlx.train.data import find_shards, write_shard
from moshi_ttt_mlx.train.loss import LossWeights
from moshi_ttt_mlx.train.optimizer import Optimizer, Schedule
from moshi_ttt_mlx.train.plan import Plan, cuts, read_batch
from moshi_ttt_mlx.train.run import Run, read_log
from moshi_ttt_mlx.train.segments import Attention, Learner
from moshi_ttt_mlx.train.together import Together
from moshi_ttt_mlx.train.trainer import MOST_BAD_STEPS, Losses, Settings, Trainer

MEMORY = MemoryConfig(layers=(1,), heads=2, head_dim=8, hidden=16, mini_batch=4)
SETTINGS = Settings(steps=8, batch=2, segment=10, window=6, memory_rate=1e-2, warmup=2)


def write_talks(folder, lengths=(24, 17, 20), seed=0):
    cfg = test_generate.build().cfg
    for i, frames in enumerate(lengths):
        write_shard(folder / f"{i}.safetensors", talk(cfg, frames, seed=seed + i)[0], {})
    return find_shards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_talks(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards):
    """An uninterrupted run, in the folder of that name."""
    return run_all(tmp_path_factory.mktemp("whole"), shards, save_every=100)


def make_trainer(shards, settings=SETTINGS, **overrides):
    lm = test_generate.build(**overrides)
    mx.random.seed(settings.seed)
    adapter = Adapter(MEMORY, {}) if settings.phase == "base" else add_memory(lm, MEMORY)
    learner = Learner(
        lm,
        adapter,
        settings.phase,
        Attention(settings.window, settings.sinks),
        LossWeights(lately=settings.lately),
        recompute=settings.recompute,
    )
    return Trainer(learner, shards, settings, Together())


def finish(trainer):
    while trainer.step < trainer.settings.steps:
        trainer.update()
    return trainer


def weights(trainer):
    return {name: np.array(a) for name, a in tree_flatten(trainer.params)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


# -- order of talks --------------------------------------------------------------------------------


def test_every_talk_once_an_epoch(tmp_path):
    shards = write_talks(tmp_path, lengths=range(3, 15))
    plan = Plan(shards, rows=4, seed=1)
    epochs = [
        [shard for i in range(3) for shard in plan.talks(3 * epoch + i)] for epoch in range(3)
    ]
    for talks in epochs:
        assert sorted(t.path for t in talks) == sorted(s.path for s in shards)
    assert epochs[0] != epochs[1]
    assert [t.path for t in Plan(shards, 4, 1).talks(7)] == [t.path for t in plan.talks(7)]


def test_a_batch_that_is_not_full_is_filled(shards):
    talks = [t for i in range(2) for t in Plan(shards, 2, 0).talks(i)]
    assert len(talks) == 4
    assert {t.path for t in talks} == {s.path for s in shards}


@pytest.mark.parametrize(("frames", "segment"), [(1, 5), (5, 5), (6, 5), (26, 10), (250, 250)])
def test_segments_cover_a_talk_and_are_about_as_long(frames, segment):
    pieces = cuts(frames, segment)
    assert [t for a, b in pieces for t in range(a, b)] == list(range(frames))
    lengths = [b - a for a, b in pieces]
    assert max(lengths) <= segment
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) == math.ceil(frames / segment)


def test_rows_of_a_batch_are_as_long_as_the_longest_of_all(shards):
    cfg = test_generate.build().cfg
    line = read_batch(shards, slice(1, 2), cfg)
    assert line.shape == (1, 9, 25)


# -- learning --------------------------------------------------------------------------------------


def test_warm_up_then_cosine():
    share = [Schedule(steps=10, warmup=4, floor=0.1).share(i) for i in range(12)]
    np.testing.assert_allclose(share[:5], [0.25, 0.5, 0.75, 1, 1])
    assert share[7] == pytest.approx(0.55)
    assert share[10] == share[11] == pytest.approx(0.1)


def test_clipping_and_bad_gradients():
    params = {"memory": {"w": mx.array([1.0, 2.0])}}
    kept = Optimizer({"memory": 0.1}, Schedule(10))
    same, norm = kept.update(params, {"memory": {"w": mx.array([mx.nan, 1.0])}})
    assert math.isnan(norm)
    assert same is params
    assert kept.step == 1
    # A clipped gradient is a shorter one in the same direction: Adam's first moment tells.
    clipped = Optimizer({"memory": 0.1}, Schedule(10), clip=0.5)
    _, norm = clipped.update(params, {"memory": {"w": mx.array([3.0, 4.0])}})
    assert norm == pytest.approx(5)
    moment = np.array(clipped.arrays()["memory.w.m"])
    np.testing.assert_allclose(moment, 0.1 * np.array([0.3, 0.4]), rtol=1e-5)


def test_the_loss_of_a_learnable_toy_falls(tmp_path):
    """The tokens of every talk are of one kind: learnable without a past, from the gate up."""
    cfg = test_generate.build().cfg
    codes = np.repeat(np.arange(1 + cfg.audio_codebooks)[:, None], 20, axis=1) + 4
    write_shard(tmp_path / "a.safetensors", codes, {})
    settings = replace(SETTINGS, steps=40, batch=1, segment=20, memory_rate=3e-2)
    trainer = make_trainer(find_shards(tmp_path), settings)
    before = weights(trainer)
    losses = [trainer.update().losses.loss for _ in range(40)]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])
    moved = {n for n, a in weights(trainer).items() if not np.array_equal(a, before[n])}
    assert moved == before.keys()
    held = trainer.held_out(find_shards(tmp_path))
    assert held.loss < 0.6 * np.mean(losses[:2])


def test_gates_move_faster_by_their_speed_and_nothing_else_does():
    params = {"memory": {"layer_1": {"gate": mx.array([0.5, -0.5]), "w": mx.array([0.5])}}}
    grads = {"memory": {"layer_1": {"gate": mx.array([1.0, -2.0]), "w": mx.array([1.0])}}}
    moved = {}
    for speed in (1.0, 7.0):
        optimizer, new = Optimizer({"memory": 0.01}, Schedule(10), gate_speed=speed), params
        for _ in range(2):
            before, new = new, optimizer.update(new, grads)[0]
        moved[speed] = {
            name: np.array(new["memory"]["layer_1"][name] - before["memory"]["layer_1"][name])
            for name in ("gate", "w")
        }
    np.testing.assert_allclose(moved[7.0]["gate"], 7 * moved[1.0]["gate"], rtol=1e-4)
    np.testing.assert_array_equal(moved[7.0]["w"], moved[1.0]["w"])


@pytest.mark.parametrize("phase", ["memory", "all"])
def test_what_is_frozen_stays_and_what_is_not_moves(shards, phase):
    trainer = make_trainer(shards, replace(SETTINGS, phase=phase, steps=3))
    lm = trainer.learner.lm
    before = {name: np.array(a) for name, a in tree_flatten(lm.parameters())}
    finish(trainer)
    after = {name: np.array(a) for name, a in tree_flatten(lm.parameters())}
    if phase == "memory":
        assert_same(after, before)
    else:
        changed = {n for n in after if not np.array_equal(after[n], before[n])}
        assert changed == before.keys()
        # Its own small rate: AdamW moves an entry by about the rate in a step.
        assert max(np.abs(after[n] - before[n]).max() for n in after) < 5e-6


def test_passes_over_part_of_a_batch_make_the_same_step(shards):
    whole, parts = (
        finish(make_trainer(shards, replace(SETTINGS, micro_batch=rows, steps=4)))
        for rows in (None, 1)
    )
    other = weights(parts)
    for name, a in weights(whole).items():
        # float32 sums in another order, through Adam's division by small second moments.
        np.testing.assert_allclose(other[name], a, atol=2e-4, err_msg=name)


def test_recomputing_makes_the_same_steps(shards):
    one, other = (
        finish(make_trainer(shards, replace(SETTINGS, recompute=on, steps=4)))
        for on in (True, False)
    )
    assert_same(weights(one), weights(other))


def test_held_out_is_the_loss_over_all_talks(shards, whole):
    trainer = make_trainer(shards)
    one = trainer.held_out(shards)
    other = make_trainer(shards, replace(SETTINGS, micro_batch=1)).held_out(shards)
    assert one.tokens == sum(s.frames * 5 - 3 for s in shards)  # 3 delayed codebooks lose one
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.codebooks == pytest.approx(other.codebooks, rel=1e-5)
    # Nothing was learned from, and the run goes on as it would have.
    assert_same(weights(finish(trainer)), weights(whole.trainer))


def test_talks_without_a_finite_gradient_are_left_behind(shards, monkeypatch):
    trainer = make_trainer(shards)
    gradients = trainer.learner.gradients

    def broken(*args):
        segment, _ = gradients(*args)
        return segment, {"memory": {"layer_1": {"gate": mx.array([mx.nan])}}}

    before = weights(trainer)
    monkeypatch.setattr(trainer.learner, "gradients", broken)
    assert math.isnan(trainer.update().norm)
    assert_same(weights(trainer), before)
    assert (trainer._batch, trainer._segment) == (1, 0)
    with pytest.raises(UserError, match="no finite gradient in 20 updates"):
        for _ in range(MOST_BAD_STEPS):
            trainer.update()


def test_a_stream_without_a_token_has_no_loss():
    losses = Losses.of(2.5, mx.array([[6.0, 0.0, 8.0], [3.0, 0.0, 4.0]]))
    assert (losses.loss, losses.text, losses.codebooks, losses.tokens) == (2.5, 2.0, [2.0], 7)
    assert math.isnan(losses.said)


# -- a run in a folder -----------------------------------------------------------------------------


def run_all(folder, shards, settings=SETTINGS, **kwargs):
    run = Run(folder, make_trainer(shards, settings), shards[:1], **kwargs)
    list(run.train())
    return run


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("plots", [True, False])
def test_what_a_run_leaves(tmp_path, shards, monkeypatch, plots):
    if plots:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr("moshi_ttt_mlx.train.run.can_plot", lambda: plots)
    out = tmp_path / "out"
    run = run_all(out, shards, save_every=3, eval_every=4)
    found = files(out)
    assert ("training.png" in found) == plots
    assert [name for name in found if name != "training.png"] == [
        "best/memory.safetensors",
        "best/memory_config.json",
        "checkpoint/last.json",
        "checkpoint/step-8-rank0.safetensors",
        "last/memory.safetensors",
        "last/memory_config.json",
        "log.jsonl",
        "run.json",
    ]
    lines = read_log(out)
    held = {line["step"]: line["held_out"]["loss"] for line in lines if "held_out" in line}
    assert list(held) == [0, 4, 8]
    assert run.best == (min(held.values()), min(held, key=held.get))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert len(lines[1]["codebooks"]) == 4
    lm = test_generate.build()
    adapter = load_adapter(lm, str(out / "last"))
    assert_same(
        {f"memory.{n}": np.array(a) for n, a in tree_flatten(adapter.parameters())},
        weights(run.trainer),
    )


def test_the_best_is_kept(tmp_path, shards, monkeypatch):
    run = Run(tmp_path / "out", make_trainer(shards), shards[:1], eval_every=2)
    real, found = run.trainer.held_out, {}
    wished = iter([5.0, 4.0, 3.0, 9.0, 9.0])

    def held_out(talks):
        found[run.trainer.step] = weights(run.trainer)
        return real(talks)._replace(loss=next(wished))

    monkeypatch.setattr(run.trainer, "held_out", held_out)
    list(run.train())
    assert run.best == (3.0, 4)
    adapter = load_adapter(test_generate.build(), str(tmp_path / "out" / "best"))
    kept = {f"memory.{n}": np.array(a) for n, a in tree_flatten(adapter.parameters())}
    assert_same(kept, found[4])


def test_phase_all_writes_the_base_too(tmp_path, shards):
    run = run_all(tmp_path / "out", shards, replace(SETTINGS, phase="all", steps=2))
    saved = mx.load(str(tmp_path / "out" / "last" / "model.safetensors"))
    base = dict(tree_flatten(run.trainer.learner.lm.parameters()))
    assert_same(
        {n: np.array(a) for n, a in saved.items()}, {n: np.array(a) for n, a in base.items()}
    )


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, shards, whole, stop_at):
    # Checkpoints fall within talks and between them: a batch's talks have 3 or 2 segments.
    first = Run(tmp_path / "cut", make_trainer(shards), shards[:1], save_every=1)
    for report in first.train():
        if getattr(report, "step", 0) == stop_at:
            break
    # The checkpoint is that of the update before: this one was not saved yet.
    second = Run(tmp_path / "cut", make_trainer(shards), shards[:1], save_every=1)
    assert second.trainer.step == stop_at - 1
    list(second.train())
    assert_same(weights(second.trainer), weights(whole.trainer))
    assert_same(
        {n: np.array(a) for n, a in second.trainer.optimizer.arrays().items()},
        {n: np.array(a) for n, a in whole.trainer.optimizer.arrays().items()},
    )
    losses = [
        [line["loss"] for line in read_log(run.folder) if "loss" in line] for run in (whole, second)
    ]
    assert losses[0] == losses[1]


def test_a_finished_run_does_nothing(tmp_path, shards):
    run_all(tmp_path, shards)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert list(Run(tmp_path, make_trainer(shards), shards[:1]).train()) == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before


def test_more_steps_go_on(tmp_path, shards):
    run_all(tmp_path, shards)
    longer = Run(tmp_path, make_trainer(shards, replace(SETTINGS, steps=10)), shards[:1])
    assert [r.step for r in longer.train() if hasattr(r, "step")] == [9, 10]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (replace(SETTINGS, segment=7, clip=2.0), "another clip, segment"),
        (replace(SETTINGS, phase="all"), "another phase"),
    ],
)
def test_another_runs_folder_is_refused(tmp_path, shards, settings, why):
    run_all(tmp_path, shards)
    with pytest.raises(UserError, match=why):
        Run(tmp_path, make_trainer(shards, settings), shards[:1])


def test_other_talks_or_another_model_are_refused(tmp_path, shards):
    run_all(tmp_path, shards)
    with pytest.raises(UserError, match="other talks"):
        Run(tmp_path, make_trainer(shards[:2]))
    with pytest.raises(UserError, match="other model"):
        Run(tmp_path, make_trainer(shards), model="another")


def test_stop_saves(tmp_path, shards):
    run = Run(tmp_path, make_trainer(shards), shards[:1], save_every=100)
    list(run.train(stop=lambda: run.trainer.step == 3))
    assert Run(tmp_path, make_trainer(shards), shards[:1]).trainer.step == 3


# -- disks and kills -------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, shards, whole, monkeypatch):
    run = Run(tmp_path, make_trainer(shards), shards[:1], save_every=2)
    save = mx.save_safetensors

    def full(name, arrays, metadata=None):
        if run.trainer.step < 4 or "step-" not in name:
            return save(name, arrays, metadata)
        Path(name).write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(UserError, match="the disk is full; the checkpoint of update 2 is kept"):
        list(run.train())
    monkeypatch.undo()
    assert not [name for name in files(tmp_path) if "step-4" in name or checkpoint.PARTIAL in name]
    again = Run(tmp_path, make_trainer(shards), shards[:1])
    assert again.trainer.step == 2
    list(again.train())
    assert_same(weights(again.trainer), weights(whole.trainer))


PARTIAL_FILES = [
    folder + checkpoint.PARTIAL + name
    for folder, name in [
        ("", "run.x1.json"),
        ("", "training.x2.png"),
        ("", "x3/memory.safetensors"),
        ("checkpoint/", "last.x4.json"),
        ("checkpoint/", "step-1-rank1.x5.safetensors"),
        ("best/", "model.x6.safetensors"),
        ("last/", "model.x7.safetensors"),
    ]
]


def plant(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half of")


@pytest.mark.parametrize("begun", [False, True])
def test_what_a_kill_left_half_written_goes_as_the_run_goes_on(tmp_path, shards, begun):
    if begun:
        run = Run(tmp_path, make_trainer(shards), save_every=2)
        list(run.train(stop=lambda: run.trainer.step == 2))
    kept = [".notes.json", "last/notes.json", "mine/" + checkpoint.PARTIAL + "x8.json"]
    plant(tmp_path, [*PARTIAL_FILES, *kept])
    before = set(files(tmp_path))
    Run(tmp_path, make_trainer(shards))
    gone = before - set(files(tmp_path))
    assert gone == {str(Path(name)) for name in PARTIAL_FILES}


def test_another_runs_half_written_files_are_left_alone(tmp_path, shards):
    run_all(tmp_path, shards)
    plant(tmp_path, PARTIAL_FILES)
    before = files(tmp_path)
    with pytest.raises(UserError, match="another clip"):
        Run(tmp_path, make_trainer(shards, replace(SETTINGS, clip=2.0)), shards[:1])
    assert files(tmp_path) == before


def test_an_older_step_goes_with_the_next_checkpoint(tmp_path, shards):
    plant(tmp_path, ["checkpoint/step-1-rank0.safetensors", "checkpoint/step-1-rank1.safetensors"])
    run_all(tmp_path, shards)
    assert [name for name in files(tmp_path) if "step-" in name] == [
        "checkpoint/step-1-rank1.safetensors",
        "checkpoint/step-8-rank0.safetensors",
    ]


def test_a_checkpoint_without_its_end_is_named(tmp_path, shards):
    run_all(tmp_path, shards)
    (file,) = (tmp_path / "checkpoint").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        Run(tmp_path, make_trainer(shards), shards[:1])
    (tmp_path / "checkpoint" / "last.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Run(tmp_path, make_trainer(shards), shards[:1])


def test_another_number_of_processes_is_refused(tmp_path, shards):
    run_all(tmp_path, shards)
    pointer = tmp_path / "checkpoint" / checkpoint.POINTER
    pointer.write_text(json.dumps({"step": 8, "processes": 2}))
    with pytest.raises(UserError, match="made by 2 process"):
        Run(tmp_path, make_trainer(shards), shards[:1])


ENDLESS_RUN = """
import sys
sys.path.insert(0, {tests!r})
from test_train_run import ENDLESS, Run, find_shards, make_trainer
run = Run({out!r}, make_trainer(find_shards({shards!r}), ENDLESS), save_every=1)
list(run.train())
"""
ENDLESS = replace(SETTINGS, steps=10_000)


def test_kill_9_at_any_moment(tmp_path, shards):
    """A checkpoint after every update, killed wherever it happens to be, then gone on with."""
    places = {"tests": str(Path(__file__).parent), "shards": str(shards[0].path.parent)}
    source = ENDLESS_RUN.format(**places, out=str(tmp_path))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for moment in (0.0, 0.037):
        before = (checkpoint.read_pointer(tmp_path / "checkpoint") or {"step": 0})["step"]
        child = subprocess.Popen([sys.executable, "-c", source], env=env)
        while (checkpoint.read_pointer(tmp_path / "checkpoint") or {"step": 0})["step"] <= before:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
        child.wait()
    trainer = make_trainer(shards, ENDLESS)
    run = Run(tmp_path, trainer)
    until = trainer.step + 3
    assert trainer.step >= 2
    list(run.train(stop=lambda: trainer.step == until))
    want = make_trainer(shards, ENDLESS)
    while want.step < until:
        want.update()
    assert_same(weights(trainer), weights(want))
    assert not [name for name in files(tmp_path) if checkpoint.PARTIAL in name]
    assert len(files(tmp_path / "checkpoint")) == 2
