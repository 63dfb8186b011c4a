"""Kyutai's PyTorch layout of a Moshi checkpoint: which tensors a file holds, and their shapes.

moshi_mlx's own loader does the renaming. It picks the tensors that it knows and ignores the rest, so
that a tensor too many is never noticed; for that the whole list is written down here.
"""

import re

from mlx.utils import tree_flatten
from moshi_mlx.models import Lm

Shapes = dict[str, tuple[int, ...]]


def is_pytorch(shapes: Shapes) -> bool:
    """Whether these are the tensors of a file in PyTorch's layout, whole or not."""
    return any(name.endswith((".alpha", ".in_proj_weight")) for name in shapes)


def pytorch_shapes(model: Lm) -> Shapes:
    """Names and shapes of the file that `Lm.load_pytorch_weights` reads into this model."""
    schedule, shapes = step_schedule(model), {}
    for name, array in tree_flatten(model.parameters()):
        name = step_name(name, schedule)
        name, shape = _norm_and_attention(name, tuple(array.shape))
        if re.match(r"depformer\..*\.self_attn\.", name):
            # The slices' own projections, one below the other.
            shape = ((max(schedule) + 1) * shape[0], *shape[1:])
        shapes[name] = shape
    return shapes


def step_schedule(model: Lm) -> list[int]:
    """For each slice of the depformer, the number of the weights that it uses."""
    slices = model.cfg.depformer
    return slices.weights_per_step_schedule or list(range(slices.num_slices))


def step_name(name: str, schedule: list[int]) -> str:
    """A depformer tensor's name by its step's weights; other names stay as they are."""
    if match := re.match(r"depformer\.slices\.(\d+)\.(.+)", name):
        return _slice_name(int(match[1]), schedule[int(match[1])], match[2])
    return name


def _norm_and_attention(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if re.search(r"(^out_norm|\.norm[12])\.weight$", name):
        return name.removesuffix("weight") + "alpha", (1, 1, *shape)
    name = re.sub(r"^audio_embs\.", "emb.", name)
    return name.replace(".in_proj.weight", ".in_proj_weight"), shape


def _slice_name(number: int, weights: int, name: str) -> str:
    """Slices may share weights; embeddings and heads are always a slice's own."""
    owner = f"depformer_emb.{number - 1}." if number else "depformer_text_emb."
    name = re.sub(r"^emb\.", owner, name)
    name = re.sub(r"^linear_in\.", f"depformer_in.{weights}.", name)
    name = re.sub(r"^linear_out\.", f"linears.{number}.", name)
    name = re.sub(r"^transformer\.", "depformer.", name)
    return name.replace(".gating.", f".gating.{weights}.")
