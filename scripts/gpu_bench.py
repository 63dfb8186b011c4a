"""The memory's kernels and the whole frame loop on an NVIDIA GPU, beside moshi_mlx, in one table.

    python scripts/gpu_bench.py              # needs MLX's CUDA build (pip install "mlx[cuda]")
    python scripts/gpu_bench.py --dry-run    # anywhere: tiny sizes on the CPU, ops for kernels
    python scripts/gpu_bench.py --cuda FOLDER    # write the kernels as .cu files and stop

MLX has no CUDA form of a Metal kernel, so the Metal text of `ttt_kernels.py` is translated: the same
body under CUDA's names, by `mx.fast.cuda_kernel`. Three questions, a section each: does the
translation compute what ops compute; how many bytes a second does a step move, of those counted in
docs/kernels.md; how long is a frame of Moshi 7B's shape (random weights, bfloat16 and 4 bits) with a
memory in half of its layers, without, and by moshi_mlx. What fails becomes its row's text.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from moshi_mlx.models import Lm, LmConfig, config_v0_1
from moshi_mlx.utils import Sampler

from moshi_ttt_mlx import bench, bench_memory, ttt, ttt_kernels
from moshi_ttt_mlx.generate import FrameGenerator
from moshi_ttt_mlx.ttt import Rules

Row = tuple[str, str, str]
# heads, head width, hidden width: one layer of Moshi's, and a memory's default.
SHAPES = {"7B": (32, 128, 512), "default": (4, 32, 64)}
DRY_SHAPES = {"tiny": (2, 32, 64)}
# 4 bits need widths that are multiples of 32 throughout.
_DRY_MODEL = {"layers": 2, "codebooks": 2, "depformer_layers": 1, "context": 20}

# -- the translation ------------------------------------------------------------------------------

_HEADER = """
typedef unsigned int uint;
template <class T> __device__ T simd_sum(T v) {
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}
namespace metal {
template <class T> __device__ T max(T a, T b) { return a > b ? a : b; }
namespace precise {
__device__ inline float tanh(float x) { return ::tanhf(x); }
__device__ inline float sqrt(float x) { return ::sqrtf(x); }
}
}
"""
_LINEAR_ID = "((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x)"
_ATTRIBUTES = {
    "threadgroup_position_in_grid": "blockIdx",
    "thread_index_in_threadgroup": _LINEAR_ID,
    "thread_index_in_simdgroup": f"({_LINEAR_ID} % 32)",
    "simdgroup_index_in_threadgroup": f"({_LINEAR_ID} / 32)",
    "threadgroup_barrier(mem_flags::mem_threadgroup)": "__syncthreads()",
}


def to_cuda(text: str) -> str:
    """A kernel's body in CUDA: arrays of a threadgroup are shared, other address spaces go."""
    text = re.sub(r"^(\s*)threadgroup (\w+ \w+\[)", r"\1__shared__ \2", text, flags=re.MULTILINE)
    text = re.sub(r"\b(threadgroup|thread|device) (?=\w+\s*\*)", "", text)
    for metal, cuda in _ATTRIBUTES.items():
        text = text.replace(metal, cuda)
    return text


def header_to_cuda(text: str) -> str:
    """The kernels' own functions, for the device."""
    text = to_cuda(text.replace("constant constexpr", "constexpr"))
    return _HEADER + re.sub(r"^inline", "__device__ inline", text, flags=re.MULTILINE)


@functools.cache
def cuda_kernel(name: str) -> Callable:
    """Stands in for `ttt_kernels._kernel`."""
    inputs, outputs, source = ttt_kernels._KERNELS[name]
    header = header_to_cuda(ttt_kernels._HEADER)
    return mx.fast.cuda_kernel(name, inputs.split(), outputs.split(), to_cuda(source), header)


def written_out(name: str) -> str:
    """A kernel as a file for nvcc, at Moshi's shape: what MLX does at run time."""
    inputs, outputs, source = ttt_kernels._KERNELS[name]
    sizes = {"D": 128, "S": 8, "R": 64, "C": 16, "H": 32, "I": 128, "J": 512, "TI": 64}
    constants = "".join(f"constexpr int {n} = {size};\n" for n, size in sizes.items())
    constants += "constexpr bool STANDARDIZED = true;\n"
    types = {"place": "int"} | dict.fromkeys(("q", "k", "v", "lr"), "__nv_bfloat16")
    taken = [f"const {types.get(n, 'float')}* {n}" for n in inputs.split()]
    taken += [f"float* {n}" for n in outputs.split()]
    # Names of sizes come after the header, where they are names of template parameters.
    return (
        f"#include <cuda_bf16.h>\n{header_to_cuda(ttt_kernels._HEADER)}\n{constants}"
        f"__global__ void {name}({', '.join(taken)}) {{\n{to_cuda(source)}}}\n"
    )


# -- the memory's step ----------------------------------------------------------------------------


@contextmanager
def kernels_of(device: str) -> Iterator[tuple[Callable, Callable]]:
    """A step and a fold: by kernel on `cuda`, by ops elsewhere."""
    if device != "cuda":
        yield ttt._piece, ttt._fold
        return
    own, ttt_kernels._kernel = ttt_kernels._kernel, cuda_kernel
    try:
        yield ttt_kernels.metal_step, ttt_kernels.metal_fold
    finally:
        ttt_kernels._kernel = own


def widest(found: tuple, wanted: tuple) -> float:
    """The largest difference of two results, relative to the entry or to 1."""
    pairs = zip(ttt_kernels._flat(found), ttt_kernels._flat(wanted), strict=True)
    return max(mx.max(mx.abs(a - b) / (1 + mx.abs(b))).item() for a, b in pairs)


def parity(step: Callable, fold: Callable, shape: tuple[int, int, int]) -> str:
    """Step and fold against ops, on random numbers; 2e-5 is what the emulator's tests ask for."""
    heads, width, hidden = shape
    rules, off = Rules(target="standardized"), []
    for widths in ((hidden, width), (width,)):
        args = ttt_kernels._sample(rules, heads, widths)
        off.append(widest(step(rules, *args), ttt._piece(rules, *args)))
        off.append(widest(fold(rules, *args[:3]), ttt._fold(rules, *args[:3])))
    return "MLP step off by {:.1e}, fold by {:.1e}; linear by {:.1e}, {:.1e}".format(*off)


def step_bytes(shape: tuple[int, int, int], c: int = 16) -> int:
    """Bytes of a step as docs/kernels.md counts them: weights, rows, what passes between kernels."""
    heads, f, hidden = shape
    slices = hidden // 64
    weights = f * hidden + 2 * hidden * f
    rows = 2 * c * (2 * f + 2 * hidden + 1)
    between = 2 * (2 * hidden + 2 * slices * f + slices * c + c + f)
    return 4 * heads * (weights + rows + between)


def step_speed(step: Callable, shape: tuple[int, int, int], steps: int) -> str:
    """The best of five runs of steps that wait for each other, as layers and frames do."""
    heads, width, hidden = shape
    rules = Rules(target="standardized")
    params, weights, rows, tokens, place = ttt_kernels._sample(rules, heads, (hidden, width))
    step = mx.compile(functools.partial(step, rules))
    best = np.inf
    for _ in range(5):
        begin, kept = time.perf_counter(), rows
        for _ in range(steps):
            out, kept = step(params, weights, kept, tokens, place)
        mx.eval(out, kept)
        best = min(best, (time.perf_counter() - begin) / steps)
    return f"{1e6 * best:,.0f} us, {step_bytes(shape) / best / 1e9:,.1f} GB/s"


# -- the frame ------------------------------------------------------------------------------------


def random_lm(config: LmConfig, dtype: mx.Dtype, bits: int | None) -> Lm:
    """A model of random weights, quantized as moshi_mlx quantizes its own."""
    mx.random.seed(0)
    lm = Lm(config)
    lm.set_dtype(dtype)
    if bits:
        nn.quantize(lm, bits=bits, group_size=32)
    mx.eval(lm.parameters())
    return lm


def frame_rows(name: str, lm: Lm, seconds: float, warm_up: int) -> list[Row]:
    """A frame of `LmGen`, of ours without and with a memory, in turns."""
    stock = bench.twin(lm)
    bench_memory.add_open_memory(lm)
    loops = {
        f"ours, memory {mode}": bench.our_loop(
            FrameGenerator(lm, Sampler(), Sampler(), memory=mode, seed=bench.SEED)
        )
        for mode in ("off", "on")
    }
    loops["moshi_mlx"] = bench.moshi_mlx_loop(bench.moshi_mlx_generator(stock))
    codes = bench.user_codes(lm)
    for loop in loops.values():
        for frame in islice(codes, warm_up):
            loop(frame)
    times = bench.interleave(loops, codes, seconds, most=bench.MOSHI_MLX_STEPS - warm_up - 10)
    theirs = bench.milliseconds(times["moshi_mlx"], 50)
    return [
        (
            "frame",
            f"{name}, {loop}",
            f"{bench.milliseconds(t, 50):.2f} ms p50, {bench.milliseconds(t, 95):.2f} ms p95, "
            f"{bench.milliseconds(t, 50) / theirs:.2f} of moshi_mlx",
        )
        for loop, t in times.items()
    ]


# -- all of it ------------------------------------------------------------------------------------


def attempt(section: str, name: str, what: Callable[[], str]) -> Row:
    """A row, or the reason why there is none: the other rows are wanted all the same."""
    try:
        return section, name, what()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return section, name, f"failed: {str(error).strip().splitlines()[0]}"


def memory_rows(device: str) -> list[Row]:
    """Parity and speed of the step, by kernel (on a CPU: by ops) and, beside it, by ops."""
    rows, shapes, steps = [], *((DRY_SHAPES, 3) if device == "cpu" else (SHAPES, 200))
    with kernels_of(device) as (step, fold):
        for name, shape in shapes.items():
            rows.append(attempt("parity", name, lambda s=shape: parity(step, fold, s)))
            timed = {"kernels": step, "ops": ttt._piece}
            rows += [
                attempt("step", f"{name}, {how}", lambda w=way, s=shape: step_speed(w, s, steps))
                for how, way in timed.items()
                if device == "cuda" or how == "ops"
            ]
    return rows


def model_rows(device: str) -> list[Row]:
    """The frame in both weight formats."""
    rows = []
    for name, bits in (("bfloat16", None), ("4 bits", 4)):
        if device == "cpu":
            small = bench.tiny_lm(dim=256, **_DRY_MODEL).cfg
            config, dtype, seconds, warm_up = small, mx.float32, 0.0, 3
        else:
            config, dtype, seconds, warm_up = config_v0_1(), mx.bfloat16, 20.0, 30
        try:
            lm = random_lm(config, dtype, bits)
            rows += frame_rows(
                name if dtype == mx.bfloat16 or bits else "float32", lm, seconds, warm_up
            )
        except (RuntimeError, ValueError) as error:
            rows.append(("frame", name, f"failed: {str(error).strip().splitlines()[0]}"))
    return rows


def table(rows: list[Row], title: str) -> str:
    """Markdown, to be pasted into a report."""
    lines = [title, "", "| section | what | found |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def has_cuda() -> bool:
    """Whether MLX can run on an NVIDIA GPU here; builds before 0.29 do not know the word."""
    return hasattr(mx, "cuda") and mx.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no kernels")
    parser.add_argument("--cuda", type=Path, metavar="FOLDER", help="write the kernels and stop")
    args = parser.parse_args(argv)
    if args.cuda:
        for name in ttt_kernels._KERNELS:
            (args.cuda / f"{name}.cu").write_text(written_out(name))
        return 0
    if not args.dry_run and not has_cuda():
        parser.error("MLX finds no NVIDIA GPU here; --dry-run runs on the CPU")
    device = "cpu" if args.dry_run else "cuda"
    mx.set_default_device(mx.cpu if args.dry_run else mx.gpu)
    title = (
        "Dry run on the CPU: no figure means anything."
        if args.dry_run
        else str(mx.device_info() if hasattr(mx, "device_info") else "CUDA")
    )
    print(table(memory_rows(device) + model_rows(device), title))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
