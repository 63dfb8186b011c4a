"""The emulator on kernels of a few lines: right numbers, and a message for each kind of fault."""

import re

import mlx.core as mx
import numpy as np
import opencl_check
import pytest

HEADER = """
template <int N>
inline float dot(const threadgroup float* a, const device float* b) {
  float s = 0.0f;
  for (int i = 0; i < N; ++i) s += a[i] * b[i];
  return s;
}
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
BEGIN = """
    uint i = thread_position_in_grid.x;
    uint l = thread_index_in_threadgroup;
    threadgroup float shared[64];
"""


def run(emulator, source, *, dtype=mx.float32, size=128, header="", inputs=None, **options):
    """A kernel `x [size], n -> y [size]` in threadgroups of 64."""
    kernel = emulator.metal_kernel("small", ["x", "n"], ["y"], source, header)
    return kernel(
        inputs=inputs or [mx.arange(size).astype(dtype), 3],
        template=[("T", dtype)],
        output_shapes=[(size,)],
        output_dtypes=[dtype],
        grid=(size, 1, 1),
        threadgroup=(64, 1, 1),
        **options,
    )[0]


# -- right numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_sixteen_bit_floats_round_as_mlx_rounds(emulator, dtype):
    source = "uint i = thread_position_in_grid.x; y[i] = x[i] * x[i] / T(7) + T(n);"
    x = mx.arange(128).astype(dtype)
    assert mx.array_equal(run(emulator, source, dtype=dtype), x * x / 7 + 3)


def test_threads_meet_at_a_barrier(emulator):
    source = BEGIN + f"shared[l] = x[i]; {BARRIER} y[i] = shared[63 - l];"
    want = np.arange(128).reshape(2, 64)[:, ::-1].ravel()
    assert np.array_equal(np.array(run(emulator, source)), want)


def test_a_simdgroup_is_32_lanes(emulator):
    source = (
        "uint i = thread_position_in_grid.x; y[i] = simd_sum(x[i]) + simd_shuffle_xor(x[i], 1);"
    )
    x = np.arange(128)
    want = np.repeat(x.reshape(4, 32).sum(1), 32) + (x ^ 1)
    assert np.array_equal(np.array(run(emulator, source)), want)


def test_a_helper_takes_pointers_of_both_spaces(emulator):
    source = BEGIN + f"shared[l] = x[i]; {BARRIER} y[i] = dot<64>(shared, x);"
    x = np.arange(128.0)
    want = np.repeat(x.reshape(2, 64) @ x[:64], 64)
    assert np.array_equal(np.array(run(emulator, source, header=HEADER)), want)


def test_a_grid_that_ends_inside_a_threadgroup(emulator):
    source = "uint i = thread_position_in_grid.x; y[i] = T(threads_per_threadgroup.x);"
    assert run(emulator, source, size=100).tolist() == [64] * 64 + [36] * 36


def test_shapes_are_passed_where_the_source_asks(emulator):
    source = "uint i = thread_position_in_grid.x; y[i] = x[i] + T(x_shape[0]) + T(x_strides[0]);"
    assert mx.array_equal(run(emulator, source), mx.arange(128) + 129)


def test_init_value_counts_as_written(emulator):
    source = "uint i = thread_position_in_grid.x; if (i == 5) y[i] += x[i];"
    out = run(emulator, source, init_value=2.0)
    assert out.tolist() == [2.0] * 5 + [7.0] + [2.0] * 122


def test_every_order_of_threads_gives_the_same(emulator, monkeypatch):
    source = BEGIN + f"shared[l] = x[i]; {BARRIER} y[i] = simd_sum(shared[63 - l]);"
    want = run(emulator, source)
    for seed in "123":
        monkeypatch.setenv("METAL_EMULATOR_SEED", seed)
        assert mx.array_equal(run(emulator, source), want)


# -- faults ---------------------------------------------------------------------------------------

FAULTS = {
    "threadgroup race": (BEGIN + "shared[l] = x[i]; y[i] = shared[63 - l];", "race|nobody has"),
    "a barrier that orders nothing": (
        BEGIN
        + "shared[l] = x[i]; threadgroup_barrier(mem_flags::mem_none); y[i] = shared[63 - l];",
        "race on threadgroup memory",
    ),
    "a barrier of one simdgroup for two": (
        BEGIN
        + "shared[l] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = shared[63 - l];",
        "race|nobody has",
    ),
    "race between threadgroups": ("y[thread_index_in_threadgroup] = x[0];", "race on an output"),
    "output read from another thread": (
        BEGIN + f"y[i] = x[i]; {BARRIER} if (l == 0) y[i] = y[i + 1];",
        "race on an output",
    ),
    "input past its end": (BEGIN + "y[i] = x[i + 1];", r"index 128 outside \[0, 128\)"),
    "input before its start": (BEGIN + "y[i] = x[int(i) - 1];", "index -1 outside"),
    "output past its end": (BEGIN + "y[i + 1] = x[i];", "index 128 outside"),
    "threadgroup array past its end": (BEGIN + "shared[l + 1] = 0; y[i] = x[i];", "index 64"),
    "an output not written": (BEGIN + "if (i != 77) y[i] = x[i];", "element 77 of 128 is never"),
    "threadgroup memory not written": (BEGIN + "y[i] = shared[l];", "nobody has written"),
    "more than 32 KiB": (
        BEGIN + "threadgroup float more[8192]; more[l] = 0; shared[l] = 0; y[i] = 0;",
        "more than 32 KiB",
    ),
    "barrier in a branch": (BEGIN + f"if (l < 32) {{ {BARRIER} }} y[i] = x[i];", "not all threads"),
    "return before a barrier": (
        BEGIN + f"y[i] = x[i]; if (l == 3) return; {BARRIER}",
        "not all threads",
    ),
    "simd operation in a branch, another in the other": (
        BEGIN + "if (l % 2) { y[i] = simd_sum(x[i]); }\n else { y[i] = simd_max(x[i]); }",
        "divergent",
    ),
    "constant given to a device helper": (BEGIN + "y[i] = dot<3>(shared, n_few);", "not compile"),
    "pointer without an address space": (BEGIN + "const float* p = x; y[i] = p[i];", "not compile"),
    "threadgroup pointer as device": (
        BEGIN + "const device float* p = shared; y[i] = p[0];",
        "not compile",
    ),
    "write to an input": (BEGIN + "x[i] = 0; y[i] = 0;", "not compile"),
    "float put into 16 bits without a cast": (BEGIN + "y[i] = 0.5f * float(x[i]);", "not compile"),
    "double": (BEGIN + "double d = x[i]; y[i] = T(d);", "not compile"),
    "a variable without a value": (BEGIN + "float s; s += x[i]; y[i] = T(s);", "not compile"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(emulator, name):
    source, message = FAULTS[name]
    dtype = mx.bfloat16 if "16 bits" in name else mx.float32
    # Inputs of fewer than 8 elements live in constant memory.
    source = source.replace("n_few", "x")
    size = 4 if "constant" in name else 128
    with pytest.raises(emulator.MetalError) as caught:
        run(emulator, source, dtype=dtype, header=HEADER, size=size)
    assert re.search(message, str(caught.value)), caught.value


def test_the_message_quotes_the_line(emulator):
    with pytest.raises(emulator.MetalError, match=r"y\[i\] = x\[i \+ 1\];"):
        run(emulator, BEGIN + "\n    y[i] = x[i + 1];\n")


# -- clang ----------------------------------------------------------------------------------------

needs_clang = pytest.mark.skipif(not opencl_check.CLANG, reason="clang is not installed")

FORBIDDEN = {
    "std": "y[i] = std::fma(x[i], 1.0f, 0.0f);",
    "new": "float* p = new float[4]; y[i] = x[i];",
    "threadgroup with a value": "threadgroup float z[4] = {0}; y[i] = x[i];",
    "constant space as device": "y[i] = dot<3>(shared, few);",
    "double": "double d = x[i]; y[i] = d;",
}


def text(emulator, source, header=HEADER):
    kernel = emulator._MLX_KERNEL("small", ["x", "few"], ["y"], source, header)
    shape = {"output_shapes": [(128,)], "output_dtypes": [mx.float32]}
    grid = {"grid": (128, 1, 1), "threadgroup": (64, 1, 1)}
    return emulator.metal_source(
        lambda *a: kernel(inputs=list(a), **shape, **grid, template=[("K", 3)], verbose=True),
        mx.zeros((128,)),
        mx.zeros((3,)),
    )


@needs_clang
def test_clang_has_nothing_against_a_right_kernel(emulator):
    source = BEGIN + f"shared[l] = x[i] + few[K - 1]; {BARRIER} y[i] = dot<64>(shared, x);"
    assert opencl_check.complaints(text(emulator, source)) == []


@needs_clang
@pytest.mark.parametrize("name", FORBIDDEN)
def test_clang_refuses(emulator, name):
    assert opencl_check.complaints(text(emulator, BEGIN + FORBIDDEN[name]))
