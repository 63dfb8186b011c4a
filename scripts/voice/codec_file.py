"""The small Mimi in PyTorch, of Kyutai's own modules: its shape, its way back to sound, its file."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .kokoro import SAMPLE_RATE


def mimi_config(units: int) -> dict:
    """Arguments of Kyutai's modules; `model.py` has the same shape for `config.json`.

    Args:
        units: residual ones of each layer of the encoder and the decoder.
    """
    dim = 192
    return {
        "channels": 1,
        "sample_rate": SAMPLE_RATE,
        "frame_rate": 12.5,
        "seanet": {
            "channels": 1,
            "dimension": dim,
            "causal": True,
            "n_filters": 16,
            "n_residual_layers": units,
            "activation": "ELU",
            "compress": 2,
            "dilation_base": 2,
            "disable_norm_outer_blocks": 0,
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 3,
            "norm": "none",
            "pad_mode": "constant",
            "ratios": [4, 5, 6, 8],
            "true_skip": True,
        },
        "quantizer": {
            "dimension": 64,
            "n_q": 8,
            "bins": 256,
            "decay": 0.98,
            # As Mimi: half of the time nothing is quantized.
            "no_quantization_rate": 0.5,
            "input_dimension": dim,
            "output_dimension": dim,
        },
        "transformer": {
            "d_model": dim,
            "num_heads": 6,
            "num_layers": 4,
            "causal": True,
            "layer_scale": 0.1,
            "context": 250,
            "conv_layout": True,
            "max_period": 10000,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": 4 * dim,
            "input_dimension": dim,
            "output_dimensions": [dim],
        },
    }


def decoded(mimi: nn.Module, latents: Tensor) -> Tensor:
    """Latents `[B, dim, frames]` as sound `[B, 1, N]`; with gradient, unlike Kyutai's `decode`."""
    return mimi.decoder(mimi.decoder_transformer(mimi.upsample(latents))[0])


# The published file is older than the modules: one projection for all codebooks.
_OLDER = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}


def save(mimi: nn.Module, path: Path, units: int) -> None:
    """In Kyutai's layout; half precision, which is more than the ear needs."""
    tensors = {}
    for name, tensor in mimi.state_dict().items():
        for new, old in _OLDER.items():
            name = name.replace(new, old)
        tensors[name] = tensor.contiguous().half()
    part = path.with_suffix(".part")
    save_file(tensors, part, {"config": json.dumps(mimi_config(units))})
    part.rename(path)


def load(mimi: nn.Module, path: Path) -> None:
    """The inverse of `save`; residual units that the file does not have add nothing at first."""
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, old in _OLDER.items():
            name = name.replace(f"self_attn.{old}", f"self_attn.{new}")
        tensors[name] = tensor.float()
    own = mimi.state_dict()
    if not any(".block." in name for name in tensors):
        places = _places(own)
        moved = dict(zip(_places(tensors), places, strict=True))
        tensors = {_moved(name, moved): tensor for name, tensor in tensors.items()}
        units = {name: tensor for name, tensor in own.items() if ".block." in name}
        last = {name: torch.zeros_like(t) for name, t in units.items() if ".block.3." in name}
        tensors |= units | last
    mimi.load_state_dict(tensors)


# Numbers of layers in a sequence, which residual units take part in: "encoder.model.3".
_PLACE = re.compile(r"(?:encoder|decoder)\.model\.(\d+)")


def _places(names: Iterable[str]) -> list[str]:
    """Places of all but residual units, in order."""
    found = {m[0]: int(m[1]) for n in names if ".block." not in n and (m := _PLACE.match(n))}
    return sorted(found, key=lambda place: (place.split(".")[0], found[place]))


def _moved(name: str, places: dict[str, str]) -> str:
    match = _PLACE.match(name)
    return places[match[0]] + name[match.end() :] if match else name
