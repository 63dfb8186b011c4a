"""Measuring the frame loop: frame times side by side, host reads, graph size, growth over a long run.

What lives here measures and returns numbers; it prints nothing (`cli/bench.py` does). A *loop* is a
function that takes the user's codes of one frame and returns what was read from the device.
"""

import copy
import gc
import io
import os
import time
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import islice
from pathlib import Path
from subprocess import check_output

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig, LmGen
from moshi_mlx.modules.transformer import Attention
from moshi_mlx.utils import Sampler

from .errors import UserError
from .generate import FrameGenerator

Read = tuple[np.ndarray, np.ndarray | None]
Loop = Callable[[np.ndarray], Read]
Progress = Callable[[str], None]

SEED = 299792458
# What moshi_mlx's local.py asks for; its LmGen raises at the end of it.
MOSHI_MLX_STEPS = 4005
# Frames that nobody times: compiled, and (at the tiny context of 250) with a full window.
WARM_UP = 260


def _silent(message: str) -> None:
    pass


# -- models ---------------------------------------------------------------------------------------


def tiny_lm(
    layers: int = 4,
    dim: int = 128,
    codebooks: int = 8,
    depformer_layers: int = 2,
    context: int = 250,
) -> Lm:
    """A seeded float32 model of Moshi's shape: `codebooks` streams of Moshi, as many of the user."""
    delays = [0, 0] + [1] * (codebooks - 1) + [0] + [1] * (codebooks - 1)
    config = {
        "dim": dim,
        "num_heads": 4,
        "num_layers": layers,
        "causal": True,
        "layer_scale": None,
        "context": context,
        "max_period": 10000,
        "positional_embedding": "rope",
        "depformer_dim": dim // 2,
        "depformer_num_heads": 4,
        "depformer_num_layers": depformer_layers,
        "depformer_dim_feedforward": 2 * dim,
        "depformer_pos_emb": "none",
        "dep_q": codebooks,
        "text_card": 512,
        "card": 256,
        "n_q": 2 * codebooks,
        "delays": delays,
    }
    mx.random.seed(0)
    lm = Lm(LmConfig.from_config_dict(config))
    mx.eval(lm.parameters())
    return lm


def twin(lm: Lm) -> Lm:
    """A second module tree on the same weight arrays, with stock attention and caches of its own.

    `FrameGenerator` replaces a model's attention with its own; moshi_mlx is to keep the stock one.
    """
    shared = {id(array): array for _, array in tree_flatten(lm.parameters())}
    stock = copy.deepcopy(lm, shared)
    for transformer in (stock.transformer, *(s.transformer for s in stock.depformer.slices)):
        for layer in transformer.layers:
            attention = Attention(layer.cfg)
            attention.update_modules(layer.self_attn.children())
            layer.self_attn = attention
    return stock


# -- loops ----------------------------------------------------------------------------------------


def our_generator(lm: Lm) -> FrameGenerator:
    """This package's generator with moshi_mlx's default sampling, a memory left aside."""
    return FrameGenerator(lm, Sampler(), Sampler(), memory="off", seed=SEED)


def our_loop(generator: FrameGenerator) -> Loop:
    """One step, one read."""
    return lambda codes: generator.step(codes).read()


def moshi_mlx_generator(lm: Lm) -> LmGen:
    """`LmGen` with its defaults. Seeds MLX's global random state, from which it draws.

    Raises:
        UserError: a text-only model, which `LmGen` cannot run.
    """
    if not lm.cfg.audio_delays:
        raise UserError("bench needs a model with audio streams: moshi_mlx's LmGen has no other")
    mx.random.seed(SEED)
    return LmGen(lm, MOSHI_MLX_STEPS, Sampler(), Sampler())


def moshi_mlx_loop(generator: LmGen) -> Loop:
    """A frame as in moshi_mlx's own `local.py`."""

    def frame(codes: np.ndarray) -> Read:
        text = generator.step(mx.array(codes))[0].item()
        audio = generator.last_audio_tokens()
        # Models that only write have codes of no streams.
        return np.array([text]), np.array(audio) if audio is not None and audio.size else None

    return frame


def user_codes(lm: Lm) -> Iterator[np.ndarray]:
    """Random codes of a user who never stops talking, int32 `[1, K_user]` a frame."""
    rng = np.random.default_rng(SEED)
    shape, most = (1, lm.cfg.other_codebooks), lm.cfg.audio_vocab_size - 1
    while True:
        yield rng.integers(0, most, shape, np.int32)


# -- host reads -----------------------------------------------------------------------------------


class HostReads:
    """Counts how often Python waits for the device, while it is entered.

    with HostReads() as reads:
        generator.step(codes).read()
    assert reads.count == 1

    Counted: methods of `mx.array` that need its values, `mx.eval`, and NumPy's converters. Those go
    through the buffer protocol, where Python cannot look, so they are counted by their names in
    `numpy`: `memoryview(array)` and NumPy's arithmetic on an `mx.array` are not seen.
    """

    METHODS = (
        *("item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
        *("__array__", "__bytes__", "__dlpack__", "__getstate__"),
        *("__repr__", "__str__", "__format__"),
    )
    CONVERTERS = ("array", "asarray", "asanyarray", "ascontiguousarray", "copy", "stack")

    def __init__(self):
        self.count = 0
        self._counting = False
        self._replaced: list[tuple[object, str, Callable]] = []

    def __enter__(self) -> "HostReads":
        # No inherited ones: `object.__repr__` reads nothing, and mlx 0.26 has no `__index__`.
        for name in self.METHODS:
            if name in vars(mx.array):
                self._replace(mx.array, name, lambda args: 1)
        for name in self.CONVERTERS:
            self._replace(np, name, lambda args: _arrays_in(args[0]))
        self._replace(mx, "eval", lambda args: 1)
        return self

    def __exit__(self, *_) -> None:
        for owner, name, original in self._replaced:
            setattr(owner, name, original)
        self._replaced.clear()

    def _replace(self, owner, name: str, reads_of: Callable[[tuple], int]) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def counted(*args, **kwargs):
            # A read inside a read (NumPy asks each scalar of a list) is the same read.
            outermost, self._counting = not self._counting, True
            if outermost:
                self.count += reads_of(args)
            try:
                return original(*args, **kwargs)
            finally:
                self._counting = not outermost

        self._replaced.append((owner, name, original))
        setattr(owner, name, counted)


def _arrays_in(value) -> int:
    if isinstance(value, list | tuple):
        return sum(_arrays_in(item) for item in value)
    return int(isinstance(value, mx.array))


def host_reads(loop: Loop, codes: Iterator[np.ndarray], frames: int = 5) -> float:
    """Host reads per frame, the mean of a few frames."""
    with HostReads() as reads:
        for frame in islice(codes, frames):
            loop(frame)
    return reads.count / frames


# -- graph ----------------------------------------------------------------------------------------


def graph_nodes(*outputs: mx.array) -> int:
    """Operations between evaluated arrays and these outputs; a fused (compiled) one counts once."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    return dot.getvalue().count("shape=rectangle")


def our_graph_nodes(generator: FrameGenerator, codes: np.ndarray) -> int:
    """Operations of one frame."""
    mx.eval(generator.state()[0])
    frame = generator.step(codes)
    return graph_nodes(frame.tokens, *generator.state()[0].values())


def moshi_mlx_graph_nodes(generator: LmGen, codes: np.ndarray) -> int:
    """Operations of one frame, without those of the checks that it evaluates on the way."""

    def state() -> list[mx.array]:
        caches = generator.model.transformer_cache
        return [generator.gen_sequence, *(array for c in caches for array in c.self_attn.state)]

    mx.eval(state())
    text, _ = generator.step(mx.array(codes))
    return graph_nodes(text, *state())


# -- times ----------------------------------------------------------------------------------------


def interleave(
    loops: dict[str, Loop],
    codes: Iterator[np.ndarray],
    seconds: float,
    *,
    most: int,
    block: int = 10,
) -> dict[str, np.ndarray]:
    """Time loops in alternating blocks, so that a busy machine slows all of them alike.

    Args:
        seconds: stop after the round that ends past it; one round is always run.
        most: frames of each at most.
        block: frames of one loop before the next one's turn.

    Returns:
        By loop, the seconds of each frame.
    """
    times: dict[str, list[float]] = {name: [] for name in loops}
    deadline = time.perf_counter() + seconds
    for _ in range(max(1, most // block)):
        for name, loop in loops.items():
            for frame in islice(codes, block):
                begin = time.perf_counter()
                loop(frame)
                times[name].append(time.perf_counter() - begin)
        if time.perf_counter() > deadline:
            break
    return {name: np.array(seconds) for name, seconds in times.items()}


def milliseconds(seconds: np.ndarray, percent: float) -> float:
    """A percentile of frame times."""
    return 1e3 * float(np.percentile(seconds, percent))


def compare_with_moshi_mlx(lm: Lm, seconds: float = 6.0, warm_up: int = WARM_UP) -> dict:
    """Our frame against `LmGen`'s on the same weights, interleaved.

    Args:
        lm: left with this package's attention in it.
        seconds: for timing, after the warm-up.
        warm_up: frames of each before. Their tokens are compared: `same_tokens_frames` is at most the
            context, where moshi_mlx's window begins to hold one key more, and may be less where
            rounding swaps two candidates of top-p that are equally probable.

    Returns:
        The JSON keys of this section.
    """
    stock = twin(lm)
    ours = our_generator(lm)
    # It seeds MLX's global state, so it comes after whatever else may draw from that.
    theirs = moshi_mlx_generator(stock)
    loops = {"ours": our_loop(ours), "moshi_mlx": moshi_mlx_loop(theirs)}
    codes = user_codes(lm)
    same = _same_frames(loops, codes, warm_up)
    reads = {name: host_reads(loop, codes) for name, loop in loops.items()}
    times = interleave(loops, codes, seconds, most=MOSHI_MLX_STEPS - warm_up - 10)
    result = {
        "ratio": milliseconds(times["ours"], 50) / milliseconds(times["moshi_mlx"], 50),
        "host_reads_per_frame": reads["ours"],
        "moshi_mlx_host_reads_per_frame": reads["moshi_mlx"],
        "graph_nodes_per_frame": our_graph_nodes(ours, next(codes)),
        "moshi_mlx_graph_nodes_per_frame": moshi_mlx_graph_nodes(theirs, next(codes)),
        "same_tokens_frames": same,
        "frames_timed": len(times["ours"]),
    }
    for prefix, name in (("", "ours"), ("moshi_mlx_", "moshi_mlx")):
        for percent in (50, 95):
            result[f"{prefix}frame_ms_p{percent}"] = milliseconds(times[name], percent)
    return result


def _same_frames(loops: dict[str, Loop], codes: Iterator[np.ndarray], frames: int) -> int:
    """Run all loops in lockstep; how many first frames brought the same tokens from all."""
    same = 0
    for i, frame in enumerate(islice(codes, frames)):
        (text, audio), (their_text, their_audio) = (loop(frame) for loop in loops.values())
        if same == i and np.array_equal(text, their_text) and np.array_equal(audio, their_audio):
            same += 1
    return same


# -- a long run -----------------------------------------------------------------------------------


def process_bytes() -> int:
    """Resident memory of this process."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 1024 * int(check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))


def endure(
    lm: Lm, early: int = 1_000, late: int = 10_000, timed: int = 1_000, progress: Progress = _silent
) -> dict:
    """Frame time and memory of one talk at frame `early` and at frame `late`.

    Minutes lie between the two, and a busy machine is not equally busy in both. So the talk is kept
    as it was at `early`, and at the end its frames are timed again in turns with those of `late`:
    `flat_ratio` compares these two; `early_frame_ms_p50_on_the_way` was measured when it was there.

    Args:
        timed: frames timed at each mark.
        progress: called with one line now and then.

    Returns:
        The JSON keys of this section.
    """
    generator = our_generator(lm)
    loop, codes = our_loop(generator), user_codes(lm)
    _run(loop, codes, early)
    arrays, counters = generator.state()
    on_the_way = interleave({"early": loop}, codes, np.inf, most=timed)["early"]
    gc.collect()
    process, device = process_bytes(), mx.get_active_memory()
    while (left := late - generator.frame) > 0:
        progress(f"frame {generator.frame:,} of {late:,}")
        _run(loop, codes, min(left, 500))
    gc.collect()
    grown = {
        "growth_bytes": process_bytes() - process,
        "mlx_growth_bytes": mx.get_active_memory() - device,
    }
    past = our_generator(lm)
    past.load_state(arrays, counters)
    loops = {"early": our_loop(past), "late": loop}
    interleave(loops, codes, np.inf, most=20)
    times = interleave(loops, codes, np.inf, most=timed)
    p50, p95 = ({n: milliseconds(t, percent) for n, t in times.items()} for percent in (50, 95))
    return {
        "flat_ratio": p50["late"] / p50["early"],
        "flat_ratio_p95": p95["late"] / p95["early"],
        **grown,
        "early_frame": early,
        "late_frame": late,
        "early_frame_ms_p50": p50["early"],
        "late_frame_ms_p50": p50["late"],
        "early_frame_ms_p50_on_the_way": milliseconds(on_the_way, 50),
    }


def _run(loop: Loop, codes: Iterator[np.ndarray], frames: int) -> None:
    for frame in islice(codes, frames):
        loop(frame)
