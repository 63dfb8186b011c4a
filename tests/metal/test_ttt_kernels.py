"""The memory's Metal kernels against their twins in ops: in the emulator, and on a Mac where there
is one. Then who uses which, and that they can be traced."""

import logging
import math
from dataclasses import replace

import metal_emulator
import mlx.core as mx
import pytest

from moshi_ttt_mlx import ttt, ttt_kernels
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.ttt import TTTMLP, Rules, TTTLinear

# float32: both sides sum up to 512 products, in another order; 2e-5 is what the project asks for.
TOLERANCE = 2e-5

NAMES = {"linear": lambda f: (f,), "mlp": lambda f: (4 * f, f)}


def same(found, wanted, tolerance=TOLERANCE):
    """Every array of two results, to a tolerance relative to the entries or to 1."""
    for a, b in zip(ttt_kernels._flat(found), ttt_kernels._flat(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == mx.float32
        assert mx.all(mx.abs(a - b) <= tolerance * (1 + mx.abs(b))), mx.max(mx.abs(a - b))


def sample(rules, heads, widths, batch=1):
    """Random arguments of a step; rows of a batch differ."""
    params, weights, rows, tokens, place = ttt_kernels._sample(rules, heads, widths)
    scales = mx.arange(1, batch + 1).reshape(-1, 1, 1, 1) / batch
    weights, rows, tokens = (
        {name: scales * a for name, a in group.items()} for group in (weights, rows, tokens)
    )
    return params, weights, rows, tokens, place


# -- in the emulator ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["plain", "standardized"])
@pytest.mark.parametrize("inner", NAMES)
@pytest.mark.parametrize("f", [32, 64, 128])
def test_step_is_its_twin(on_metal, f, inner, target):
    rules = Rules(target=target)
    args = sample(rules, 2, NAMES[inner](f))
    same(ttt_kernels.metal_step(rules, *args), ttt._piece(rules, *args))


@pytest.mark.parametrize("inner", NAMES)
@pytest.mark.parametrize("f", [32, 64, 128])
def test_fold_is_its_twin(on_metal, f, inner):
    rules = Rules()
    args = sample(rules, 2, NAMES[inner](f))[:3]
    same(ttt_kernels.metal_fold(rules, *args), ttt._fold(rules, *args))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("inner", NAMES)
def test_narrow_activations_are_widened_exactly(on_metal, inner, dtype):
    """State and answers are float32 whatever comes in, so nothing is lost beyond the input."""
    rules = Rules()
    *args, tokens, place = sample(rules, 2, NAMES[inner](64))
    narrow = {name: a.astype(dtype) for name, a in tokens.items()}
    wide = {name: a.astype(mx.float32) for name, a in narrow.items()}
    found = ttt_kernels.metal_step(rules, *args, narrow, place)
    same(found, ttt._piece(rules, *args, wide, place))


@pytest.mark.parametrize(
    ("widths", "c", "batch"), [((96, 32), 5, 3), ((32, 32), 64, 1), ((64, 64), 1, 2), ((32,), 5, 3)]
)
def test_other_widths_mini_batches_and_batches(on_metal, widths, c, batch):
    rules = Rules(mini_batch=c)
    *args, _ = sample(rules, 3, widths, batch)
    for place in {0, c // 3, c - 1}:
        found = ttt_kernels.metal_step(rules, *args, mx.array(place))
        same(found, ttt._piece(rules, *args, place))
    same(ttt_kernels.metal_fold(rules, *args[:3]), ttt._fold(rules, *args[:3]))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_step": 0.01},
        {"bound": 0.05},
        {"max_step": 0.3, "bound": 0.05},
        {"max_step": math.inf, "bound": math.inf},
    ],
    ids=str,
)
def test_limits_of_a_fold(on_metal, limits):
    rules = Rules(**limits)
    args = sample(rules, 2, (128, 32))[:3]
    free = ttt._fold(Rules(max_step=math.inf, bound=math.inf), *args)
    wanted = ttt._fold(rules, *args)
    binding = math.inf not in limits.values()
    assert binding != mx.array_equal(free[0]["W1"], wanted[0]["W1"]).item()
    same(ttt_kernels.metal_fold(rules, *args), wanted)


def test_rows_after_the_token_count_for_nothing(on_metal):
    """The caller keeps them zero; a kernel that reads them would not notice."""
    rules = Rules(mini_batch=8)
    params, weights, rows, tokens, _ = sample(rules, 2, (64, 32))
    later = mx.arange(8)[:, None] > 3
    spoiled = {name: mx.where(later, 1e6, a) for name, a in rows.items()}
    clean = {name: mx.where(later, 0, a) for name, a in rows.items()}
    place = mx.array(3)
    out, kept = ttt_kernels.metal_step(rules, params, weights, spoiled, tokens, place)
    same((out,), ttt._piece(rules, params, weights, clean, tokens, place)[:1])
    assert all(mx.array_equal(kept[n][:, :, 4:], spoiled[n][:, :, 4:]) for n in kept)


def talk(learner, tokens, seed=0):
    """Feed tokens one by one as FrameGenerator does; answers and the last state."""
    state, key = learner.init_state(2), mx.random.key(seed)
    c, outs = learner.rules.mini_batch, []
    for t in range(tokens):
        q, k, v = mx.random.normal((3, 2, 2, 1, 32), key=mx.random.split(key, tokens)[t])
        rate = mx.full((2, 2, 1), 0.1)
        out, state = learner.trace(q, k, v, rate, state, mx.array(state.tokens % c))
        state = learner.advance(state)
        outs.append(out)
    return mx.concatenate(outs, axis=2), state


@pytest.mark.parametrize("inner", [TTTMLP, TTTLinear])
def test_a_talk_by_kernels_is_a_talk_by_ops(on_metal, monkeypatch, inner):
    mx.random.seed(0)
    sizes = (2, 32, 64) if inner is TTTMLP else (2, 32)
    learner = inner(*sizes, Rules(mini_batch=4))
    out, state = talk(learner, 9)
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "ops")
    want, after = talk(learner, 9)
    assert (state.tokens, state.updates) == (9, 2) == (after.tokens, after.updates)
    # Nine tokens and two folds carry the rounding of the first on.
    same((out, state.arrays()), (want, after.arrays()), 10 * TOLERANCE)


# -- which one runs -------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """A `metal_step` that is ops and keeps count, on a machine that believes in Metal."""
    calls = []

    def metal_step(*args):
        calls.append(args)
        return ttt._piece(*args)

    monkeypatch.setattr(ttt_kernels, "_on_metal", lambda: True)
    monkeypatch.setattr(ttt_kernels, "metal_step", metal_step)
    monkeypatch.delenv("MOSHI_TTT_KERNEL", raising=False)
    ttt_kernels._agrees.cache_clear()
    yield calls
    ttt_kernels._agrees.cache_clear()


def test_ops_where_there_is_no_metal(monkeypatch):
    monkeypatch.setattr(ttt_kernels, "_on_metal", lambda: False)
    rules = Rules()
    args = sample(rules, 2, (64, 32))
    assert ttt_kernels.step(lambda *a: a, rules, *args) == (rules, *args)
    assert ttt_kernels.fold(lambda *a: a, rules, *args[:3]) == (rules, *args[:3])


def test_kernel_on_metal_after_one_check(stand_in):
    rules = Rules()
    args = sample(rules, 2, (64, 32))
    for _ in range(3):
        ttt_kernels.step(ttt._piece, rules, *args)
    assert len(stand_in) == 1 + 3


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False},
        {"tau": "mean"},
        {"read_gain": 2},
        {"forget": "init"},
        {"mini_batch": 65},
    ],
    ids=str,
)
def test_other_rules_stay_with_ops(change):
    weights = sample(Rules(), 2, (64, 32))[1]
    assert ttt_kernels.fits(Rules(), weights)
    assert not ttt_kernels.fits(replace(Rules(), **change), weights)


@pytest.mark.parametrize("widths", [(16,), (48, 32), (160, 32), (64, 64, 32), (256,)])
def test_other_widths_stay_with_ops(widths):
    assert not ttt_kernels.fits(Rules(), sample(Rules(), 2, widths)[1])


def test_other_precision_stays_with_ops():
    weights = {n: a.astype(mx.float16) for n, a in sample(Rules(), 2, (32,))[1].items()}
    assert not ttt_kernels.fits(Rules(), weights)


def test_a_kernel_that_is_wrong_gives_way_with_one_warning(stand_in, monkeypatch, caplog):
    right = ttt_kernels.metal_step

    def metal_step(*args):
        out, rows = right(*args)
        return 1.01 * out, rows

    monkeypatch.setattr(ttt_kernels, "metal_step", metal_step)
    rules = Rules()
    args = sample(rules, 2, (64, 32))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out, _ = ttt_kernels.step(ttt._piece, rules, *args)
    assert [r.message for r in caplog.records] == [
        "memory: the Metal kernel metal_step is not used: its numbers are not those of plain ops"
    ]
    assert mx.array_equal(out, ttt._piece(rules, *args)[0])


def test_a_kernel_that_is_not_finite_gives_way(stand_in, monkeypatch):
    monkeypatch.setattr(
        ttt_kernels, "metal_step", lambda *a: (math.nan * a[4]["q"], ttt._piece(*a)[1])
    )
    assert not ttt_kernels._agrees(ttt_kernels.metal_step, ttt._piece, Rules(), 2, (32,))


def test_a_kernel_that_does_not_build_gives_way(stand_in, monkeypatch, caplog):
    def metal_step(*args):
        raise RuntimeError("[metal::Device] Unable to build metal library\nmore")

    monkeypatch.setattr(ttt_kernels, "metal_step", metal_step)
    rules = Rules()
    args = sample(rules, 2, (32,))
    out, _ = ttt_kernels.step(ttt._piece, rules, *args)
    assert mx.array_equal(out, ttt._piece(rules, *args)[0])
    assert "Unable to build metal library" in caplog.text and "more" not in caplog.text


def test_the_check_leaves_the_random_state_alone(stand_in):
    mx.random.seed(3)
    want = mx.random.uniform().item()
    mx.random.seed(3)
    ttt_kernels._agrees(ttt_kernels.metal_step, ttt._piece, Rules(), 2, (32,))
    assert mx.random.uniform().item() == want


def test_the_check_may_come_while_a_step_is_traced(stand_in):
    learner = TTTLinear(2, 32)
    state = learner.init_state(1)

    def answer(q, place):
        return learner.trace(q, q, q, mx.ones((1, 2, 1)), state, place)[0]

    q = mx.random.normal((1, 2, 1, 32))
    same((mx.compile(answer)(q, mx.array(0)),), (answer(q, mx.array(0)),))
    assert stand_in


def test_override(stand_in, monkeypatch):
    rules = Rules()
    args = sample(rules, 2, (32,))
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "ops")
    ttt_kernels.step(ttt._piece, rules, *args)
    assert not stand_in
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "metal")
    ttt_kernels.step(ttt._piece, rules, *args)
    assert len(stand_in) == 1  # no check before it


def test_override_refuses_other_words(monkeypatch):
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "cuda")
    with pytest.raises(UserError, match="ops or metal"):
        ttt_kernels.step(ttt._piece, Rules(), *sample(Rules(), 2, (32,)))


def test_override_refuses_metal_where_there_is_none(monkeypatch):
    monkeypatch.setattr(ttt_kernels, "_on_metal", lambda: False)
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "metal")
    with pytest.raises(UserError, match="use ops"):
        ttt_kernels.step(ttt._piece, Rules(), *sample(Rules(), 2, (32,)))


def test_a_step_can_be_traced(emulator, monkeypatch, tmp_path):
    """MLX builds no kernel without a GPU, but `mx.export_function` traces one with array inputs."""
    monkeypatch.setattr(ttt_kernels, "_on_metal", lambda: True)
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "metal")
    ttt_kernels._kernel.cache_clear()
    learner = TTTMLP(2, 32, 64)
    state = learner.init_state(1)
    shapes = {name: a.shape for name, a in state.arrays().items()}

    def step(q, lr, place, *arrays):
        before = state.load(dict(zip(shapes, arrays, strict=True)), state.meta())
        out, after = learner.trace(q, q, q, lr, before, place)
        assert {name: a.shape for name, a in after.arrays().items()} == shapes
        return [out, *after.arrays().values()]

    q, lr = mx.zeros((1, 2, 1, 32)), mx.zeros((1, 2, 1))
    mx.export_function(str(tmp_path / "f"), step, q, lr, mx.array(3), *state.arrays().values())
    ttt_kernels._kernel.cache_clear()


# -- the text -------------------------------------------------------------------------------------


def test_threadgroups_stay_small(on_metal, monkeypatch):
    """256 threads: more fails at run time on a Mac once a kernel needs many registers."""
    sizes = []
    emulated = metal_emulator.run

    def run(source, inputs, outputs, grid, threadgroup, **options):
        sizes.append(math.prod(threadgroup))
        return emulated(source, inputs, outputs, grid, threadgroup, **options)

    monkeypatch.setattr(metal_emulator, "run", run)
    rules = Rules(mini_batch=64)  # the emulator refuses more than 32 KiB
    args = sample(rules, 1, (512, 128))
    ttt_kernels.metal_step(rules, *args)
    ttt_kernels.metal_fold(rules, *args[:3])
    assert len(sizes) == 7 and max(sizes) <= 256


@pytest.mark.parametrize("inner", NAMES)
def test_clang_has_nothing_against_the_text(on_metal, monkeypatch, inner):
    opencl_check = pytest.importorskip("opencl_check")
    if not opencl_check.CLANG:
        pytest.skip("clang is not installed")
    emulated, texts = metal_emulator.run, []

    def run(source, *args, **options):
        texts.append(source)
        return emulated(source, *args, **options)

    monkeypatch.setattr(metal_emulator, "run", run)
    rules = Rules()
    *args, tokens, place = sample(rules, 2, NAMES[inner](32))
    for dtype in (mx.float32, mx.bfloat16):
        tokens = {name: a.astype(dtype) for name, a in tokens.items()}
        ttt_kernels.metal_step(rules, *args, tokens, place)
    ttt_kernels.metal_fold(rules, *args)
    assert [complaint for text in texts for complaint in opencl_check.complaints(text)] == []


# -- on a Mac -------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(before)


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["plain", "standardized"])
@pytest.mark.parametrize("inner", NAMES)
@pytest.mark.parametrize("f", [32, 64, 128])
def test_mac_step_and_fold_are_their_twins(gpu, f, inner, target):
    rules = Rules(target=target)
    for batch, heads in ((1, 2), (2, 32)):
        args = sample(rules, heads, NAMES[inner](f), batch)
        # Ops on the CPU: matrix products of a GPU may round to less than float32.
        with mx.stream(mx.cpu):
            step, fold = ttt._piece(rules, *args), ttt._fold(rules, *args[:3])
            mx.eval(step, fold)
        same(ttt_kernels.metal_step(rules, *args), step)
        same(ttt_kernels.metal_fold(rules, *args[:3]), fold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_mac_narrow_activations(gpu, dtype):
    rules = Rules()
    *args, tokens, place = sample(rules, 4, (256, 64))
    narrow = {name: a.astype(dtype) for name, a in tokens.items()}
    wide = {name: a.astype(mx.float32) for name, a in narrow.items()}
    with mx.stream(mx.cpu):
        want = ttt._piece(rules, *args, wide, place)
        mx.eval(want)
    same(ttt_kernels.metal_step(rules, *args, narrow, place), want)


@pytest.mark.gpu
@pytest.mark.parametrize("inner", NAMES)
def test_mac_check_at_load_agrees(gpu, inner):
    for kernel, twin in (
        (ttt_kernels.metal_step, ttt._piece),
        (ttt_kernels.metal_fold, ttt._fold),
    ):
        assert ttt_kernels._agrees(kernel, twin, Rules(), 32, NAMES[inner](128))


@pytest.mark.gpu
def test_mac_compiled_step(gpu, monkeypatch):
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "metal")
    rules = Rules()
    *args, tokens, _ = sample(rules, 2, (64, 32))
    step = mx.compile(lambda tokens, place: ttt_kernels.step(None, rules, *args, tokens, place))
    for place in (0, 3, 15):
        want = ttt_kernels.metal_step(rules, *args, tokens, place)
        same(step(tokens, mx.array(place)), want)


@pytest.mark.gpu
def test_mac_talk(gpu, monkeypatch):
    learner = TTTMLP(2, 32, 64, Rules(mini_batch=4))
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "metal")
    out, state = talk(learner, 9)
    monkeypatch.setenv("MOSHI_TTT_KERNEL", "ops")
    with mx.stream(mx.cpu):
        want, after = talk(learner, 9)
        mx.eval(want, after.arrays())
    same((out, state.arrays()), (want, after.arrays()), 10 * TOLERANCE)
