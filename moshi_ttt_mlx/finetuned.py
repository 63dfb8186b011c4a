"""What moshi-finetune's and Moshi-TTT's PyTorch files call their tensors, and new folders of ours.

What lives here: from their names to those of Kyutai's own PyTorch layout (`pytorch_weights.py`), and
writing a folder whole or not at all. What does not: what the tensors mean (`convert.py`, `lora.py`).
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

MEMORY_PART = re.compile(r"^transformer\.layers\.(\d+)\.seq_modeling_block\.(.+)$")
STEP_PART = re.compile(r"^(.+\.self_attn\.)(in|out)_projs\.(\d+)\.weight$")
LORA_PART = re.compile(r"^(.+)\.lora_([AB])\.weight$")


def base_name(name: str) -> str | None:
    """A tensor's name in Kyutai's layout; None for a memory's own and for LoRA's two factors.

    A layer with a memory wraps the base layer as `original_layer`, which may show up a second time
    inside the memory's block; a layer with LoRA keeps the base weight as `frozen_W`.
    """
    if LORA_PART.match(name):
        return None
    name = name.replace(".seq_modeling_block.original_layer.", ".original_layer.")
    if MEMORY_PART.match(name):
        return None
    name = name.replace(".original_layer.", ".").replace(".frozen_W.", ".")
    return name.replace(".self_attn.in_proj.weight", ".self_attn.in_proj_weight")


def stacked_name(name: str) -> tuple[str, int] | None:
    """For the projection of one depformer step: the tensor that holds all steps, and its number."""
    match = STEP_PART.match(name)
    if match is None:
        return None
    part = "in_proj_weight" if match[2] == "in" else "out_proj.weight"
    return match[1] + part, int(match[3])


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` once all is written.

    Raises:
        UserError: `out` holds something already, or cannot be made or written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new or empty folder")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's own is the owner's alone
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write {out}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_config(folder: Path, config: dict) -> None:
    """Write a model's `config.json`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
