"""The rival of the recall experiment: a matrix memory with the gated delta rule.

Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464): a matrix per head forgets by a
learned factor and writes what it did not predict,

    S_t = a_t S_(t-1) + b_t k_t (v_t - (a_t S_(t-1))^T k_t)^T        o_t = S_t^T q_t

computed for `C` tokens at once. It has the interface of an inner learner as far as the experiment uses
it: whole mini-batches, no streaming.
"""

import mlx.core as mx
from mlx import nn

from moshi_ttt_mlx.ttt import TTTState

CHUNK = 16


class GatedDelta(nn.Module):
    """`S [B, H, f, f]`, zero at first.

    Args:
        heads, head_dim: `H` and `f`.
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self._sizes = heads, head_dim

    def init_state(self, batch: int) -> TTTState:
        heads, f = self._sizes
        # MemoryCache counts places by the rows of a mini-batch.
        rows = {"lr": mx.zeros((batch, heads, CHUNK, 1))}
        return TTTState({"S": mx.zeros((batch, heads, f, f))}, rows, mx.zeros((batch, heads, 1)))

    def __call__(self, q, k, v, lr, state: TTTState, decay) -> tuple[mx.array, TTTState]:
        """Answers `[B, H, T, f]`; `lr [B, H, T]` is what share of the new is written."""
        matrix, outs = state.weights["S"], []
        for start in range(0, q.shape[2], CHUNK):
            part = [x[:, :, start : start + CHUNK] for x in (q, k, v, lr, decay)]
            out, matrix = _chunk(matrix, *part)
            outs.append(out)
        tokens = state.tokens + q.shape[2]
        new = TTTState({"S": matrix}, state.rows, state.step, tokens, tokens // CHUNK)
        return mx.concatenate(outs, axis=2), new


def _chunk(matrix, q, k, v, write, decay):
    tokens = q.shape[2]
    left = mx.cumsum(mx.log(decay), axis=2)  # of the matrix, at each token, as a logarithm
    since = mx.exp(mx.minimum(left[..., :, None] - left[..., None, :], 0))
    whole = mx.exp(left)[..., None]
    keys = (k @ k.swapaxes(2, 3)) * since
    earlier = mx.tril(mx.ones((tokens, tokens)), -1)
    rhs = write[..., None] * (v - whole * (k @ matrix))
    new = _solve(write[..., None] * keys * earlier, rhs)
    seen = mx.tril((q @ k.swapaxes(2, 3)) * since)
    out = whole * (q @ matrix) + seen @ new
    last = mx.exp(left[..., -1:] - left)[..., None]
    return out, whole[:, :, -1:] * matrix + (last * k).swapaxes(2, 3) @ new


def _solve(below: mx.array, rhs: mx.array) -> mx.array:
    """`(I + below)^-1 rhs` for a strictly lower triangle: its powers end, so the series is exact."""
    power, out, size = -below, rhs, 1
    while size < below.shape[-1]:
        out = out + power @ out
        power, size = power @ power, 2 * size
    return out
