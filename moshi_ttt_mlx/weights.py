"""A weights file into a moshi_mlx `Lm`: both layouts, quantized or not, every mismatch named.

Safetensors only. A pickle (`.pt`, `.pth`, `.bin`) can run code when it is opened, so it is refused.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import safetensors
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm
from moshi_mlx.models.lm import ScaledEmbedding

from .errors import UserError

GROUP_SIZE = {4: 32, 8: 64}  # Kyutai's own choice for their q4 and q8 files
Shapes = dict[str, tuple[int, ...]]


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of a safetensors file, from its header alone.

    Raises:
        UserError: not a safetensors file, a truncated one, or a pickle.
    """
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise UserError(
            f"{path.name}: pickled weights can run code when opened and are refused; "
            "expected a .safetensors file"
        )
    if path.suffix != ".safetensors":
        raise UserError(f"{path.name}: expected a .safetensors file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise UserError(
            f"{path.name}: not a whole safetensors file ({size:,} bytes; {error}): "
            "download it again"
        ) from error


def expected_shapes(module: nn.Module) -> Shapes:
    """Names and shapes of a module's parameters; nothing is allocated."""
    return {name: tuple(array.shape) for name, array in tree_flatten(module.parameters())}


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def check_shapes(found: Shapes, expected: Shapes, where: str) -> None:
    """Every tensor there, none too many, all of the right shape.

    Raises:
        UserError: the first kind of mismatch, with the tensors' names (and shapes).
    """
    if missing := expected.keys() - found.keys():
        raise UserError(f"{where}: {len(missing)} tensors missing: {_listed(missing)}")
    if extra := found.keys() - expected.keys():
        raise UserError(
            f"{where}: {len(extra)} tensors do not belong to this model: {_listed(extra)}"
        )
    wrong = [n for n in expected if found[n] != expected[n]]
    if wrong:
        name = min(wrong)
        raise UserError(
            f"{where}: {len(wrong)} tensors of another shape: {name} is {list(found[name])}, "
            f"expected {list(expected[name])}: is this the config of these weights?"
        )


def can_quantize(path: str, module: nn.Module, group_size: int) -> bool:
    """Which modules quantization may replace without changing what they compute.

    MLX turns a `ScaledEmbedding` into a plain `QuantizedEmbedding`: the low-rank and the demuxed
    kind would lose their projections.
    """
    if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
        return False
    if isinstance(module, ScaledEmbedding):
        return module.low_rank is None and not module.demux_second_stream
    return True


def quantize(model: nn.Module, bits: int) -> None:
    """Quantize a loaded model in place, in Kyutai's format for these bits (4 or 8)."""
    group = GROUP_SIZE[bits]
    nn.quantize(model, group, bits, class_predicate=lambda p, m: can_quantize(p, m, group))


def _prepare_quantized(model: nn.Module, shapes: Shapes, where: str) -> None:
    """Replace just the modules that the file holds quantized; bits and group are read off shapes."""
    plain = expected_shapes(model)
    quantized = {name.removesuffix(".scales") for name in shapes if name.endswith(".scales")}
    if unknown := {p for p in quantized if f"{p}.weight" not in plain}:
        raise UserError(f"{where}: quantized tensors of no module here: {_listed(unknown)}")
    first = min(quantized)
    width = plain[f"{first}.weight"][-1]
    group = width // shapes[f"{first}.scales"][-1]
    bits = 32 * shapes[f"{first}.weight"][-1] // width
    if bits not in (2, 3, 4, 6, 8) or group not in (32, 64, 128):
        raise UserError(
            f"{where}: {first} looks like {bits} bits in groups of {group}, which MLX has not: "
            "is this the config of these weights?"
        )
    nn.quantize(model, group, bits, class_predicate=lambda p, m: p in quantized)


def _from_pytorch(path: Path, model: Lm) -> list[tuple[str, mx.array]]:
    """Kyutai's PyTorch names to moshi_mlx's, by moshi_mlx's own map."""
    collect = SimpleNamespace(load_weights=lambda items, strict: items)
    try:
        return Lm.load_pytorch_weights(collect, str(path), model.cfg)
    except KeyError as error:
        raise UserError(
            f"{path.name}: 1 tensor missing (PyTorch layout): {error.args[0]}"
        ) from error


def load_lm_weights(model: Lm, path: Path, bits: int | None = None) -> None:
    """Load a file into a freshly built model, strictly, and quantize where asked.

    Args:
        model: a new `Lm` of the file's config.
        path: MLX layout (plain, or quantized to any bits and group) or Kyutai's PyTorch layout.
        bits: quantize to 4 or 8 bits after loading; a file that is quantized already stays as it is.

    Raises:
        UserError: a broken file, or one that does not fit; the tensors are named.
    """
    shapes = read_shapes(path)
    if any(name.endswith(".scales") for name in shapes):
        _prepare_quantized(model, shapes, path.name)
        bits = None
    if "out_norm.alpha" in shapes:
        items = _from_pytorch(path, model)
        shapes = {name: tuple(array.shape) for name, array in items}
    else:
        items = list(mx.load(str(path)).items())
    check_shapes(shapes, expected_shapes(model), path.name)
    model.load_weights(items, strict=True)
    if bits:
        quantize(model, bits)
    mx.eval(model.parameters())
