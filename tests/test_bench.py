"""The bench verb's contract, and the counter that the "one host read" claims stand on."""

import json
import subprocess
import sys
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from tiny import SMALL

from moshi_ttt_mlx import bench, bench_chunked, generate
from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.ttt import TTTLinear

KEYS = {
    "ratio",
    "host_reads_per_frame",
    "moshi_mlx_host_reads_per_frame",
    "flat_ratio",
    "growth_bytes",
    "frame_ms_p50",
    "frame_ms_p95",
}


def small_lm(**sizes):
    return bench.tiny_lm(**{"layers": 1, "dim": 32, "codebooks": 2, "depformer_layers": 1, **sizes})


# -- the counter ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda: mx.array(3).item(),
        lambda: mx.array([1, 2]).tolist(),
        lambda: bool((mx.array([1, 2]) == 1).any()),
        lambda: 1 if mx.array(1) else 0,
        lambda: int(mx.array(3)),
        lambda: float(mx.array(3.0)),
        lambda: str(mx.array(3)),
        lambda: f"{mx.array(3)}",
        lambda: np.array(mx.array([1, 2])),
        lambda: np.asarray(mx.array([1, 2]), dtype=np.int64),
        lambda: np.array([mx.array(1)]),
        lambda: mx.eval(mx.array(1) + 1),
    ],
)
def test_each_way_to_read_counts_once(read):
    with bench.HostReads() as reads:
        read()
    assert reads.count == 1


def test_reads_add_up():
    with bench.HostReads() as reads:
        np.stack([mx.array([1, 2]), mx.array([3, 4])])
        for row in mx.array([[1, 2], [3, 4]]):
            row[0].item()
    assert reads.count == 4


def test_work_that_stays_on_the_device_is_free():
    with bench.HostReads() as reads:
        xs = mx.array(np.array([1, 2])) + mx.arange(2)
        ys = mx.where(xs == 1, xs, -xs)[None].reshape(2, 1)
        mx.async_eval(ys)
        np.array([1, 2])
        assert len(ys) == 2 and ys.shape == (2, 1)
    assert reads.count == 0


def test_nothing_counts_outside_and_nothing_stays_patched():
    before = dict(vars(mx.array)), np.array, np.asarray, mx.eval
    with pytest.raises(ValueError, match="inside"), bench.HostReads() as reads:
        raise ValueError("inside")
    mx.array(1).item()
    assert reads.count == 0
    assert (dict(vars(mx.array)), np.array, np.asarray, mx.eval) == before


def test_results_are_what_they_were():
    with bench.HostReads():
        assert mx.array(3).item() == 3
        assert np.array_equal(np.array(mx.array([1, 2])), [1, 2])
        assert not mx.array(0)


# -- the generators -------------------------------------------------------------------------------


def test_our_generator_reads_once_a_frame_and_moshi_mlx_21_times():
    lm = small_lm(codebooks=8)
    stock = bench.twin(lm)
    codes = bench.user_codes(lm)
    ours = bench.our_loop(bench.our_generator(lm))
    theirs = bench.moshi_mlx_loop(bench.moshi_mlx_generator(stock))
    for loop in (ours, theirs):
        bench._run(loop, codes, 2)
    assert bench.host_reads(ours, codes) == 1
    # 17 checks for ungenerated tokens, two in `last_audio_tokens`, `.item()` and `np.array`.
    assert bench.host_reads(theirs, codes) == 21


def test_an_extra_read_in_the_frame_is_noticed(monkeypatch):
    lm = small_lm()
    loop = bench.our_loop(bench.our_generator(lm))
    codes = bench.user_codes(lm)
    loop(next(codes))
    written = generate.FrameGenerator._written

    def with_a_check(self):
        assert not (self.history == generate.UNGENERATED).any()
        return written(self)

    monkeypatch.setattr(generate.FrameGenerator, "_written", with_a_check)
    assert bench.host_reads(loop, codes) == 2


def test_twin_shares_weights_and_keeps_its_own_attention():
    lm = small_lm()
    stock = bench.twin(lm)
    bench.our_generator(lm)
    assert stock.text_linear.weight is lm.text_linear.weight
    assert type(stock.transformer.layers[0].self_attn).__module__.startswith("moshi_mlx")
    assert type(lm.transformer.layers[0].self_attn).__module__.startswith("moshi_ttt_mlx")
    assert stock.transformer_cache[0] is not lm.transformer_cache[0]


def test_a_text_model_is_refused():
    lm = small_lm()
    lm.cfg.audio_delays = []
    with pytest.raises(UserError, match="audio streams"):
        bench.compare_with_moshi_mlx(lm)


# -- measures -------------------------------------------------------------------------------------


def test_graph_nodes_counts_operations_between_evaluated_arrays():
    x = mx.array([1.0, 2.0])
    y = mx.exp(x) + x
    assert bench.graph_nodes(y) == 2
    mx.eval(y)
    assert bench.graph_nodes(mx.sin(y)) == 1


def test_process_bytes_sees_memory_in_use():
    # In a process of its own: in this one, threads of earlier tests come and go with their memory.
    program = """
import mmap
from moshi_ttt_mlx.bench import process_bytes
held = mmap.mmap(-1, 64 << 20)  # the allocator may have as much at hand
before = process_bytes()
held.write(b"x" * (64 << 20))
print(process_bytes() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # All of it was written, so it is resident.
    assert 0.95 < int(run.stdout) / (64 << 20) < 1.05


def test_interleave_takes_turns_and_stops():
    turns = []
    loops = {name: lambda codes, name=name: turns.append(name) for name in "ab"}
    times = bench.interleave(loops, iter(range(100)), np.inf, most=6, block=3)
    assert "".join(turns) == "aaabbbaaabbb"
    assert [len(times[name]) for name in "ab"] == [6, 6]
    # No time left: still one round.
    assert len(bench.interleave(loops, iter(range(100)), -1.0, most=50, block=3)["a"]) == 3


def test_same_frames_stops_counting_at_the_first_difference():
    def loop(wrong_at):
        frames = iter(range(100))

        def frame(codes):
            i = next(frames)
            return np.array([i == wrong_at]), None

        return frame

    codes = iter(range(100))
    assert bench._same_frames({"a": loop(-1), "b": loop(-1)}, codes, 5) == 5
    assert bench._same_frames({"a": loop(-1), "b": loop(3)}, codes, 5) == 3


def test_memory_that_a_loop_keeps_is_growth(monkeypatch):
    kept = []
    plain = bench.our_loop

    def leaking(generator):
        loop = plain(generator)

        def frame(codes):
            kept.append(mx.ones(1 << 16))
            mx.eval(kept[-1])
            return loop(codes)

        return frame

    monkeypatch.setattr(bench, "our_loop", leaking)
    grown = bench.endure(small_lm(context=8), early=20, late=60, timed=10)
    # From the end of the timed frames to frame `late`, 256 KiB each.
    assert grown["mlx_growth_bytes"] > 29 * (1 << 18)  # a few bytes of others may go meanwhile


def test_flat_without_a_leak():
    grown = bench.endure(small_lm(context=8), early=20, late=60, timed=10)
    # The state has a fixed size; a frame's own arrays are those of some hundred operations at most.
    assert grown["mlx_growth_bytes"] < 1 << 18


# -- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """The verb with less of everything."""
    compare, endure = bench.compare_with_moshi_mlx, bench.endure
    lm = small_lm(context=8)
    monkeypatch.setattr(bench, "tiny_lm", lambda **sizes: lm)
    monkeypatch.setattr(
        bench, "compare_with_moshi_mlx", lambda lm: compare(lm, seconds=0.0, warm_up=10)
    )
    asked = {}

    def short(lm, late, progress):
        asked["late"] = late
        return endure(lm, early=12, late=24, timed=10, progress=progress)

    monkeypatch.setattr(bench, "endure", short)
    few = bench_chunked.learner_case("few", TTTLinear(1, 4), 20)
    monkeypatch.setattr(bench_chunked, "cases", lambda lm: [few])
    return asked


def test_json_is_all_of_stdout(quick, capsys):
    assert main(["bench", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= KEYS
    assert all(isinstance(result[key], int | float) for key in KEYS)
    assert result["host_reads_per_frame"] == 1
    assert result["same_tokens_frames"] == 8
    assert result["chunked"][0]["tokens"] == 20 and result["chunked"][0]["ratio"] > 0
    assert quick["late"] == 10_000


def test_table_first_json_last(quick, capsys):
    assert main(["bench", "--long"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert "moshi_mlx" in "\n".join(table) and "few" in "\n".join(table)
    assert json.loads(last).keys() >= KEYS
    assert quick["late"] == 100_000


def test_bench_of_a_named_model(quick, capsys):
    assert main(["bench", "--json", "--model", SMALL]) == 0
    assert json.loads(capsys.readouterr().out)["host_reads_per_frame"] == 1


def test_user_codes_are_codes():
    lm = small_lm()
    frames = list(islice(bench.user_codes(lm), 3))
    assert all(f.shape == (1, 2) and f.min() >= 0 and f.max() < 256 for f in frames)
