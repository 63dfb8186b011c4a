"""A weights file into a moshi_mlx `Lm`: both layouts, quantized or not, every mismatch named.

Safetensors only. A pickle (`.pt`, `.pth`, `.bin`) can run code when it is opened, so it is refused.
"""

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import safetensors
from mlx import nn
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm

from .errors import UserError
from .pytorch_weights import Shapes, is_pytorch, pytorch_shapes

BITS, GROUPS = (2, 3, 4, 6, 8), (32, 64, 128)  # what MLX 0.26 can quantize to
GROUP_SIZE = {4: 32, 8: 64}  # Kyutai's own choice for their q4 and q8 files


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


def dense_weight(module: nn.Module) -> mx.array:
    """The weight of a linear layer, quantized or not, in float32."""
    if "scales" not in module:
        return module["weight"].astype(mx.float32)
    scales, biases = (module[name].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(module["weight"], scales, biases, module.group_size, module.bits)


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


def quantize_lazily(model: nn.Module, bits: int) -> None:
    """Make a model one of Kyutai's format for these bits (4 or 8), in place; nothing is computed yet.

    Layers whose width the groups do not fit stay as they are (moshi_mlx refuses such a model).
    """
    group = GROUP_SIZE[bits]

    def fits(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0

    nn.quantize(model, group, bits, class_predicate=fits)


def quantize(model: nn.Module, bits: int) -> None:
    """As `quantize_lazily`, and layer by layer: weights still on disk are read, quantized and let go
    one at a time."""
    quantize_lazily(model, bits)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)


def _quantized_as(shapes: Shapes, plain: Shapes, where: str) -> tuple[int, int]:
    """Bits and group size of a quantized file, read off the shapes of one of its layers."""
    path = min(name.removesuffix(".scales") for name in shapes if name.endswith(".scales"))
    weight, scales = (shapes.get(f"{path}.{part}", ()) for part in ("weight", "scales"))
    width = plain.get(f"{path}.weight", (0,))[-1]
    if width and all((weight, scales, *weight, *scales)):
        bits, group = 32 * weight[-1] // width, width // scales[-1]
        if bits in BITS and group in GROUPS:
            return bits, group
    raise UserError(
        f"{where}: the quantized layer {path} does not fit: weight {list(weight)} with scales "
        f"{list(scales)} for a width of {width}: is this the config of these weights?"
    )


def _prepare_quantized(model: nn.Module, shapes: Shapes, bits: int | None, where: str) -> int:
    """Replace just the modules that the file holds quantized; returns the file's bits."""
    held, group = _quantized_as(shapes, expected_shapes(model), where)
    if bits not in (None, held):
        raise UserError(
            f"{where} holds {held} bits already and cannot be made {bits}: leave out -q {bits}, or "
            "name weights that are not quantized"
        )
    quantized = {name.removesuffix(".scales") for name in shapes if name.endswith(".scales")}

    def is_held(path: str, module: nn.Module) -> bool:
        return path in quantized and hasattr(module, "to_quantized")

    nn.quantize(model, group, held, class_predicate=is_held)
    return held


def load_lm_weights(model: Lm, path: Path, bits: int | None = None) -> int | None:
    """Load a file into a freshly built model, strictly, and quantize where asked.

    Args:
        model: a new `Lm` of the file's config.
        path: MLX layout (plain, or quantized to any bits and group) or Kyutai's PyTorch layout.
        bits: quantize to 4 or 8 bits on load.

    Returns:
        The bits that the model has now, None if it is not quantized.

    Raises:
        UserError: a broken file, one that does not fit (the tensors are named), or one that is
            quantized to other bits than asked for.
    """
    shapes, held = read_shapes(path), None
    if is_pytorch(shapes):
        check_shapes(shapes, pytorch_shapes(model), f"{path.name} (PyTorch layout)")
        model.load_pytorch_weights(str(path), model.cfg, strict=True)
    else:
        if any(name.endswith(".scales") for name in shapes):
            held = _prepare_quantized(model, shapes, bits, path.name)
        check_shapes(shapes, expected_shapes(model), path.name)
        model.load_weights(str(path), strict=True)
    if bits and not held:
        quantize(model, bits)
    mx.eval(model.parameters())
    return held or bits
