"""The memory section of the bench: its keys, and bytes that are those of real arrays."""

import mlx.core as mx
from moshi_mlx.models import config_v0_1

from moshi_ttt_mlx.bench import tiny_lm, twin
from moshi_ttt_mlx.bench_memory import compare_with_memory, cost_table, costs, half_the_layers
from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.layers import MemoryAttention, make_memory_cache
from moshi_ttt_mlx.memory import MemoryConfig
from moshi_ttt_mlx.surgery import add_memory


def test_a_very_short_run_has_all_keys():
    lm = tiny_lm(layers=2, dim=32, codebooks=2, depformer_layers=1, context=20)
    result = compare_with_memory(lm, seconds=0.0, warm_up=30)
    assert result["memory_ratio"] > 0 and result["memory_on_off_ratio"] > 0
    assert result["memory_report"][1]["updates"] >= 2
    assert result["memory_costs"][0]["name"] == "tiny"


def test_a_memory_that_is_there_is_the_one_timed():
    lm = tiny_lm(layers=2, dim=32, codebooks=2, depformer_layers=1, context=20)
    adapter = add_memory(lm, MemoryConfig(layers=(0,), heads=2, head_dim=8, mini_batch=4))
    adapter.memories[0].gate = mx.full((4, 1, 1), 0.5)
    result = compare_with_memory(lm, seconds=0.0, warm_up=30)
    assert list(result["memory_report"]) == [0]
    assert result["memory_report"][0]["gate"] == 0.5


def test_an_adapter_without_its_model_is_refused(capsys):
    assert main(["bench", "--adapter-path", "somewhere"]) == 2
    assert "name the model that the adapter belongs to" in capsys.readouterr().err


def test_moshi_mlx_is_timed_without_a_memory():
    lm = tiny_lm(layers=2, dim=32, codebooks=2, depformer_layers=1)
    add_memory(lm, half_the_layers(lm.cfg))
    stock = twin(lm)
    assert isinstance(lm.transformer.layers[1].self_attn, MemoryAttention)
    assert [type(x.self_attn).__name__ for x in stock.transformer.layers] == ["Attention"] * 2
    ours = lm.transformer.layers[0].self_attn.in_proj.weight
    assert mx.array_equal(stock.transformer.layers[0].self_attn.in_proj.weight, ours)


def test_computed_bytes_are_those_of_arrays():
    lm = tiny_lm(layers=2, dim=32, codebooks=2, depformer_layers=1, context=300)
    memory = half_the_layers(lm.cfg, window=40, head_dim=8)
    row = costs("x", lm.cfg, memory, 4)
    adapter = add_memory(lm, memory)
    caches = make_memory_cache(lm.transformer, closed_too=True)
    for i in range(7):
        mx.eval(lm.transformer(mx.random.normal((1, 50, 32), key=mx.random.key(i)), cache=caches))
    first, second = (c.self_attn.state for c in caches)
    held = {n: a.nbytes for n, a in second.items()}
    keys_and_values = sum(a.nbytes for a in first.values()) + held.pop("keys") + held.pop("values")
    assert row.kv_bytes_with_memory == keys_and_values
    assert row.state_bytes == sum(held.values())
    assert row.adapter_parameters == adapter.num_parameters()


def test_an_adapter_for_7b_can_stay_under_one_percent():
    before = mx.get_active_memory()
    rows = cost_table(config_v0_1())
    assert mx.get_active_memory() - before < 1 << 20  # computed, not allocated
    half = next(row for row in rows if row.name == "Moshi 7B, 16 layers")
    assert half.adapter_share < 0.01
    assert half.kv_bytes == 3000 * 32 * 2 * 4096 * 2  # frames, layers, key and value, width, bytes
