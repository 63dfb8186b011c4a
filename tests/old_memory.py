"""The memory layer of the PyTorch Moshi-TTT code in numpy float64, and checkpoints as it wrote them.

Written from its equations, one mini-batch at a time as it was trained, and from nothing of this
package: what converted memories are compared with.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from test_generate import config as lm_config

HEADS, HEAD_DIM, C = 4, 8, 4
WIDTH = HEADS * HEAD_DIM
BLOCK = "transformer.layers.{}.seq_modeling_block."
TTT = "ttt_layer.ttt."


@dataclass(frozen=True)
class Old:
    """How a checkpoint was trained."""

    sizes: tuple[int, ...] = (HEAD_DIM, 4 * HEAD_DIM, HEAD_DIM)
    post_norm: bool = False
    l2_norm: bool = True
    rope: bool = False
    theta: float = 10000.0
    base_lr: float = 4.0

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1


# -- the layer -------------------------------------------------------------------------------------


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def gelu_slope(z):
    t = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)


def norm(z, weight, bias, eps):
    mean, var = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
    return weight * (z - mean) / np.sqrt(var + eps) + bias


def loss_gradient(z, target, weight, bias):
    """Gradient at z of 1/2 ||norm(z) - target||^2."""
    s = np.sqrt(z.var(-1, keepdims=True) + 1e-8)
    xh = (z - z.mean(-1, keepdims=True)) / s
    g = (weight * xh + bias - target) * weight
    return (g - g.mean(-1, keepdims=True) - xh * (g * xh).mean(-1, keepdims=True)) / s


def rotate(x, theta):
    """x [T, f]: RoPE over neighbouring entries as complex numbers, places counted modulo C."""
    i = np.arange(0, HEAD_DIM, 2)
    speed = theta ** (-i / HEAD_DIM) * (0.5 + 1.5 * np.exp(-i / (2 * HEAD_DIM)))
    turn = np.exp(1j * (np.arange(len(x)) % C)[:, None] * speed)
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def old_memory(old: Old, p: dict, x: np.ndarray, see=None) -> np.ndarray:
    """The answer `[T, D]` to a stream `[T, D]`; `see [C, C]` masks who hears whom (all by default)."""
    p = {name: a.astype(np.float64) for name, a in p.items()}
    see = np.ones((C, C)) if see is None else see
    out = np.concatenate([_head(old, p, x, h, see) for h in range(HEADS)], axis=1)
    if old.post_norm:
        out = norm(out, p[TTT + "post_norm.weight"], p[TTT + "post_norm.bias"], 1e-6)
        out = out @ p[TTT + "wo.weight"].T + p[TTT + "wo.bias"]
    return out


def _head(old, p, x, h, see):
    mine = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
    q, k, v = (
        x @ p[f"{TTT}w{n}.weight"][mine].T + p[f"{TTT}w{n}.bias"][mine] for n in ("q", "k", "v")
    )
    weight, bias = p[TTT + "ttt_norm_weight"][h], p[TTT + "ttt_norm_bias"][h]
    spread = None
    if old.l2_norm:
        q, k = (a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12) for a in (q, k))
        if old.rope:
            q, k = rotate(q, old.theta), rotate(k, old.theta)
        spread = (v - k).std(-1, ddof=1, keepdims=True)
    r = v - k
    # Before the fix the "standard deviation" was r itself.
    target = weight * (r - r.mean(-1, keepdims=True)) / ((r if spread is None else spread) + 1e-5)
    target = target + bias
    rate = x @ p[TTT + "learnable_ttt_lr_weight"][h, 0] + p[TTT + "learnable_ttt_lr_bias"][h, 0]
    rate = old.base_lr / (1 + np.exp(-rate)) / HEAD_DIM
    layers = [(p[w][h], p[b][h]) for w, b in inner_names(old)]
    out = []
    for start in range(0, len(x), C):
        part = slice(start, start + C)
        eta = np.tile(rate[part], (C, 1)) / C
        answer, layers = _mini_batch(layers, q[part], k[part], target[part], eta, weight, bias, see)
        out.append(answer)
    return np.concatenate(out)


def _mini_batch(layers, q, k, target, eta, weight, bias, see):
    xs, zs = [k], []
    for w, b in layers:
        zs.append(xs[-1] @ w + b)
        xs.append(gelu(zs[-1]))
    grads = [loss_gradient(zs[-1], target, weight, bias)]
    for (w, _), z in zip(layers[:0:-1], zs[-2::-1], strict=True):
        grads.insert(0, grads[0] @ w.T * gelu_slope(z))
    last = eta[-1][:, None]
    new = [
        (w - (last * x).T @ g, b - (last * g).sum(0, keepdims=True))
        for (w, b), x, g in zip(layers, xs[:-1], grads, strict=True)
    ]
    x = q
    for i, ((w, b), seen, g) in enumerate(zip(layers, xs[:-1], grads, strict=True)):
        share = eta * see
        z = x @ w + b - (share * (x @ seen.T)) @ g - share @ g
        if len(layers) > 2:  # these started from the weights that the step had already changed
            z = z - (share * (x @ seen.T)) @ g - share @ g
        x = gelu(z) if i < len(layers) - 1 else z
    return q + norm(x, weight, bias, 1e-8), new


def old_join(p: dict, x1: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """The stream behind the memory."""
    alpha = p["forward_ssm_gating.gating_alpha"].astype(np.float64)
    return x1 + np.tanh(np.clip(alpha, -3, 3)) * answer


# -- checkpoints -----------------------------------------------------------------------------------


def inner_names(old: Old) -> list[tuple[str, str]]:
    if old.depth == 2:
        return [(TTT + "W1", TTT + "b1"), (TTT + "W2", TTT + "b2")]
    return [(f"{TTT}weights.{i}", f"{TTT}biases.{i}") for i in range(old.depth)]


def memory_tensors(old: Old, seed: int) -> dict[str, np.ndarray]:
    """One layer's tensors, as if trained: nothing is zero or one."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=0.3, around=0.0):
        return (around + scale * rng.standard_normal(shape)).astype(np.float32)

    p = {}
    for n in "qkvo":
        p[f"{TTT}w{n}.weight"] = draw(WIDTH, WIDTH)
        p[f"{TTT}w{n}.bias"] = draw(WIDTH)
    p[TTT + "post_norm.weight"] = draw(WIDTH, around=1.0)
    p[TTT + "post_norm.bias"] = draw(WIDTH)
    p[TTT + "learnable_ttt_lr_weight"] = draw(HEADS, 1, WIDTH)
    p[TTT + "learnable_ttt_lr_bias"] = draw(HEADS, 1)
    p[TTT + "ttt_norm_weight"] = draw(HEADS, HEAD_DIM, around=1.0)
    p[TTT + "ttt_norm_bias"] = draw(HEADS, HEAD_DIM)
    for (w, b), n_in, n_out in zip(inner_names(old), old.sizes, old.sizes[1:], strict=False):
        p[w], p[b] = draw(HEADS, n_in, n_out), draw(HEADS, 1, n_out)
    p["forward_ssm_gating.gating_alpha"] = draw(WIDTH, scale=2.0)  # some beyond the clamp at 3
    p["backward_ssm_gating.gating_alpha"] = draw(WIDTH)
    return p


def training_config(old: Old, layers: str) -> dict:
    ttt = {
        "enable": True,
        "layers": layers,
        "base_lr": old.base_lr,
        "mini_batch_size": C,
        "initial_gating_alpha": 0.1,
        "ttt_mlp_layers": old.depth,
        "ttt_mlp_hidden_dims": list(old.sizes[1:-1]) if old.depth > 2 else None,
        "ttt_mlp_expansion_factor": 4.0,
        "use_rope": old.rope,
        "rope_theta": old.theta,
    }
    return {"ttt": ttt, "lora": {"enable": True, "rank": 4, "scaling": 2.0}}


def write_checkpoint(
    folder: Path,
    old: Old = Old(),
    layers: tuple[int, ...] = (1,),
    *,
    name: str = "lora.safetensors",
    more: dict[str, mx.array] | None = None,
    lm: dict | None = None,
) -> dict[int, dict[str, np.ndarray]]:
    """Write a checkpoint's three files; returns each layer's memory tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {i: memory_tensors(old, seed=i) for i in layers}
    tensors = {
        BLOCK.format(i) + n: mx.array(a) for i, part in parts.items() for n, a in part.items()
    }
    mx.save_safetensors(str(folder / name), tensors | (more or {}))
    (folder / "config.json").write_text(json.dumps(lm or lm_config()))
    training = training_config(old, ",".join(map(str, layers)))
    (folder / "training_config.json").write_text(json.dumps(training))
    return parts
