"""Plant one bug at a time in the memory's kernels: the emulator or the twin must notice.

What they cannot notice is listed with its reason.
"""

import mlx.core as mx
import pytest

from moshi_ttt_mlx import ttt, ttt_kernels
from moshi_ttt_mlx.ttt import Rules

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
KERNELS = ttt_kernels._KERNELS


def removed(name, which):
    """The text of a kernel without one of its barriers."""
    parts = KERNELS[name][2].split(BARRIER)
    return BARRIER.join(parts[:which]) + parts[which] + BARRIER.join(parts[which + 1 :])


BARRIERS = [(name, i) for name in KERNELS for i in range(1, KERNELS[name][2].count(BARRIER) + 1)]

# kernel: (what, found, planted)
PLANTS = {
    "ttt_mlp_keys": [
        ("sum over one column too many", "d = p; d < D;", "d = p; d <= D;"),
        ("W1 read past its end", "W1[(n * D + d)", "W1[(n * D + d + 1)"),
        ("wrong stride of W1", "* F + slice * R + c];", "* D + slice * R + c];"),
        (
            "a partial sum forgotten",
            "i < P; ++i) {\n        sum_k",
            "i < P - 1; ++i) {\n        sum_k",
        ),
        ("gelu forgotten", "hidden[tid] = gelu(sum_k);", "hidden[tid] = sum_k;"),
        ("hidden units not all written", "if (tid < R) {", "if (tid < R - 1) {"),
        ("rows shared out with a gap", "j += S * 8", "j += S * 16"),
        ("rows kept by every slice", "j = slice * 8 + sg;", "j = sg;"),
        ("future rows counted", "j > t ? 0.0f", "j > t + 1 ? 0.0f"),
        ("simd_sum by lane 0 alone", "dot = simd_sum(dot);", "if (lane == 0) dot = simd_sum(dot);"),
        ("barrier that orders nothing", BARRIER, BARRIER.replace("threadgroup)", "none)")),
    ],
    "ttt_mlp_query": [
        ("wrong sign of the step", "zq -= coefficient[t] * gj;", "zq += coefficient[t] * gj;"),
        ("slope at the query", "gelu_slope(zk)", "gelu_slope(zq)"),
        ("own row counted twice", "if (j != t) {\n        int at", "{\n        int at"),
        ("pending sum past its end", "i < P; ++i) zq", "i <= P; ++i) zq"),
        ("head of batch row 0 for all", "gamma[h * D + tid]", "gamma[n * D + tid]"),
        ("gradient by two simdgroups", "if (sg == 0) {", "if (sg < 2) {"),
        ("g2 written by every slice", "if (slice == 0) {", "{"),
        ("sum over lanes forgotten", "simd_sum(back)", "back"),
        ("own row not written", "g1_out[row] = gj;", ""),
        ("return before a barrier", "float w[UNITS]", "if (tid == 255) return; float w[UNITS]"),
    ],
    "ttt_mlp_answer": [
        (
            "mini-batch longer than memory",
            "for (int j = tid; j < C; j += D)",
            "for (int j = tid; j <= C; j += D)",
        ),
        ("dots of one slice", "i < S; ++i) dot", "i < 1; ++i) dot"),
        ("epsilon forgotten", "m.variance + settings[0]", "m.variance + settings[2]"),
        ("answer without its query", "static_cast<float>(q[n * D + tid]) +", ""),
        ("state of batch row 0", "float z = b2[n * D + tid]", "float z = b2[h * D + tid]"),
    ],
    "ttt_linear_step": [
        ("old rows dropped", "g1_out[at] = gj;", ""),
        ("bias twice", "zq -= coefficient[j] * gj;", "zq -= coefficient[j] * gj + b1[c];"),
        (
            "gradient written late",
            "g1_out[(n * C + t) * D + tid] = gj;",
            "g1_out[(n * C + t) * D + tid] = z[tid];",
        ),
        ("rate of the row before", "static_cast<float>(lr[n])", "lrs[n * C]"),
    ],
    "ttt_fold_sums": [
        ("tile past the layer", "tile_i * TI + e % TI];", "tile_i * TI + e % TI + 1];"),
        ("bias forgotten", "if (tile_i == 0 && sg == 0) {", "if (tile_i < 0 && sg == 0) {"),
        ("tiles over each other", "tile_j * (I / TI) + tile_i", "tile_j + tile_i"),
        ("initial weights of another head", "w0[h * I * J + at]", "w0[n * I * J + at]"),
    ],
    "ttt_fold_apply": [
        ("update added", "- scale * dw;", "+ scale * dw;"),
        ("limit not squared", "settings[2] * settings[2]", "settings[2]"),
        ("bias written by every tile", "if (tile_i == 0 && sg == 0) {", "{"),
        ("tau of the first token", "token_idx[C - 1]", "token_idx[0]"),
        (
            "rows of g swapped with columns",
            "* J + column];\n      bias",
            "* I + column];\n      bias",
        ),
    ],
}

# Noticed by nobody, and why.
MISSED = [
    # Metal's fast tanh overflows where the precise one does not; here both are the C library's.
    ("ttt_mlp_keys", "metal::precise::tanh", "metal::fast::tanh"),
    # Too many registers or spills only show in Apple's compiler.
    ("ttt_mlp_keys", "float sums[V];", "float sums[V]; float more[512]; more[lane] = 0.0f;"),
]


def twice(group):
    """Two batch rows that differ."""
    return {name: mx.concatenate([a, 0.5 * a]) for name, a in group.items()}


def caught(on_metal, monkeypatch, name, text, header=ttt_kernels._HEADER):
    """How a changed text is noticed, or None."""
    monkeypatch.setitem(KERNELS, name, (*KERNELS[name][:2], text))
    monkeypatch.setattr(ttt_kernels, "_HEADER", header)
    ttt_kernels._kernel.cache_clear()
    # 64 wide: two simdgroups share a row. 20 rows: more than the slices take in one go.
    widths = (64,) if name == "ttt_linear_step" else (128, 64)
    rules = Rules(mini_batch=20, max_step=0.01, bound=0.3)
    params, weights, rows, tokens, _ = ttt_kernels._sample(rules, 2, widths)
    args = (rules, params, twice(weights), twice(rows))
    step = (*args, twice(tokens), mx.array(5))
    try:
        if "fold" in name:
            results = ttt_kernels.metal_fold(*args), ttt._fold(*args)
        else:
            results = ttt_kernels.metal_step(*step), ttt._piece(*step)
    except on_metal.MetalError as fault:
        return str(fault)
    for a, b in zip(*map(ttt_kernels._flat, results), strict=True):
        if not mx.all(mx.abs(a - b) <= 2e-5 * (1 + mx.abs(b))):
            return "wrong numbers"
    return None


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_planted_is_not_noticed(on_metal, monkeypatch, name):
    assert caught(on_metal, monkeypatch, name, KERNELS[name][2]) is None


@pytest.mark.parametrize(("name", "which"), BARRIERS)
def test_a_removed_barrier_is_noticed(on_metal, monkeypatch, name, which):
    assert caught(on_metal, monkeypatch, name, removed(name, which))


CASES = [(name, *plant) for name in PLANTS for plant in PLANTS[name]]


@pytest.mark.parametrize(("name", "what", "found", "planted"), CASES)
def test_a_plant_is_noticed(on_metal, monkeypatch, name, what, found, planted):
    text = KERNELS[name][2]
    assert found in text
    assert caught(on_metal, monkeypatch, name, text.replace(found, planted, 1))


@pytest.mark.parametrize(("name", "found", "planted"), MISSED)
def test_what_the_emulator_cannot_see(on_metal, monkeypatch, name, found, planted):
    text, header = KERNELS[name][2], ttt_kernels._HEADER
    assert found in text + header
    change = text.replace(found, planted, 1), header.replace(found, planted, 1)
    assert caught(on_metal, monkeypatch, name, *change) is None


def test_nine_of_ten_are_noticed():
    noticed = len(BARRIERS) + len(CASES)
    assert noticed / (noticed + len(MISSED)) >= 0.9
