"""The streaming step and the fold of an inner learner as Metal kernels, and who uses them when.

What lives here: the Metal text, a factory that builds a kernel when it is first wanted, the calls,
and the dispatchers `step` and `fold`. What does not: the maths in ops, which is `_piece` and `_fold`
in `ttt.py`. Callers hand it over as `twin`; the kernels are tested against it and give way to it.

Kernels run only where Metal is the default device, only for the rules named in `fits`, and only
after one step on random data agreed with the twin. `MOSHI_TTT_KERNEL=ops` never uses them, `metal`
uses them without that check. They have no gradient: training does not come here.

A step of TTT-MLP is three dispatches, because two sums run over all of the hidden width and the
work of one head is split over several threadgroups; TTT-Linear is one; a fold is two per layer.
docs/kernels.md gives the bytes and says what was run where.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

from .errors import UserError

if TYPE_CHECKING:
    from .ttt import Arrays, Rules

_log = logging.getLogger(__name__)

_THREADS = 256  # a threadgroup; more may not fit the registers of a compiled kernel

_HEADER = """
// tanh form of GELU: gelu(z) = z/2 (1 + tanh(A (z + B z^3))).
constant constexpr float GELU_A = 0.7978845608f;
constant constexpr float GELU_B = 0.044715f;

inline float gelu_tanh(float z) {
  return metal::precise::tanh(GELU_A * (z + GELU_B * z * z * z));
}
inline float gelu(float z) { return 0.5f * z * (1.0f + gelu_tanh(z)); }
inline float gelu_slope(float z) {
  float t = gelu_tanh(z);
  return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * GELU_A * (1.0f + 3.0f * GELU_B * z * z);
}

struct Moments { float mean, variance; };

// Of z[0:D] over DIVISOR, for one simdgroup; every lane gets them.
template <int D, int DIVISOR>
inline Moments moments(const threadgroup float* z, uint lane) {
  float sum = 0.0f, squares = 0.0f;
  for (int d = lane; d < D; d += 32) sum += z[d];
  float mean = simd_sum(sum) / D;
  for (int d = lane; d < D; d += 32) { float away = z[d] - mean; squares += away * away; }
  return {mean, simd_sum(squares) / DIVISOR};
}

// Gradient at z of 1/2 |LN(z) - r|^2 into g, for one simdgroup. Each lane touches its own d only.
template <int D, bool STANDARDIZED>
inline void loss_gradient(
    const threadgroup float* z, const threadgroup float* r, const threadgroup float* gamma,
    const threadgroup float* beta, threadgroup float* g, float eps, float target_eps, uint lane) {
  Moments target = {0.0f, 0.0f};
  if (STANDARDIZED) target = moments<D, D - 1>(r, lane);
  float deviation = metal::precise::sqrt(target.variance) + target_eps;
  Moments m = moments<D, D>(z, lane);
  float s = metal::precise::sqrt(m.variance + eps);
  float sum = 0.0f, along = 0.0f;
  for (int d = lane; d < D; d += 32) {
    float want = r[d];
    if (STANDARDIZED) want = gamma[d] * (want - target.mean) / deviation + beta[d];
    float xh = (z[d] - m.mean) / s;
    float gx = (gamma[d] * xh + beta[d] - want) * gamma[d];
    sum += gx;
    along += gx * xh;
    g[d] = gx;
  }
  sum = simd_sum(sum);
  along = simd_sum(along);
  for (int d = lane; d < D; d += 32) {
    float xh = (z[d] - m.mean) / s;
    g[d] = (D * g[d] - sum - xh * along) / (D * s);
  }
}

// Running sums of a fold: |w|^2, |w0|^2, |dw|^2, |w - w0|^2 and (w - w0) . dw.
inline void add_products(thread float* sums, float w, float w0, float dw) {
  float away = w - w0;
  sums[0] += w * w;
  sums[1] += w0 * w0;
  sums[2] += dw * dw;
  sums[3] += away * away;
  sums[4] += away * dw;
}
"""

# Everywhere: n is batch row * H + head, t the place of the token in its mini-batch, j a row of it.
# A simdgroup reads 32 neighbouring floats at a time: columns of W1 and rows of W2 are coalesced.

# Grid: S slices of R hidden units, B * H. One read of W1, the first of W2.
_MLP_KEYS = """
    constexpr int P = 256 / R;                     // threads that share a column of W1
    constexpr int V = D / 32;                      // columns of W2 a lane holds
    constexpr int F = S * R;
    int slice = threadgroup_position_in_grid.x;
    int n = threadgroup_position_in_grid.y;
    int tid = thread_index_in_threadgroup;
    int lane = thread_index_in_simdgroup;
    int sg = simdgroup_index_in_threadgroup;
    int t = place[0];

    threadgroup float xk[D];
    threadgroup float xq[D];
    threadgroup float part_k[P][R];
    threadgroup float part_q[P][R];
    threadgroup float hidden[R];
    threadgroup float part[8][D];

    if (tid < D) {
      xk[tid] = static_cast<float>(k[n * D + tid]);
      xq[tid] = static_cast<float>(q[n * D + tid]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Key and query through this slice's columns of W1.
    int c = tid % R, p = tid / R;
    float zk = 0.0f, zq = 0.0f;
    for (int d = p; d < D; d += P) {
      float w = W1[(n * D + d) * F + slice * R + c];
      zk += xk[d] * w;
      zq += xq[d] * w;
    }
    part_k[p][c] = zk;
    part_q[p][c] = zq;

    // The slices share out the rows: keep x1 and say how much the query asks of each.
    float tau = metal::max(1.0f / float(t + 1) + token_idx[t], 0.0f);
    for (int j = slice * 8 + sg; j < C; j += S * 8) {
      float dot = 0.0f;
      for (int d = lane; d < D; d += 32) {
        float key = xk[d];
        if (j != t) key = x1[(n * C + j) * D + d];
        x1_out[(n * C + j) * D + d] = key;
        dot += xq[d] * key;
      }
      dot = simd_sum(dot);
      float rate = j == t ? static_cast<float>(lr[n]) : lrs[n * C + j];
      if (lane == 0) asked[n * C + j] = j > t ? 0.0f : tau * rate * (1.0f + dot);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (tid < R) {
      float bias = b1[n * F + slice * R + tid];
      float sum_k = bias, sum_q = bias;
      for (int i = 0; i < P; ++i) {
        sum_k += part_k[i][tid];
        sum_q += part_q[i][tid];
      }
      z1_key[n * F + slice * R + tid] = sum_k;
      z1_query[n * F + slice * R + tid] = sum_q;
      hidden[tid] = gelu(sum_k);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // This slice's share of the key's z2: a simdgroup takes whole rows of W2.
    float sums[V];
    for (int i = 0; i < V; ++i) sums[i] = 0.0f;
    for (int r = sg; r < R; r += 8) {
      float x = hidden[r];
      for (int i = 0; i < V; ++i) {
        sums[i] += x * W2[(n * F + slice * R + r) * D + i * 32 + lane];
      }
    }
    for (int i = 0; i < V; ++i) part[sg][i * 32 + lane] = sums[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < D) {
      float sum = 0.0f;
      for (int i = 0; i < 8; ++i) sum += part[i][tid];
      z2_key[(n * S + slice) * D + tid] = sum;
    }
"""

# Grid: S slices of R hidden units, B * H. The second read of W2 serves the gradient of a hidden unit
# and, right behind it, the query through the same row.
_MLP_QUERY = """
    constexpr int P = 256 / R;                     // threads that share a column of the rows
    constexpr int V = D / 32;
    constexpr int F = S * R;
    constexpr int UNITS = R / 8;                   // hidden units of a simdgroup
    int slice = threadgroup_position_in_grid.x;
    int n = threadgroup_position_in_grid.y;
    int h = n % H;
    int tid = thread_index_in_threadgroup;
    int lane = thread_index_in_simdgroup;
    int sg = simdgroup_index_in_threadgroup;
    int t = place[0];

    threadgroup float z2[D];
    threadgroup float r[D];
    threadgroup float ln_gamma[D];
    threadgroup float ln_beta[D];
    threadgroup float g[D];
    threadgroup float coefficient[C];
    threadgroup float pending[P][R];
    threadgroup float hidden_key[R];
    threadgroup float hidden_query[R];
    threadgroup float part[8][D];

    // Asked for first, needed last: the tile of W2 arrives while the gradient is worked out.
    float w[UNITS][V];
    for (int u = 0; u < UNITS; ++u) {
      for (int i = 0; i < V; ++i) {
        w[u][i] = W2[(n * F + slice * R + u * 8 + sg) * D + i * 32 + lane];
      }
    }

    if (tid < D) {
      float z = b2[n * D + tid];
      for (int i = 0; i < S; ++i) z += z2_key[(n * S + i) * D + tid];
      z2[tid] = z;
      r[tid] = static_cast<float>(v[n * D + tid]) - static_cast<float>(k[n * D + tid]);
      ln_gamma[tid] = gamma[h * D + tid];
      ln_beta[tid] = beta[h * D + tid];
    }
    if (tid < C) coefficient[tid] = asked[n * C + tid];
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (sg == 0) {
      loss_gradient<D, STANDARDIZED>(
          z2, r, ln_gamma, ln_beta, g, settings[0], settings[1], lane);
      if (slice == 0) {
        for (int d = lane; d < D; d += 32) g2_new[n * D + d] = g[d];
      }
    }

    // Keep the rows of this slice, and sum what those before the token have pending.
    int c = tid % R, p = tid / R;
    float sum = 0.0f;
    for (int j = p; j < C; j += P) {
      if (j != t) {
        int at = (n * C + j) * F + slice * R + c;
        float gj = g1[at];
        sum += coefficient[j] * gj;
        g1_out[at] = gj;
        x2_out[at] = x2[at];
      }
    }
    pending[p][c] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float sums[V];
    for (int i = 0; i < V; ++i) sums[i] = 0.0f;
    for (int u = 0; u < UNITS; ++u) {
      int unit = u * 8 + sg;
      int at = n * F + slice * R + unit;
      float back = 0.0f;
      for (int i = 0; i < V; ++i) back += g[i * 32 + lane] * w[u][i];
      float zk = z1_key[at], zq = z1_query[at];
      float gj = simd_sum(back) * gelu_slope(zk);
      float xk = gelu(zk);
      zq -= coefficient[t] * gj;
      for (int i = 0; i < P; ++i) zq -= pending[i][unit];
      float xq = gelu(zq);
      for (int i = 0; i < V; ++i) sums[i] += xq * w[u][i];
      if (lane == 0) {
        int row = (n * C + t) * F + slice * R + unit;
        g1_out[row] = gj;
        x2_out[row] = xk;
        hidden_key[unit] = xk;
        hidden_query[unit] = xq;
      }
    }
    for (int i = 0; i < V; ++i) part[sg][i * 32 + lane] = sums[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (tid < D) {
      float z = 0.0f;
      for (int i = 0; i < 8; ++i) z += part[i][tid];
      z2_query[(n * S + slice) * D + tid] = z;
    }
    // This slice's share of x . x2 for each row.
    for (int j = sg; j < C; j += 8) {
      float dot = 0.0f;
      for (int u = lane; u < R; u += 32) {
        float x = hidden_key[u];
        if (j != t) x = x2[(n * C + j) * F + slice * R + u];
        dot += hidden_query[u] * x;
      }
      dot = simd_sum(dot);
      if (lane == 0) dots[(n * S + slice) * C + j] = dot;
    }
"""

# Grid: one threadgroup of D threads per head. No weights left to read.
_MLP_ANSWER = """
    int n = threadgroup_position_in_grid.x;
    int h = n % H;
    int tid = thread_index_in_threadgroup;
    int lane = thread_index_in_simdgroup;
    int t = place[0];
    threadgroup float coefficient[C];
    threadgroup float z2[D];

    float tau = metal::max(1.0f / float(t + 1) + token_idx[t], 0.0f);
    for (int j = tid; j < C; j += D) {
      float dot = 0.0f;
      for (int i = 0; i < S; ++i) dot += dots[(n * S + i) * C + j];
      float rate = j == t ? static_cast<float>(lr[n]) : lrs[n * C + j];
      coefficient[j] = j > t ? 0.0f : tau * rate * (1.0f + dot);
      lrs_out[n * C + j] = rate;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float z = b2[n * D + tid];
    for (int i = 0; i < S; ++i) z += z2_query[(n * S + i) * D + tid];
    for (int j = 0; j < C; ++j) {
      int at = (n * C + j) * D + tid;
      float gj = j == t ? g2_new[n * D + tid] : g2[at];
      z -= coefficient[j] * gj;
      g2_out[at] = gj;
    }
    z2[tid] = z;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    Moments m = moments<D, D>(z2, lane);
    float xh = (z - m.mean) / metal::precise::sqrt(m.variance + settings[0]);
    out[n * D + tid] =
        static_cast<float>(q[n * D + tid]) + gamma[h * D + tid] * xh + beta[h * D + tid];
"""

# Grid: one threadgroup per head. One read of W1.
_LINEAR_STEP = """
    constexpr int P = 256 / D;                     // threads that share a column
    int n = threadgroup_position_in_grid.x;
    int h = n % H;
    int tid = thread_index_in_threadgroup;
    int lane = thread_index_in_simdgroup;
    int sg = simdgroup_index_in_threadgroup;
    int t = place[0];

    threadgroup float xk[D];
    threadgroup float xq[D];
    threadgroup float part_k[P][D];
    threadgroup float part_q[P][D];
    threadgroup float z[D];
    threadgroup float r[D];
    threadgroup float ln_gamma[D];
    threadgroup float ln_beta[D];
    threadgroup float g[D];
    threadgroup float coefficient[C];

    if (tid < D) {
      float key = static_cast<float>(k[n * D + tid]);
      xk[tid] = key;
      xq[tid] = static_cast<float>(q[n * D + tid]);
      r[tid] = static_cast<float>(v[n * D + tid]) - key;
      ln_gamma[tid] = gamma[h * D + tid];
      ln_beta[tid] = beta[h * D + tid];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    int c = tid % D, p = tid / D;
    float zk = 0.0f, zq = 0.0f;
    for (int d = p; d < D; d += P) {
      float w = W1[(n * D + d) * D + c];
      zk += xk[d] * w;
      zq += xq[d] * w;
    }
    part_k[p][c] = zk;
    float tau = metal::max(1.0f / float(t + 1) + token_idx[t], 0.0f);
    for (int j = sg; j < C; j += 8) {
      float dot = 0.0f;
      for (int d = lane; d < D; d += 32) {
        float key = xk[d];
        if (j != t) key = x1[(n * C + j) * D + d];
        x1_out[(n * C + j) * D + d] = key;
        dot += xq[d] * key;
      }
      dot = simd_sum(dot);
      float rate = j == t ? static_cast<float>(lr[n]) : lrs[n * C + j];
      if (lane == 0) {
        coefficient[j] = j > t ? 0.0f : tau * rate * (1.0f + dot);
        lrs_out[n * C + j] = rate;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (tid < D) {
      float sum = b1[n * D + tid];
      for (int i = 0; i < P; ++i) sum += part_k[i][tid];
      z[tid] = sum;
    }
    // The rows before the token answer to the query while the key's z is put together.
    for (int j = p; j < C; j += P) {
      if (j != t) {
        int at = (n * C + j) * D + c;
        float gj = g1[at];
        zq -= coefficient[j] * gj;
        g1_out[at] = gj;
      }
    }
    part_q[p][c] = zq;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (sg == 0) {
      loss_gradient<D, STANDARDIZED>(
          z, r, ln_gamma, ln_beta, g, settings[0], settings[1], lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (tid < D) {
      float gj = g[tid];
      float sum = b1[n * D + tid] - coefficient[t] * gj;
      for (int i = 0; i < P; ++i) sum += part_q[i][tid];
      g1_out[(n * C + t) * D + tid] = gj;
      z[tid] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (tid < D) {
      Moments m = moments<D, D>(z, lane);
      float xh = (z[tid] - m.mean) / metal::precise::sqrt(m.variance + settings[0]);
      out[n * D + tid] = xq[tid] + ln_gamma[tid] * xh + ln_beta[tid];
    }
"""

# A fold works on tiles of TI rows and 32 columns of one layer; a lane keeps its column of g.
_FOLD_TILE = """
    constexpr int TILES = (I / TI) * (J / 32);
    int tile_j = threadgroup_position_in_grid.x;
    int tile_i = threadgroup_position_in_grid.y;
    int n = threadgroup_position_in_grid.z;
    int h = n % H;
    int tid = thread_index_in_threadgroup;
    int lane = thread_index_in_simdgroup;
    int sg = simdgroup_index_in_threadgroup;
    int column = tile_j * 32 + lane;

    threadgroup float xs[C][TI];
    for (int e = tid; e < C * TI; e += 256) {
      xs[e / TI][e % TI] = x[(n * C + e / TI) * I + tile_i * TI + e % TI];
    }
    float tau = metal::max(1.0f / float(C) + token_idx[C - 1], 0.0f);
    float change[C], bias_change = 0.0f;
    for (int j = 0; j < C; ++j) {
      change[j] = tau * lrs[n * C + j] * g[(n * C + j) * J + column];
      bias_change += change[j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""

# Grid: J / 32 x I / TI tiles, B * H. What the two limits need to know, from one read of w and w0.
_FOLD_SUMS = (
    _FOLD_TILE
    + """
    threadgroup float part[8][5];
    float sums[5];
    for (int i = 0; i < 5; ++i) sums[i] = 0.0f;
    for (int row = sg; row < TI; row += 8) {
      float dw = 0.0f;
      for (int j = 0; j < C; ++j) dw += xs[j][row] * change[j];
      int at = (tile_i * TI + row) * J + column;
      add_products(sums, w[n * I * J + at], w0[h * I * J + at], dw);
    }
    if (tile_i == 0 && sg == 0) {
      add_products(sums, b[n * J + column], b0[h * J + column], bias_change);
    }
    for (int i = 0; i < 5; ++i) {
      float sum = simd_sum(sums[i]);
      if (lane == 0) part[sg][i] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < 5) {
      float sum = 0.0f;
      for (int i = 0; i < 8; ++i) sum += part[i][tid];
      products[(n * TILES + tile_j * (I / TI) + tile_i) * 5 + tid] = sum;
    }
"""
)

# The same grid. The limits are exact no-ops inside: a scale of 1, a pull back of 0.
_FOLD_APPLY = (
    _FOLD_TILE
    + """
    threadgroup float total[5];
    if (tid < 5) {
      float sum = 0.0f;
      for (int i = 0; i < TILES; ++i) sum += products[(n * TILES + i) * 5 + tid];
      total[tid] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float squares = total[2];
    float norm = metal::max(total[0], total[1]);
    float limit = settings[2] * settings[2] * norm;
    float scale = squares > limit ? metal::precise::sqrt(limit / squares) : 1.0f;
    float away = total[3] - 2.0f * scale * total[4] + scale * scale * squares;
    float ball = settings[3] * settings[3] * float((I + 1) * J);
    float back = away > ball ? 1.0f - metal::precise::sqrt(ball / away) : 0.0f;

    for (int row = sg; row < TI; row += 8) {
      float dw = 0.0f;
      for (int j = 0; j < C; ++j) dw += xs[j][row] * change[j];
      int at = (tile_i * TI + row) * J + column;
      float to = w[n * I * J + at] - scale * dw;
      if (back > 0.0f) to -= back * (to - w0[h * I * J + at]);
      w_out[n * I * J + at] = to;
    }
    if (tile_i == 0 && sg == 0) {
      float to = b[n * J + column] - scale * bias_change;
      if (back > 0.0f) to -= back * (to - b0[h * J + column]);
      b_out[n * J + column] = to;
    }
    if (tile_i == 0 && tile_j == 0 && tid == 0) {
      moved[n] = scale * metal::precise::sqrt(squares / norm);
    }
"""
)

# name: (inputs, outputs, text); names separated by blanks.
_KERNELS = {
    "ttt_mlp_keys": (
        "q k lr place token_idx W1 b1 W2 x1 lrs",
        "z1_key z1_query z2_key asked x1_out",
        _MLP_KEYS,
    ),
    "ttt_mlp_query": (
        "k v place gamma beta settings z1_key z1_query z2_key asked W2 b2 g1 x2",
        "z2_query dots g2_new g1_out x2_out",
        _MLP_QUERY,
    ),
    "ttt_mlp_answer": (
        "q lr place token_idx gamma beta settings z2_query dots g2_new b2 g2 lrs",
        "out g2_out lrs_out",
        _MLP_ANSWER,
    ),
    "ttt_linear_step": (
        "q k v lr place token_idx gamma beta settings W1 b1 x1 g1 lrs",
        "out x1_out g1_out lrs_out",
        _LINEAR_STEP,
    ),
    "ttt_fold_sums": ("token_idx w b w0 b0 x g lrs", "products", _FOLD_SUMS),
    "ttt_fold_apply": (
        "token_idx settings products w b w0 b0 x g lrs",
        "w_out b_out moved",
        _FOLD_APPLY,
    ),
}


@functools.cache
def _kernel(name: str) -> Callable:
    inputs, outputs, source = _KERNELS[name]
    return mx.fast.metal_kernel(name, inputs.split(), outputs.split(), source, _HEADER)


def _run(name: str, arrays: "Arrays", shapes: list, groups: tuple, threads: int, **template):
    """Dispatch `groups` threadgroups on those of `arrays` that a kernel takes; outputs by name."""
    inputs, outputs, _ = _KERNELS[name]
    made = _kernel(name)(
        inputs=[arrays[n] for n in inputs.split()],
        template=list(template.items()),
        grid=(groups[0] * threads, *groups[1:]),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=[mx.float32] * len(shapes),
    )
    return dict(zip(outputs.split(), made, strict=True))


def _settings(rules: "Rules") -> mx.array:
    return mx.array([rules.ln_eps, rules.target_eps, rules.max_step, rules.bound])


def metal_step(
    rules: "Rules",
    params: "Arrays",
    weights: "Arrays",
    rows: "Arrays",
    tokens: "Arrays",
    place: int | mx.array,
) -> tuple[mx.array, "Arrays"]:
    """`ttt._piece` for one token: the same arguments, with `tokens` `[B, H, 1, f]` of any dtype."""
    arrays = weights | {("lrs" if name == "lr" else name): a for name, a in rows.items()} | tokens
    arrays |= {name: params[name] for name in ("gamma", "beta", "token_idx")}
    arrays["place"] = mx.array(place, dtype=mx.int32).reshape(1)
    arrays["settings"] = _settings(rules)
    # mlx 0.26 knows a kernel by its template alone, so what may vary has to be there.
    types = {f"T_{name}": a.dtype for name, a in tokens.items()}
    made = (_mlp_step if "W2" in weights else _linear_step)(rules, arrays, types)
    renamed = {("lrs" if name == "lr" else name): name for name in rows}
    return made["out"], {name: made[f"{its}_out"] for its, name in renamed.items()}


def _mlp_step(rules: "Rules", arrays: "Arrays", types: dict[str, mx.Dtype]) -> "Arrays":
    batch, heads, hidden, d = arrays["W2"].shape
    c, n, size = rules.mini_batch, batch * heads, 64 if hidden % 64 == 0 else 32
    count = hidden // size
    shape = types | {"D": d, "C": c, "S": count}
    shapes = {name: arrays[name].shape for name in ("q", "x1", "g1", "x2", "g2", "lrs")}
    arrays |= _run(
        "ttt_mlp_keys",
        arrays,
        [(n, hidden), (n, hidden), (n, count, d), (n, c), shapes["x1"]],
        (count, n, 1),
        _THREADS,
        **shape,
        R=size,
    )
    arrays |= _run(
        "ttt_mlp_query",
        arrays,
        [(n, count, d), (n, count, c), (n, d), shapes["g1"], shapes["x2"]],
        (count, n, 1),
        _THREADS,
        **shape,
        R=size,
        H=heads,
        STANDARDIZED=rules.target == "standardized",
    )
    return arrays | _run(
        "ttt_mlp_answer",
        arrays,
        [shapes["q"], shapes["g2"], shapes["lrs"]],
        (n, 1, 1),
        d,
        **shape,
        H=heads,
    )


def _linear_step(rules: "Rules", arrays: "Arrays", types: dict[str, mx.Dtype]) -> "Arrays":
    batch, heads, _, d = arrays["W1"].shape
    return _run(
        "ttt_linear_step",
        arrays,
        [arrays[name].shape for name in ("q", "x1", "g1", "lrs")],
        (batch * heads, 1, 1),
        _THREADS,
        **types,
        D=d,
        C=rules.mini_batch,
        H=heads,
        STANDARDIZED=rules.target == "standardized",
    )


def metal_fold(
    rules: "Rules", params: "Arrays", weights: "Arrays", rows: "Arrays"
) -> tuple["Arrays", mx.array]:
    """`ttt._fold`: the same arguments and results."""
    folded, steps = {}, []
    shared = {
        "token_idx": params["token_idx"],
        "settings": _settings(rules),
        "lrs": rows["lr"],
    }
    for i in range(1, len(weights) // 2 + 1):
        layer = {"w": weights[f"W{i}"], "b": weights[f"b{i}"], "x": rows[f"x{i}"]}
        layer |= {"w0": params[f"W{i}"], "b0": params[f"b{i}"], "g": rows[f"g{i}"]}
        made = _fold_layer(rules, shared | layer)
        folded |= {f"W{i}": made["w_out"], f"b{i}": made["b_out"]}
        steps.append(made["moved"])
    return folded, mx.stack(steps, axis=-1)


def _fold_layer(rules: "Rules", arrays: "Arrays") -> "Arrays":
    batch, heads, n_in, n_out = arrays["w"].shape
    tile = 64 if n_in % 64 == 0 else 32
    groups = (n_out // 32, n_in // tile, batch * heads)
    template = {"C": rules.mini_batch, "H": heads, "I": n_in, "J": n_out, "TI": tile}
    products = [(batch * heads, groups[0] * groups[1], 5)]
    arrays |= _run("ttt_fold_sums", arrays, products, groups, _THREADS, **template)
    shapes = [arrays["w"].shape, arrays["b"].shape, (batch, heads)]
    return _run("ttt_fold_apply", arrays, shapes, groups, _THREADS, **template)


# -- which one runs -------------------------------------------------------------------------------


def fits(rules: "Rules", weights: "Arrays") -> bool:
    """Whether the kernels compute these rules at these sizes; the others stay with ops.

    They do one or two layers in float32, causal, with a learned tau, a read gain of 1 and nothing
    forgotten: head widths 32, 64 and 128, a hidden width that is a multiple of 32 up to four times
    that, mini-batches up to 64. Targets, limits and epsilons are free.
    """
    width, hidden = weights["W1"].shape[-2:]
    return (
        all(a.dtype == mx.float32 for a in weights.values())
        and len(weights) <= 4
        and rules.causal
        and rules.tau == "learned"
        and rules.read_gain == 1
        and rules.forget is None
        and rules.mini_batch <= 64
        and width in (32, 64, 128)
        and hidden % 32 == 0
        and hidden <= 4 * width
    )


def step(twin: Callable, rules: "Rules", *args) -> tuple[mx.array, "Arrays"]:
    """One token by kernel or by `twin`; arguments of `metal_step`. Fit for `mx.compile`."""
    chosen = metal_step if _wanted(metal_step, twin, rules, args[0], args[1]) else twin
    return chosen(rules, *args)


def fold(twin: Callable, rules: "Rules", *args) -> tuple["Arrays", mx.array]:
    """A full mini-batch by kernel or by `twin`; arguments of `metal_fold`."""
    chosen = metal_fold if _wanted(metal_fold, twin, rules, args[0], args[1]) else twin
    return chosen(rules, *args)


def _on_metal() -> bool:
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def _wanted(
    kernel: Callable, twin: Callable, rules: "Rules", params: "Arrays", weights: "Arrays"
) -> bool:
    wish = os.environ.get("MOSHI_TTT_KERNEL", "")
    if wish not in ("", "ops", "metal"):
        raise UserError(f"MOSHI_TTT_KERNEL must be ops or metal, got {wish!r}")
    if wish == "metal" and not _on_metal():
        raise UserError("MOSHI_TTT_KERNEL=metal: Metal is not the default device here; use ops")
    if wish == "ops" or not _on_metal() or not fits(rules, weights):
        return False
    widths = tuple(weights[f"W{i}"].shape[-1] for i in range(1, len(weights) // 2 + 1))
    return wish == "metal" or _agrees(kernel, twin, rules, params["gamma"].shape[0], widths)


@functools.cache
def _agrees(kernel: Callable, twin: Callable, rules: "Rules", heads: int, widths: tuple) -> bool:
    """Try kernel and twin on random data once per process; warn and say False if they differ."""
    args = _sample(rules, heads, widths)[: 5 if kernel is metal_step else 3]
    try:
        found, wanted = (_flat(f(rules, *args)) for f in (kernel, twin))
        # Rounding is 1e-6 of these magnitudes; a kernel that went wrong is off by as much as they.
        close = [
            mx.max(mx.abs(a - b)) <= 1e-3 * (1 + mx.max(mx.abs(b)))
            for a, b in zip(found, wanted, strict=True)
        ]
        fault = None if mx.stack(close).all().item() else "its numbers are not those of plain ops"
    except (RuntimeError, ValueError) as error:
        fault = str(error).strip().partition("\n")[0]
    if fault:
        _log.warning("memory: the Metal kernel %s is not used: %s", kernel.__name__, fault)
    return not fault


def _flat(result: tuple) -> list[mx.array]:
    """A dictionary and an array, in whichever order, as arrays in a fixed order."""
    parts = [p if isinstance(p, dict) else {"": p} for p in result]
    return [part[name] for part in parts for name in sorted(part)]


def _sample(rules: "Rules", heads: int, widths: tuple) -> tuple:
    """Random arguments of a step in the middle of a mini-batch, with a generator of its own."""
    keys = iter(mx.random.split(mx.random.key(0), 64))
    f, c = widths[-1], rules.mini_batch

    def normal(*shape, scale=1.0):
        return scale * mx.random.normal(shape, key=next(keys))

    params, weights = {"token_idx": mx.abs(normal(c, scale=0.3))}, {}
    rows = {"lr": mx.abs(normal(1, heads, c, 1, scale=0.1))}
    for i, (n_in, n_out) in enumerate(zip((f, *widths), widths, strict=False), 1):
        for name, n in ((f"W{i}", n_in), (f"b{i}", 1)):
            params[name] = normal(heads, n, n_out, scale=0.1)
            weights[name] = params[name] + normal(1, heads, n, n_out, scale=0.1)
        rows[f"x{i}"] = normal(1, heads, c, n_in, scale=0.3)
        rows[f"g{i}"] = normal(1, heads, c, n_out, scale=0.3)
    params |= {"gamma": 1 + normal(heads, 1, f, scale=0.1), "beta": normal(heads, 1, f, scale=0.1)}
    tokens = {name: normal(1, heads, 1, f) for name in "qkv"}
    tokens["lr"] = mx.abs(normal(1, heads, 1, 1, scale=0.1))
    return params, weights, rows, tokens, mx.array(c // 2)
