"""A training run in a folder: log, checkpoints, best and last adapter, plots; it resumes by itself.

    OUT/run.json          what the run was begun with
    OUT/log.jsonl         one line an update, one a held-out loss
    OUT/checkpoint/       what a resumed run needs (checkpoint.py)
    OUT/best/, OUT/last/  adapters for --adapter-path; where the base learns, model.safetensors
    OUT/training.png      curves, with matplotlib

After `kill -9` the same command goes on from the last checkpoint, and ends with the same bits as if
it had never been interrupted.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import UserError
from ..surgery import CONFIG_NAME, WEIGHTS_NAME, save_adapter
from . import checkpoint
from .data import Shard
from .plots import PLOT_NAME, can_plot, plot_run
from .trainer import Losses, Report, Trainer

MODEL_NAME = "model.safetensors"
# What a resumed run may do differently.
_FREE = ("steps",)


class Run:
    """Trains, and keeps what it has learned on disk.

    Args:
        folder: of the run; made where missing.
        trainer: at its start.
        held_out: talks to choose the best adapter by; may be none.
        model: which base this is; a resumed run must have the same.
        save_every, eval_every: updates between two checkpoints, two held-out losses.

    Raises:
        UserError: a folder of a run with other settings, data or model.
    """

    def __init__(
        self,
        folder: str | Path,
        trainer: Trainer,
        held_out: Sequence[Shard] = (),
        *,
        model: str = "",
        save_every: int = 100,
        eval_every: int = 100,
    ):
        self.folder, self.trainer, self.held_out = Path(folder), trainer, list(held_out)
        self.save_every, self.eval_every = save_every, eval_every
        self.best: tuple[float, int] | None = None
        self._resume(self._identity(model))
        if trainer.together.leads:
            # Not before: the folder of a refused run may be another's, which is still writing.
            for name in ("", "checkpoint", "best", "last"):
                checkpoint.remove_partial(self.folder / name)

    @property
    def log_path(self) -> Path:
        return self.folder / "log.jsonl"

    def _identity(self, model: str) -> dict:
        trainer = self.trainer
        return {
            "model": model,
            "memory": asdict(trainer.learner.adapter.config),
            "settings": asdict(trainer.settings),
            "talks": [[shard.name, shard.frames] for shard in trainer.plan.shards],
        }

    def _resume(self, identity: dict) -> None:
        together = self.trainer.together
        found = checkpoint.load(self.folder / "checkpoint", together)
        step = found[1]["step"] if found else -1
        together.check_equal("checkpoints", step, f"{self.folder} must be one disk for all")
        if found is None:
            if together.leads:
                self.folder.mkdir(parents=True, exist_ok=True)
                checkpoint.write_text(self.folder / "run.json", json.dumps(identity, indent=1))
                checkpoint.write_text(self.log_path, "")
            return
        _check_same(self.folder / "run.json", identity)
        arrays, meta = found
        self.best = tuple(meta["best"]) if meta["best"] else None
        self.trainer.load_state(arrays, meta)
        if together.leads:
            # Updates behind the checkpoint come again.
            kept = [line for line in read_log(self.folder) if line["step"] <= self.trainer.step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            checkpoint.write_text(self.log_path, text)

    # -- the loop -----------------------------------------------------------------------------

    def train(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Report | Losses]:
        """Train to the end, or until `stop()`; yields updates, and held-out losses as they come.

        Raises:
            UserError: a full disk (the checkpoint before is whole), a broken shard.
        """
        trainer = self.trainer
        if trainer.step == 0 and self.held_out:
            yield self._listen()
        while trainer.step < trainer.settings.steps:
            began = time.perf_counter()
            report = trainer.update()
            self._log(_line(report, time.perf_counter() - began))
            yield report
            ends = trainer.step == trainer.settings.steps or trainer.together.any(stop())
            if self.held_out and (trainer.step % self.eval_every == 0 or ends):
                yield self._listen()
            if trainer.step % self.save_every == 0 or ends:
                self.save()
            if ends:
                return

    def _listen(self) -> Losses:
        losses, step = self.trainer.held_out(self.held_out), self.trainer.step
        self._log({"step": step, "held_out": _plain(losses)})
        if self.best is None or losses.loss < self.best[0]:
            self.best = losses.loss, step
            self._export(self.folder / "best")
        return losses

    def save(self) -> None:
        """Make a checkpoint, and the adapter as it is now.

        Raises:
            UserError: the disk is full; the checkpoint before is whole.
        """
        folder, trainer = self.folder / "checkpoint", self.trainer
        try:
            # First, so that a kill in between leaves no older adapter beside a finished run.
            self._export(self.folder / "last")
            arrays, meta = trainer.state()
            meta |= {"best": self.best}
            checkpoint.save(folder, trainer.step, arrays, meta, trainer.together)
        except UserError as error:
            kept = checkpoint.read_pointer(folder)
            where = f"the checkpoint of update {kept['step']}" if kept else "nothing"
            raise UserError(f"{error}; {where} is kept") from error
        if trainer.together.leads and can_plot():
            lines = read_log(self.folder)
            checkpoint.replace_file(self.folder / PLOT_NAME, lambda new: plot_run(lines, new))

    def _export(self, folder: Path) -> None:
        if not self.trainer.together.leads:
            return
        learner = self.trainer.learner
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if learner.phase != "base":
                self._export_adapter(folder)
        except OSError as error:
            raise UserError(f"could not write {folder}: {error}") from error
        if learner.phase != "memory":
            base = dict(tree_flatten(learner.lm.parameters()))
            checkpoint.write_tensors(folder / MODEL_NAME, base, {"format": "mlx"})

    def _export_adapter(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=checkpoint.PARTIAL, dir=self.folder) as new:
            save_adapter(self.trainer.learner.adapter, new)
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                os.replace(Path(new) / name, folder / name)

    def _log(self, line: dict) -> None:
        if not self.trainer.together.leads:
            return
        try:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"could not write {self.log_path}: {error.strerror}") from error


def _line(report: Report, seconds: float) -> dict:
    """An update as a line of the log."""
    told = {"step": report.step, **_plain(report.losses)}
    told |= {"norm": _number(report.norm), "share": report.share}
    told |= {"gates": report.gates, "updates": report.updates}
    return told | {"seconds": seconds, "peak_bytes": mx.get_peak_memory()}


def _plain(losses: Losses) -> dict:
    """For JSON, which has no NaN: a stream without a token in it has None."""
    numbers = losses._asdict() | {"said": _number(losses.said), "text": _number(losses.text)}
    return numbers | {"codebooks": [_number(x) for x in losses.codebooks]}


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def read_log(folder: str | Path) -> list[dict]:
    """The lines of a run's log; a last line cut off by a crash is left out."""
    path, lines = Path(folder) / "log.jsonl", []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _check_same(path: Path, identity: dict) -> None:
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): name another --out") from error
    now = json.loads(json.dumps(identity))
    for group in identity:
        if begun.get(group) == now[group]:
            continue
        if not isinstance(now[group], dict):
            raise UserError(f"{path.parent} holds a run with other {group}: name another --out")
        names = [n for n in now[group] if begun.get(group, {}).get(n) != now[group][n]]
        if other := sorted(set(names) - set(_FREE)):
            raise UserError(
                f"{path.parent} holds a run with another {', '.join(other)}: name another --out"
            )
