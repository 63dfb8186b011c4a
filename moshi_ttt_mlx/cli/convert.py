"""Convert PyTorch checkpoints: a Moshi-TTT memory to an adapter, LoRA into a base model."""

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="ttt|lora", required=True)
    _add_ttt(kinds)
    _add_lora(kinds)


def _add_ttt(kinds) -> None:
    ttt = kinds.add_parser("ttt", help="a PyTorch Moshi-TTT checkpoint to an adapter folder")
    ttt.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_DIR",
        type=Path,
        help="holds lora or consolidated.safetensors, config.json and training_config.json",
    )
    ttt.add_argument("out", metavar="OUT_DIR", type=Path, help="new folder, for --adapter-path")
    ttt.add_argument(
        "--post-norm",
        action="store_true",
        help="of a build with post_norm and wo behind the memory (late October 2025)",
    )
    ttt.add_argument(
        "--no-l2-norm",
        action="store_true",
        help="trained before the place_into fix: no L2 norm, no RoPE, another target",
    )
    ttt.add_argument(
        "--causal",
        action="store_true",
        help="many tokens at once as one by one; without it as trained, which looks ahead",
    )
    ttt.set_defaults(convert=_convert_ttt)


def _add_lora(kinds) -> None:
    lora = kinds.add_parser("lora", help="moshi-finetune's LoRA merged into a base model")
    lora.add_argument("--hf-repo", metavar="REPO|DIR", required=True, help="the base model")
    lora.add_argument("--lora", metavar="FILE", type=Path, required=True, help="lora.safetensors")
    lora.add_argument(
        "--scaling", type=float, help="of W + scaling B A (default: from the file's config.json)"
    )
    lora.add_argument("out", metavar="OUT_DIR", type=Path, help="new folder, for --hf-repo")
    lora.set_defaults(convert=_convert_lora)


def run(args: argparse.Namespace) -> None:
    console = Console(stderr=True)
    with console.status("converting") as status:
        lines = args.convert(args, status.update)
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _convert_ttt(args: argparse.Namespace, progress) -> list[str]:
    from ..convert import convert_ttt

    done = convert_ttt(
        args.checkpoint,
        args.out,
        post_norm=args.post_norm,
        l2_norm=not args.no_l2_norm,
        causal=args.causal,
        progress=progress,
    )
    count = len(done.config.layers)
    use = f"--adapter-path {args.out}"
    if done.base:
        use = f"--hf-repo {args.out} {use}"
    return [
        f"memory of {count} layers, {done.parameters:,} parameters: use it with {use}",
        *done.notes,
    ]


def _convert_lora(args: argparse.Namespace, progress) -> list[str]:
    from ..lora import merge_lora

    merged = merge_lora(args.hf_repo, args.lora, args.out, args.scaling, progress)
    return [f"{merged} weights merged: use them with --hf-repo {args.out}"]
