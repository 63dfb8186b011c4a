"""Write a random Mimi checkpoint in Kyutai's layout: the codec is tested without a download.

    python scripts/make_mimi_checkpoint.py OUT.safetensors [--seed 0] [--config small|kyutai]

Its codes vary with the sound and its sound is neither silence nor NaN; it compresses nothing well.
"""

import argparse
import os
import re
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from moshi_mlx.models.mimi import Mimi, mimi_202407

from moshi_ttt_mlx.codec import small_mimi
from moshi_ttt_mlx.mimi_weights import kyutai_layout

CONFIGS = {"small": lambda: small_mimi(8), "kyutai": lambda: mimi_202407(32)}

# Factors on 1/sqrt(fan in), found by looking at the codes and the loudness that come out.
GAINS = {
    r"encoder\.model\.0\.": 8.0,  # speech is about 0.1 loud, latents about 1
    r"decoder\.model\.14\.": 0.03,  # the last one: sound about 0.1 loud again
    r"(en|de)coder\.model\.": 1.2,  # makes up for what ELU takes away
    r"quantizer\..*output_proj": 4.0,
}
LAYER_SCALE = 0.1


def gain(name: str) -> float:
    return next((g for pattern, g in GAINS.items() if re.match(pattern, name)), 1.0)


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("_initialized"):
        return np.ones(shape, np.float32)
    if name.endswith("cluster_usage"):
        return 0.5 + rng.random(shape, dtype=np.float32)
    if name.endswith("embedding_sum"):
        # The nearest of N random directions in D dimensions has about this cosine.
        return noise * np.sqrt(2 * np.log(shape[0]) / shape[1]).astype(np.float32)
    if name.endswith(".scale"):
        return LAYER_SCALE * (1 + 0.1 * noise)
    if re.search(r"norm\d\.weight", name):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    transposed = "convtr" in name and len(shape) == 3
    fan_in = (
        2 * shape[0] if transposed and shape[1] > 1 else 2 if transposed else np.prod(shape[1:])
    )
    return noise * (gain(name) / np.sqrt(fan_in)).astype(np.float32)


def write(path: Path, config: str, seed: int) -> None:
    """Write under a temporary name first: a half-written file never has the final name."""
    rng = np.random.default_rng(seed)
    layout = kyutai_layout(Mimi(CONFIGS[config]()))
    tensors = {name: mx.array(random_tensor(name, s.shape, rng)) for name, s in layout.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / "part.safetensors"
        mx.save_safetensors(str(part), tensors, {"config": config, "seed": str(seed)})
        os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", choices=CONFIGS, default="small")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    write(args.out, args.config, args.seed)


if __name__ == "__main__":
    main()
