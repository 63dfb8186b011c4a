"""Mimi's weights file: tensor names and shapes of Kyutai's checkpoints, for any Mimi config.

What lives here: the map between a file's tensors and `moshi_mlx.models.mimi.Mimi`, and strict
loading. What does not: running the codec (`mlx_codec.py`, `rusty_codec.py`).

moshi_mlx's own loader renames tensors with layer numbers written down for four ratios; here the map
is read off the module tree, so that smaller codecs load too and every wrong tensor is named.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from moshi_mlx.models.mimi import Mimi, MimiConfig

from .errors import UserError
from .weights import check_shapes, read_shapes


class Slot(NamedTuple):
    """Where one tensor of a file goes: `axes` turns the file's order of axes into moshi_mlx's."""

    parameter: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _block_number(name: str, residuals: int) -> str:
    """`encoder.layers.1.downsample` -> `encoder.model.6`: SEANet is one flat list in the file."""
    side, _, layer, kind, *inner = name.split(".")
    width = residuals + 2  # activation, (transposed) convolution and the residual blocks
    first = 1 + int(layer) * width
    if kind == "residuals":
        number, *inner = inner
        at = first + int(number) + (2 if side == "decoder" else 0)
        inner[1] = str(2 * int(inner[1]) + 1)  # block.0, block.1: an activation before each
    else:
        at = first + (1 if side == "decoder" else residuals + 1)
    return ".".join([side, "model", str(at), *inner])


def _file_name(name: str, cfg: MimiConfig) -> str:
    last = 1 + len(cfg.seanet.ratios) * (cfg.seanet.nresidual_layers + 2) + 1
    if re.match(r"(en|de)coder\.layers\.", name):
        return _block_number(name, cfg.seanet.nresidual_layers)
    name = re.sub(r"^((?:en|de)coder)\.init_conv1d", r"\1.model.0", name)
    name = re.sub(r"^((?:en|de)coder)\.final_conv1d", rf"\1.model.{last}", name)
    name = re.sub(r"\.gating\.(linear[12])\.", r".\1.", name)
    name = name.replace(".in_proj.weight", ".in_proj_weight")
    name = name.replace(".in_proj.bias", ".in_proj_bias")
    return name.replace(".codebook.initialized", "._codebook._initialized").replace(
        ".codebook.", "._codebook."
    )


def _axes(name: str, rank: int) -> tuple[int, ...]:
    if name.endswith(".convtr.weight"):
        return (1, 2, 0)  # file: in, out, kernel
    if rank == 3:
        return (0, 2, 1)  # file: out, in, kernel
    return tuple(range(rank))


def kyutai_layout(mimi: Mimi) -> dict[str, Slot]:
    """Every tensor a checkpoint of this codec has.

    Returns:
        Name in the file -> `Slot(parameter name, shape in the file, axes)`.
    """
    layout = {}
    for parameter, value in tree_flatten(mimi.parameters()):
        axes = _axes(parameter, value.ndim)
        shape = tuple(value.shape[axes.index(i)] for i in range(value.ndim))
        layout[_file_name(parameter, mimi.cfg)] = Slot(parameter, shape, axes)
    return layout


def _is_spare(name: str) -> bool:
    # Kyutai's file has 32 codebooks, a model uses the first 8 or 16.
    return name.startswith("quantizer.rvq_rest.vq.layers.")


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"codec weights: no file {path}; give Mimi's .safetensors file")
    return path


def load_mimi_weights(mimi: Mimi, path: str | Path) -> None:
    """Fill a moshi_mlx `Mimi` from a checkpoint in Kyutai's layout, as float32.

    Raises:
        UserError: no such file, not a whole safetensors file, or tensors that do not fit, by name.
    """
    path = _existing(path)
    layout = kyutai_layout(mimi)
    found = {n: s for n, s in read_shapes(path).items() if n in layout or not _is_spare(n)}
    check_shapes(found, {name: slot.shape for name, slot in layout.items()}, path.name)
    tensors = mx.load(str(path))
    weights = [
        (slot.parameter, tensors[name].astype(mx.float32).transpose(slot.axes))
        for name, slot in layout.items()
    ]
    mimi.load_weights(weights, strict=True)
    for module in mimi.modules():
        if hasattr(module, "update_in_place"):  # tables derived from weights: codebooks, upsampling
            module.update_in_place()
    mx.eval(mimi.parameters())


def fingerprint(path: str | Path) -> str:
    """A short name for a weights file's content: its size and a hash of pieces from all over it.

    4 MB are read of any file. A file of up to 4 MB is read whole; of a larger one a change in a
    256th of its bytes in a row is seen, so two fine-tunes of one model are told apart.

    Raises:
        UserError: no such file.
    """
    path = _existing(path)
    size, pieces, length = path.stat().st_size, 256, 1 << 14
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for at in range(0, size, max(length, size // pieces)):
            file.seek(at)
            digest.update(file.read(length))
    return f"{size}-{digest.hexdigest()[:16]}"
