"""CUDA kernels on the CPU: a thread of the system for each CUDA thread, one block after another.

Stands in for `mx.fast.cuda_kernel` where no GPU is. It knows what the memory's kernels use: shared
arrays, `__syncthreads`, `__shfl_xor_sync` of floats within a warp, one-dimensional blocks. Outputs
begin as NaN. It does not look for races: the Metal text they come from is checked for those by
`tests/metal`.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

_HOST = """
#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
struct uint3 { unsigned x, y, z; };
static thread_local uint3 threadIdx, blockIdx;
static uint3 blockDim;
static std::unique_ptr<std::barrier<>> block, warps[8];
static float shown[8][32];

static void __syncthreads() { block->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float value, int mask) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  shown[warp][lane] = value;
  warps[warp]->arrive_and_wait();
  float other = shown[warp][lane ^ mask];
  warps[warp]->arrive_and_wait();
  return other;
}

template <class Kernel> void run_block(uint3 at, int threads, Kernel kernel) {
  blockDim = {unsigned(threads), 1, 1};
  block = std::make_unique<std::barrier<>>(threads);
  for (int w = 0; w < threads / 32; ++w) warps[w] = std::make_unique<std::barrier<>>(32);
  std::vector<std::thread> running;
  for (unsigned t = 0; t < unsigned(threads); ++t) {
    running.emplace_back([=] { threadIdx = {t, 0, 0}; blockIdx = at; kernel(); });
  }
  for (auto& thread : running) thread.join();
}
"""
_RUN = """
extern "C" void run(void** arrays, const unsigned* blocks, int threads) {
  for (unsigned z = 0; z < blocks[2]; ++z)
    for (unsigned y = 0; y < blocks[1]; ++y)
      for (unsigned x = 0; x < blocks[0]; ++x)
        run_block({x, y, z}, threads, [=] { kernel(%s); });
}
"""
_TYPES = {np.dtype(np.int32): "int", np.dtype(np.float32): "float"}

# Why it cannot work here, for tests to skip with; None where it can.
UNAVAILABLE = None if shutil.which("g++") else "CUDA on the host needs g++"


@functools.cache
def _build(header: str, source: str, taken: tuple[str, ...], sizes: tuple) -> Callable:
    constants = "".join(f"constexpr int {name} = {size};\n" for name, size in sizes)
    arguments = ", ".join(
        f"({argument.rpartition(' ')[0]}) arrays[{i}]" for i, argument in enumerate(taken)
    )
    kernel = f"void kernel({', '.join(taken)}) {{\n{source}}}\n"
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_host_"))
    (folder / "kernel.cpp").write_text(_HOST + header + constants + kernel + _RUN % arguments)
    options = ["-std=c++20", "-O1", "-pthread", "-shared", "-fPIC"]
    made = folder / "kernel.so"
    subprocess.run(["g++", *options, "-o", made, folder / "kernel.cpp"], check=True)
    run = ctypes.CDLL(str(made)).run
    shutil.rmtree(folder)  # it is loaded
    return run


def cuda_kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
) -> Callable:
    """As `mx.fast.cuda_kernel`; float32 and int32 inputs, float32 outputs."""

    def call(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        arrays = [np.ascontiguousarray(np.array(a)) for a in inputs]
        types = [_TYPES[a.dtype] for a in arrays]
        taken = [f"const {t}* {n}" for t, n in zip(types, input_names, strict=True)]
        taken += [f"float* {n}" for n in output_names]
        arrays += [np.full(shape, np.nan, np.float32) for shape in output_shapes]
        sizes = tuple((n, int(v)) for n, v in template if isinstance(v, int))
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        blocks = (ctypes.c_uint * 3)(grid[0] // threadgroup[0], *grid[1:])
        _build(header, source, tuple(taken), sizes)(pointers, blocks, threadgroup[0])
        return [mx.array(a) for a in arrays[len(inputs) :]]

    return call
