"""Teach a model's memory on shards (of `tokenize`), alone or with `mlx.launch` on several machines.

The same command resumes a run that was interrupted or killed. --estimate computes the memory that
training takes and needs no model: Moshi 7B in 4 bits, unless another is named.
"""

import argparse
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..errors import UserError
from .common import add_model_arguments, load_model, progress_bar

PHASES = ("memory", "all", "base")
PHASES_HELP = "what learns: the memory (default), the base too, or the base without a memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="?", help="folder of shards to learn from"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run")
    parser.add_argument("--held-out", metavar="SHARDS", help="talks to choose the best adapter by")
    parser.add_argument("--estimate", action="store_true", help="compute memory, train nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_memory_arguments(parser.add_argument_group("memory"))
    _add_training_arguments(parser.add_argument_group("training"))
    add_model_arguments(parser)


def _add_memory_arguments(group) -> None:
    group.add_argument("--layers", metavar="top:N|I,J,..", help="(default: the upper half)")
    group.add_argument(
        "--memory-config", metavar="FILE", help="a memory_config.json, for all else about it"
    )
    group.add_argument(
        "--window",
        type=int,
        default=250,
        help="keys attention sees: fewer than the model was made for, or the memory has nothing to "
        "do (default: 250, 20 s)",
    )
    group.add_argument("--sinks", type=int, default=0, help="first frames that stay visible")


def _add_training_arguments(group) -> None:
    number, share = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}
    group.add_argument("--phase", choices=PHASES, default="memory", help=PHASES_HELP)
    group.add_argument("--steps", default=1000, **number, help="updates (default: 1000)")
    group.add_argument("--batch", default=1, **number, help="talks at once, of each process")
    group.add_argument("--micro-batch", **number, help="talks in one pass (default: all)")
    group.add_argument(
        "--segment", default=250, **number, help="frames of an update (default: 250)"
    )
    group.add_argument(
        "--memory-rate", "--lr", default=1e-4, **share, help="learning rate (default: 1e-4)"
    )
    group.add_argument(
        "--gate-speed", default=10.0, **share, help="rate of the gates over that (default: 10)"
    )
    group.add_argument("--base-rate", default=1e-6, **share, help="the base's own (default: 1e-6)")
    group.add_argument("--warmup", default=50, **number, help="updates to the full rate")
    group.add_argument("--clip", default=1.0, **share, help="largest norm of a gradient")
    group.add_argument("--weight-decay", default=0.01, **share)
    group.add_argument("--text-padding", default=0.5, **share, help="weight of unsaid text tokens")
    group.add_argument("--first-codebook", default=100.0, **share, help="weight of the first one")
    group.add_argument(
        "--audio", default=1.0, **share, help="weight of all codebooks; 0 learns from words alone"
    )
    group.add_argument(
        "--lately",
        default=0.0,
        **share,
        help="weight of a second loss, where the base learns: half-way up it names the words said last",
    )
    group.add_argument(
        "--kept",
        metavar="FILE",
        help="phrases kept for testing, one a line: where the rest of one was just said, its last word "
        "is not counted as wrong",
    )
    group.add_argument(
        "--no-recompute",
        dest="recompute",
        action="store_false",
        help="keep activations: faster, needs more memory",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--save-every", default=100, **number, help="updates (default: 100)")
    group.add_argument("--eval-every", default=100, **number, help="updates (default: 100)")


def run(args: argparse.Namespace) -> int:
    from ..train.together import Together

    settings = _settings(args)
    if args.estimate:
        _print_estimate(args, settings)
        return 0
    if not args.shards or not args.out:
        raise UserError("train needs SHARDS and --out DIR (or --estimate)")
    if min(args.save_every, args.eval_every) < 1:
        raise UserError("--save-every and --eval-every must be at least 1")
    together = Together()
    console = Console(stderr=True, quiet=args.quiet or not together.leads, soft_wrap=True)
    talks, held_out = _talks(args)
    model = load_model(args, console)
    return _train(args, settings, together, console, model, talks, held_out)


def _settings(args: argparse.Namespace):
    from ..train.trainer import Settings

    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return Settings(**given | {"kept": _phrases(args.kept)})


def _phrases(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"could not read --kept {path}: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _talks(args: argparse.Namespace) -> tuple[list, list]:
    """Training and held-out shards; before the model, whose loading takes longer."""
    from ..train.data import find_shards

    talks = find_shards(args.shards)
    held_out = find_shards(args.held_out) if args.held_out else []
    both = {shard.path.resolve() for shard in talks} & {shard.path.resolve() for shard in held_out}
    if both:
        raise UserError(f"{min(both)} is both held out and learned from")
    return talks, held_out


def _train(args, settings, together, console, model, talks, held_out) -> int:
    from ..train.data import check_shards
    from ..train.run import Run
    from ..train.trainer import Trainer

    check_shards([*talks, *held_out], model.lm.cfg)
    learner = _learner(args, settings, model)
    _say_what_it_takes(learner, settings, console)
    trainer = Trainer(learner, talks, settings, together)
    run = Run(
        args.out,
        trainer,
        held_out,
        model=model.fingerprint,
        save_every=args.save_every,
        eval_every=args.eval_every,
    )
    if trainer.step:
        console.print(f"resumed at update {trainer.step}", style="dim")
    bar = progress_bar(console, "{task.completed}/{task.total}", "{task.description}")
    with _Stop(console) as stop, bar:
        _follow(run, stop, bar)
    if stop.asked and trainer.step < settings.steps:
        console.print(f"saved at update {trainer.step}: the same command goes on", style="yellow")
        raise KeyboardInterrupt
    for line in _summary(run):
        console.print(line, markup=False, highlight=False)
    return 0


def _learner(args: argparse.Namespace, settings, model):
    import mlx.core as mx

    from ..surgery import Adapter, add_memory
    from ..train.kept import encode
    from ..train.loss import LossWeights
    from ..train.segments import Attention, Learner

    if args.adapter_path and (args.layers or args.memory_config):
        raise UserError("--adapter-path brings its own memory: leave out --layers, --memory-config")
    mx.random.seed(settings.seed)
    adapter = model.memory
    if settings.phase == "base":
        if adapter is not None:
            raise UserError(
                f"--phase base trains a model without memory, and {model.name} has one: "
                "--adapter-path none leaves it out"
            )
        adapter = Adapter(_memory_config(args, model.lm.cfg), {})
    elif adapter is None:
        adapter = add_memory(model.lm, _memory_config(args, model.lm.cfg))
        mx.eval(adapter.parameters())
    return Learner(
        model.lm,
        adapter,
        settings.phase,
        Attention(settings.window, settings.sinks),
        LossWeights(
            settings.text_padding,
            settings.first_codebook,
            settings.audio,
            settings.lately,
            encode(settings.kept, model.tokenizer.encode),
        ),
        settings.recompute,
    )


def _memory_config(args: argparse.Namespace, lm_config):
    """The memory that the flags ask for; it keeps the window that it was trained beside."""
    from ..bench_memory import half_the_layers
    from ..surgery import read_memory_config

    given = args.memory_config
    config = read_memory_config(Path(given)) if given else half_the_layers(lm_config)
    if args.layers:
        config = replace(config, layers=_layer_list(args.layers))
    config.layer_indices(lm_config.transformer.num_layers)  # refused here, not when it is built
    if config.window:
        return config
    return replace(config, window=min(args.window, lm_config.transformer.context))


def _layer_list(text: str) -> str | tuple[int, ...]:
    if not text.replace(",", "").isdigit():
        return text
    return tuple(int(part) for part in text.split(",") if part)


# -- what is shown ---------------------------------------------------------------------------------


class _Stop:
    """Ctrl-C and SIGTERM end the run after the update; a second Ctrl-C at once."""

    def __init__(self, console: Console):
        self.asked, self._console, self._before = False, console, {}

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._console.print("stopping after this update", style="dim")


def _follow(run, stop: _Stop, bar: Progress) -> None:
    """Let it train, and show how."""
    import mlx.core as mx

    from ..train.trainer import Report

    task = bar.add_task("", total=run.trainer.settings.steps, completed=run.trainer.step)
    told = time.monotonic()
    for event in run.train(stop):
        now = time.monotonic()
        if isinstance(event, Report):
            speed = event.losses.tokens / max(now - told, 1e-9)
            peak = mx.get_peak_memory() / 1e9
            text = f"loss {event.losses.loss:.3f}, {speed:,.0f} tokens/s, {peak:.2f} GB"
            bar.update(task, completed=event.step, description=text)
        else:
            bar.console.print(_held_out_line(run.trainer.step, event), highlight=False)
        told = now


def _held_out_line(step: int, losses) -> str:
    codebooks = " ".join(f"{loss:.3f}" for loss in losses.codebooks)
    each = f", codebooks {codebooks}" if codebooks else ""
    return f"update {step}: held out {losses.loss:.4f}, words {losses.said:.4f}{each}"


def _summary(run) -> list[str]:
    from ..train.plots import NO_MATPLOTLIB, PLOT_NAME, can_plot

    lines = [f"last adapter: --adapter-path {run.folder / 'last'}"]
    if run.best:
        loss, step = run.best
        best = f"best adapter (update {step}, held out {loss:.4f}): "
        lines.insert(0, f"{best}--adapter-path {run.folder / 'best'}")
    else:
        lines.append("no held-out talks (--held-out): there is no best adapter, only the last")
    plots = f"curves: {run.folder / PLOT_NAME}" if can_plot() else NO_MATPLOTLIB
    return [*lines, plots]


def _say_what_it_takes(learner, settings, console: Console) -> None:
    from ..train.estimate import GIB, estimate, of_model

    size = sum(estimate(*of_model(learner.lm, learner.adapter.config, settings)).values()) / GIB
    learning = learner.adapter.num_parameters() / 1e6
    console.print(
        f"memory of {learning:.2f} M parameters; training takes about {size:.2f} GiB (computed)",
        highlight=False,
    )


def _print_estimate(args: argparse.Namespace, settings) -> None:
    from ..train.estimate import GIB, estimate

    name, config, bits = _estimated_model(args)
    memory = _memory_config(args, config)
    parts = estimate(config, memory, settings, bits)
    weights = f"{bits} bits" if bits else "bfloat16"
    title = f"{name}, {weights}: computed from shapes, nothing was measured"
    table = Table("", "GiB", title=title)
    for part, size in parts.items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_row("all", f"{sum(parts.values()) / GIB:.2f}", style="bold")
    Console(soft_wrap=True).print(table)


def _estimated_model(args: argparse.Namespace):
    """Name, config and bits of the model to compute for; no weights are read."""
    from ..config import lm_config, read_config
    from ..hub import open_source

    path = Path(args.lm_config) if args.lm_config else None
    if path is None and args.hf_repo:
        path = open_source(args.hf_repo).find("config.json")
    if path is None:
        bits = args.quantized if args.hf_repo else args.quantized or 4
        return args.hf_repo or "Moshi 7B", lm_config(None, name="Moshi 7B"), bits
    name = str(args.hf_repo or path)
    return name, lm_config(read_config(path), name=name), args.quantized
