"""Measure the frame loop beside moshi_mlx's on this machine.

Without a model: a tiny seeded one in float32, made on the spot. The last line of stdout is one JSON
object; progress goes to stderr.
"""

import argparse
import json

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from .common import add_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="nothing but the JSON on stdout")
    parser.add_argument("--long", action="store_true", help="to frame 100,000 instead of 10,000")
    # Without an adapter a memory of the bench's own is put into the model.
    add_model_arguments(parser, default="a tiny seeded one")


def run(args: argparse.Namespace) -> int:
    from .. import bench, bench_chunked, bench_memory, lanes

    console = Console(stderr=True)
    compared, enduring = _models(args, console)
    with console.status("frame time beside moshi_mlx") as status:
        result = bench.compare_with_moshi_mlx(compared)
        late = 100_000 if args.long else 10_000
        result |= bench.endure(enduring, late=late, progress=status.update)
        status.update("frame time with a memory in half the layers")
        result |= bench_memory.compare_with_memory(compared)
        status.update("many tokens at once")
        result |= bench_chunked.compare_chunked(bench.tiny_lm())
    result["machine"] = lanes.describe()
    if not args.json:
        for table in _tables(result):
            Console().print(table)
    print(json.dumps(result))
    return 0


def _models(args: argparse.Namespace, console: Console):
    """The model to compare, and the one for the long run (a smaller one if none is named)."""
    from ..bench import tiny_lm

    if any((args.hf_repo, args.moshi_weight, args.lm_config, args.quantized)):
        lm = load_model(args, console).lm
        return lm, lm
    if args.adapter_path:
        raise UserError("bench --adapter-path: name the model that the adapter belongs to")
    return tiny_lm(), tiny_lm(layers=1, codebooks=2, depformer_layers=1)


def _tables(result: dict) -> list[Table]:
    beside = Table("", "p50 ms", "p95 ms", "host reads", "graph nodes", title="One frame")
    for name, prefix in (("moshi-ttt-mlx", ""), ("moshi_mlx", "moshi_mlx_")):
        times = [f"{result[f'{prefix}frame_ms_p{p}']:.2f}" for p in (50, 95)]
        counts = [
            f"{result[f'{prefix}{key}_per_frame']:g}" for key in ("host_reads", "graph_nodes")
        ]
        beside.add_row(name, *times, *counts)
    beside.add_row("ratio", f"{result['ratio']:.2f}", style="bold")
    along = Table("frame", "p50 ms", "grown by", title="One long talk")
    along.add_row(f"{result['early_frame']:,}", f"{result['early_frame_ms_p50']:.2f}", "")
    grown = f"{result['growth_bytes'] / 2**20:.1f} MiB"
    along.add_row(f"{result['late_frame']:,}", f"{result['late_frame_ms_p50']:.2f}", grown)
    along.add_row("ratio", f"{result['flat_ratio']:.2f}", style="bold")
    return [beside, along, *_memory_tables(result)]


def _memory_tables(result: dict) -> list[Table]:
    times = Table("", "p50 ms", title="One frame with a memory in half the layers")
    times.add_row("memory on", f"{result['memory_frame_ms_p50']:.2f}")
    times.add_row("/ moshi_mlx without", f"{result['memory_ratio']:.2f}", style="bold")
    times.add_row("/ memory off", f"{result['memory_on_off_ratio']:.2f}")
    titles = ("keys and values", "with memory", "memory's state", "adapter", "of the model")
    costs = Table("", *titles, title="Bytes of one talk (computed from shapes)")
    for row in result["memory_costs"]:
        sizes = [row["kv_bytes"], row["kv_bytes_with_memory"], row["state_bytes"]]
        adapter = f"{row['adapter_parameters'] / 1e6:.1f} M"
        share = f"{100 * row['adapter_share']:.2f} %"
        costs.add_row(row["name"], *(f"{n / 1e6:,.1f} MB" for n in sizes), adapter, share)
    return [times, costs, _chunked_table(result)]


def _chunked_table(result: dict) -> Table:
    titles = ("tokens", "one a call", "all at once", "ratio", "peak", "peak at once")
    table = Table("tokens a second", *titles, title="The memory's chunked form (C = 16)")
    for row in result["chunked"]:
        speeds = [f"{row[name]:,.0f}" for name in ("streaming", "chunked")]
        peaks = [f"{row[f'{name}_peak'] / 1e6:,.1f} MB" for name in ("streaming", "chunked")]
        table.add_row(row["name"], str(row["tokens"]), *speeds, f"{row['ratio']:.1f}", *peaks)
    return table
