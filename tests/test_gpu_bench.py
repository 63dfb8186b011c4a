"""The CUDA script without a GPU: its dry run, and whether a compiler takes the translated kernels."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_on_host
import mlx.core as mx
import pytest

from moshi_ttt_mlx import ttt_kernels

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import gpu_bench

# What the translated text takes from CUDA, for a host compiler: types and names, nothing that runs.
_HOST = """
#include <cmath>
#define __global__
#define __device__
#define __shared__ static
struct uint3 { unsigned x, y, z; };
inline uint3 threadIdx, blockIdx, blockDim;
inline void __syncthreads() {}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) { return value; }
struct __nv_bfloat16 { unsigned short bits; operator float() const; };
"""
KERNELS = list(ttt_kernels._KERNELS)


def test_the_dry_run_has_every_row(capsys):
    assert gpu_bench.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "failed" not in printed and "no figure means anything" in printed
    for what in ("| parity | tiny", "| step | tiny, ops", "| frame | float32, moshi_mlx"):
        assert what in printed
    assert "4 bits, ours, memory on" in printed and "float32, ours, memory off" in printed


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(gpu_bench, "has_cuda", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_bench.main([])
    assert "MLX finds no NVIDIA GPU here" in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel\nat line 3")

    monkeypatch.setattr(gpu_bench, "step_speed", broken)
    rows = gpu_bench.memory_rows("cpu")
    assert rows[0][2].startswith("MLP step off by 0.0e+00")
    assert rows[1] == ("step", "tiny, ops", "failed: no such kernel")


def test_bytes_are_those_of_the_page():
    """docs/kernels.md: 25.2 + 5.2 + 0.9 MB at C = 16, 25.2 + 21.0 + 1.0 MB at 64."""
    assert gpu_bench.step_bytes((32, 128, 512)) / 1e6 == pytest.approx(31.3, abs=0.1)
    assert gpu_bench.step_bytes((32, 128, 512), c=64) / 1e6 == pytest.approx(47.2, abs=0.1)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_of_metal_is_left(name):
    code = re.sub(r"//.*", "", gpu_bench.written_out(name))
    assert (
        re.findall(r"threadgroup|simdgroup|mem_flags|\bdevice\b|\bthread\b|\bconstant\b", code)
        == []
    )


def host_compiles(text, folder):
    """What a host compiler says of a kernel; nothing if it takes it."""
    (folder / "cuda_bf16.h").write_text(_HOST)
    (folder / "kernel.cpp").write_text(text)
    command = [shutil.which("clang++") or shutil.which("g++"), "-std=c++17", "-fsyntax-only"]
    made = subprocess.run([*command, f"-I{folder}", folder / "kernel.cpp"], capture_output=True)
    return made.stderr.decode() if made.returncode else ""


@pytest.mark.skipif(not (shutil.which("clang++") or shutil.which("g++")), reason="no C++ compiler")
@pytest.mark.parametrize("name", KERNELS)
def test_a_host_compiler_takes_it(name, tmp_path):
    text = gpu_bench.written_out(name)
    assert host_compiles(text, tmp_path) == ""
    assert "error" in host_compiles(text.replace("__syncthreads()", "barrier(0)"), tmp_path) or (
        "__syncthreads()" not in text
    )


def off_by(monkeypatch):
    """How far translated kernels are from ops, run by threads of the CPU."""
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_on_host.cuda_kernel, raising=False)
    gpu_bench.cuda_kernel.cache_clear()
    with gpu_bench.kernels_of("cuda") as (step, fold):
        said = gpu_bench.parity(step, fold, (1, 32, 64))
    gpu_bench.cuda_kernel.cache_clear()
    return [float(number) for number in re.findall(r"\d\.\de[+-]\d+|nan", said)]


@pytest.mark.skipif(cuda_on_host.UNAVAILABLE is not None, reason=str(cuda_on_host.UNAVAILABLE))
def test_translated_kernels_compute_what_ops_do(monkeypatch):
    """2e-5 is what the emulator's tests ask of the Metal text; 7e-7 was seen."""
    off = off_by(monkeypatch)
    assert len(off) == 4 and max(off) < 2e-5


@pytest.mark.skipif(cuda_on_host.UNAVAILABLE is not None, reason=str(cuda_on_host.UNAVAILABLE))
def test_a_wrong_translation_is_noticed(monkeypatch):
    wrong = gpu_bench._ATTRIBUTES | {"simdgroup_index_in_threadgroup": "(threadIdx.x / 64)"}
    monkeypatch.setattr(gpu_bench, "_ATTRIBUTES", wrong)
    off = off_by(monkeypatch)
    assert all(not number < 2e-5 for number in off)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler")
@pytest.mark.parametrize("name", KERNELS)
def test_nvcc_takes_it(name, tmp_path):
    """Within the registers of 256 threads and 48 KiB of shared memory, nothing spilled."""
    (tmp_path / "kernel.cu").write_text(gpu_bench.written_out(name))
    command = ["nvcc", "-w", "-std=c++17", "-arch=sm_90", "-Xptxas", "-v", "-cubin"]
    made = subprocess.run(
        [*command, "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.cu"], capture_output=True
    )
    said = (made.stdout + made.stderr).decode()
    assert made.returncode == 0, said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= 128
    assert "0 bytes spill stores" in said
    assert int(re.search(r"(\d+) bytes smem", said)[1]) <= 48 * 1024
