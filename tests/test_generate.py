"""The generator says what LmGen says, then goes on where LmGen goes wrong."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from moshi_mlx.models import Lm, LmConfig, LmGen
from moshi_mlx.modules.conditioner import ConditionTensor
from moshi_mlx.utils import Sampler

from moshi_ttt_mlx.generate import UNGENERATED, FrameGenerator, embed
from moshi_ttt_mlx.layers import make_window_cache

CONTEXT = 40


def config(**overrides) -> dict:
    """A tiny Moshi: 4 + 4 codebooks, delays as moshiko's, a depformer of 4 slices."""
    return {
        "card": 32,
        "text_card": 48,
        "n_q": 8,
        "dep_q": 4,
        "delays": [0, 0, 1, 1, 1, 0, 1, 1, 1],
        "dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "causal": True,
        "layer_scale": None,
        "context": CONTEXT,
        "max_period": 10000,
        "positional_embedding": "rope",
        "depformer_dim": 16,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_dim_feedforward": 64,
        "depformer_pos_emb": "none",
    } | overrides


def build(seed=3, **overrides) -> Lm:
    mx.random.seed(seed)
    model = Lm(LmConfig.from_config_dict(config(**overrides)))
    # Initial weights make flat logits; larger ones make choices that differ.
    model.apply(lambda a: a * 3 if a.ndim == 2 else a)
    mx.eval(model.parameters())
    return model


def codes(frames, batch=1, n=4, card=32, seed=0):
    return np.random.default_rng(seed).integers(0, card, (frames, batch, n)).astype(np.int32)


def greedy():
    return {"text_sampler": Sampler(temp=0), "audio_sampler": Sampler(temp=0)}


def top_k():
    return {"text_sampler": Sampler(top_k=9), "audio_sampler": Sampler(top_k=7)}


def top_p():
    return {"text_sampler": Sampler(temp=0.8, top_p=0.9), "audio_sampler": Sampler(top_p=0.95)}


def others():
    biased = Sampler(temp=0.7, top_p=1.0, min_p=0.1, min_tokens_to_keep=2)
    return {"text_sampler": biased, "audio_sampler": Sampler(temp=1.2, top_p=0.0)}


def reference(model, user, samplers, seed=5, ct=None, **kwargs):
    """What moshi_mlx's own loop says, read as its `local.py` reads it."""
    for cache in model.transformer_cache:
        cache.reset()
    mx.random.seed(seed)
    generator = LmGen(model, max_steps=len(user) + 1, **samplers, **kwargs)
    said = []
    for frame in user:
        text, _ = generator.step(mx.array(frame), ct)
        audio = generator.last_audio_tokens()
        said.append((text[:, 0].tolist(), None if audio is None else audio.tolist()))
    return said


def ours(generator, user):
    said = []
    for frame in user:
        text, audio = generator.step(frame).read()
        said.append((text.tolist(), None if audio is None else audio.tolist()))
    return said


@pytest.mark.parametrize("samplers", [greedy, top_k, top_p, others])
@pytest.mark.parametrize("compile", [False, True])
def test_same_tokens_as_lmgen(samplers, compile):
    model, user = build(), codes(CONTEXT - 1)
    generator = FrameGenerator(model, **samplers(), seed=5, compile=compile)
    assert ours(generator, user) == reference(build(), user, samplers())


@pytest.mark.parametrize(
    "overrides",
    [
        {"delays": [0, 0, 2, 2, 2, 0, 2, 2, 2]},  # hibiki
        {"delays": [0, 0, 1, 2, 3, 0, 0, 0, 0]},
        {"depformer_low_rank_embeddings": 8},
        {"depformer_weights_per_step_schedule": [0, 1, 1, 1]},
        {"depformer_context": 2},
        {"depformer_pos_emb": "rope"},
        {"positional_embedding": "none"},
        {"layer_scale": 0.5},
        {"dep_q": 0, "delays": [0] * 9},  # stt: listens to all streams, speaks none
    ],
)
def test_same_tokens_as_lmgen_for_every_kind_of_model(overrides):
    model = build(**overrides)
    user = codes(30, n=model.cfg.other_codebooks)
    if model.cfg.generated_codebooks:
        want = reference(build(**overrides), user, top_k())
    else:  # LmGen.last_audio_tokens answers for streams that are not there
        want = [(text, None) for text, _ in reference(build(**overrides), user, top_k())]
    assert ours(FrameGenerator(model, **top_k(), seed=5), user) == want


@pytest.mark.parametrize("compile", [False, True])
def test_same_tokens_as_lmgen_guided_and_conditioned(compile):
    condition = mx.random.normal((1, 32), key=mx.random.key(9))
    model, user = build(), codes(30)
    generator = FrameGenerator(
        model, **top_k(), seed=5, cfg_coef=2.5, condition=condition, compile=compile
    )
    want = reference(build(), user, top_k(), ct=ConditionTensor(condition), cfg_coef=2.5)
    assert ours(generator, user) == want


def test_guidance_away_from_the_null_condition_changes_what_is_said():
    """moshi_mlx guides away from the condition itself, which does nothing; two rows are real."""
    rows = mx.random.normal((2, 32), key=mx.random.key(9))
    user = codes(30)
    plain = ours(FrameGenerator(build(), **greedy(), condition=rows[:1]), user)
    null = ours(FrameGenerator(build(), **greedy(), condition=rows, cfg_coef=1.0001), user)
    guided = ours(FrameGenerator(build(), **greedy(), condition=rows, cfg_coef=3.0), user)
    assert null == plain and guided != plain


@pytest.mark.parametrize("compile", [False, True])
def test_cross_attention_is_lmgens_and_survives_a_resume(compile):
    user = codes(20)
    src = mx.random.normal((1, 6, 32), key=mx.random.key(4))
    lmgen = LmGen(build(cross_attention=True), max_steps=21, **greedy())
    want = [lmgen.step(mx.array(f), None, src)[0][:, 0].tolist() for f in user]
    options = {**greedy(), "cross_attention_src": src, "compile": compile}
    first = FrameGenerator(build(cross_attention=True), **options)
    head = ours(first, user[:9])
    second = FrameGenerator(build(cross_attention=True), **options)
    second.load_state(*first.state())
    assert [text for text, _ in head + ours(second, user[9:])] == want


def test_extra_heads_are_lmgens():
    model = build(extra_heads_num_heads=2, extra_heads_dim=3)
    user = codes(5)
    lmgen = LmGen(build(extra_heads_num_heads=2, extra_heads_dim=3), max_steps=9, **greedy())
    generator = FrameGenerator(model, **greedy())
    for frame in user:
        _, want = lmgen.step_with_extra_heads(mx.array(frame))
        got = generator.extra_heads(generator.step(frame))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=1e-6)


def full_attention_tokens(model, user, window):
    """Greedy, by recomputing the whole history under a causal + window mask at every frame."""
    generator = FrameGenerator(model, **greedy(), window=window, compile=False)
    history, said = [], []
    for frame in user:
        tokens = mx.take_along_axis(
            mx.concatenate([generator.history[:, :, 1:], generator.history[:, :, -1:]], axis=2),
            generator._read_at,
            axis=2,
        )
        history.append(tokens)
        generator.caches = make_window_cache(model.transformer, window)
        before = mx.concatenate(history[:-1], axis=2) if len(history) > 1 else None
        if before is not None:
            generator._transform(before, generator.caches)
        text, audio = generator.step(frame).read()
        said.append((text.tolist(), None if audio is None else audio.tolist()))
    return said


@pytest.mark.parametrize("compile", [False, True])
def test_three_wraps_of_the_window_equal_full_attention(compile):
    user = codes(50)
    generator = FrameGenerator(build(), **greedy(), window=12, compile=compile)
    assert ours(generator, user) == full_attention_tokens(build(), user, 12)


@pytest.mark.upstream
def test_moshi_mlx_goes_wrong_past_its_wrap():
    """When this fails, upstream has repaired its ring: say so in the README."""
    user = codes(60)
    model = build()
    model.cfg.transformer.max_seq_len = 24  # 4096 in the real one
    model.transformer_cache = model.transformer.make_rot_cache()
    for cache in model.transformer_cache:
        cache.self_attn.max_size = 24
    for layer in model.transformer.layers:
        layer.self_attn.cfg.context = 16  # 3000 in the real one
    wrong = reference(model, user, greedy())
    # Before the wrap upstream sees one key too many, 17; so does this window.
    right = ours(FrameGenerator(build(), **greedy(), window=17), user)
    first = next(i for i, (a, b) in enumerate(zip(wrong, right, strict=True)) if a != b)
    assert 24 <= first <= 30


def test_sinks_traced_equal_plain():
    user = codes(60)
    plain = FrameGenerator(build(), **top_k(), window=12, sinks=3, compile=False)
    traced = FrameGenerator(build(), **top_k(), window=12, sinks=3)
    assert ours(traced, user) == ours(plain, user)


def test_rows_of_a_batch_are_talks_of_their_own():
    user = codes(20, batch=3)
    together = ours(FrameGenerator(build(), **greedy(), batch_size=3), user)
    for row in range(3):
        alone = ours(FrameGenerator(build(), **greedy()), user[:, row : row + 1])
        for (text, audio), (text1, audio1) in zip(together, alone, strict=True):
            assert [text[row]] == text1
            assert (audio is None) == (audio1 is None)
            assert audio is None or [audio[row]] == audio1


@pytest.mark.parametrize("compile", [False, True])
def test_forced_tokens_are_what_was_said(compile):
    user, forced = codes(20), codes(20, n=5, seed=8)
    free = FrameGenerator(build(), **greedy(), compile=compile)
    said = ours(free, user)
    again = FrameGenerator(build(), **greedy(), compile=compile)
    # Forcing every stream to something else, then half of them, then none.
    for i, frame in enumerate(user):
        text, audio = forced[i, :, :1], forced[i, :, 1:].copy()
        audio[:, 2:] = UNGENERATED
        got_text, got_audio = again.step(frame, text=text, audio=audio).read()
        assert got_text.tolist() == text[:, 0].tolist()
        if i >= 1:  # delays 0, 1, 1, 1: codebook 0 of the frame before, codebook 1 forced now
            assert got_audio[0, 0] == forced[i - 1, 0, 1]
            assert got_audio[0, 1] == forced[i, 0, 2]
    assert said != ours(again, user)


def test_forcing_a_talks_own_tokens_changes_nothing():
    user = codes(20)
    said = ours(FrameGenerator(build(), **greedy()), user)
    replay = FrameGenerator(build(), **greedy())
    pairs = zip(user, said, strict=True)
    texts = [replay.step(f, text=np.array([t])).read()[0].tolist() for f, (t, _) in pairs]
    assert texts == [t for t, _ in said]


def test_hooks_see_and_change_tokens():
    seen = []

    def text_hook(text):
        seen.append(text.tolist())
        text[:] = mx.array([[7]])

    generator = FrameGenerator(build(), **greedy(), on_text_hook=text_hook)
    assert [t for t, _ in ours(generator, codes(5))] == [[7]] * 5
    assert len(seen) == 5 and seen != [[[7]]] * 5
    lmgen_seen = []
    LmGen(
        build(), max_steps=5, **greedy(), on_text_hook=lambda t: lmgen_seen.append(t.tolist())
    ).step(mx.array(codes(1)[0]))
    assert lmgen_seen == seen[:1]


def test_audio_hook_changes_what_is_heard():
    def mute(audio):
        audio[:] = mx.zeros_like(audio)

    generator = FrameGenerator(build(), **greedy(), on_audio_hook=mute)
    assert [a for _, a in ours(generator, codes(4))][1:] == [[[0] * 4]] * 3


def test_reset_equals_fresh():
    user = codes(30)
    used = FrameGenerator(build(), **top_k(), seed=4)
    ours(used, codes(25, seed=1))
    used.reset()
    assert ours(used, user) == ours(FrameGenerator(build(), **top_k(), seed=4), user)


@pytest.mark.parametrize("at", [1, 2, 11, 12, 29])
def test_resume_is_bit_equal(at):
    user = codes(40)
    whole = FrameGenerator(build(), **top_k(), window=12, sinks=2)
    said = ours(whole, user)
    first = FrameGenerator(build(), **top_k(), window=12, sinks=2)
    ours(first, user[:at])
    second = FrameGenerator(build(), **top_k(), window=12, sinks=2)
    second.load_state(*first.state())
    assert ours(second, user[at:]) == said[at:]
    for name, array in whole.state()[0].items():
        np.testing.assert_array_equal(np.array(second.state()[0][name]), np.array(array))


def test_generators_share_a_model_and_nothing_else():
    model, user = build(), codes(20)
    a, b = (FrameGenerator(model, **top_k(), seed=s) for s in (1, 2))
    mixed = [(a.step(f).read(), b.step(f).read()) for f in user]
    for i, seed in enumerate((1, 2)):
        alone = ours(FrameGenerator(build(), **top_k(), seed=seed), user)
        assert [m[i][0].tolist() for m in mixed] == [t for t, _ in alone]


@pytest.mark.parametrize("bits", [None, 8])
def test_minus_one_gives_a_stream_no_input(bits):
    """`nn.quantize` drops moshi_mlx's ScaledEmbedding, and with it the zero row."""
    model = build(dim=64)
    if bits:
        nn.quantize(model, 64, bits, class_predicate=lambda p, m: p == "audio_embs.5")
    embedding = model.audio_embs[5]
    assert isinstance(embedding, nn.QuantizedEmbedding) == bool(bits)
    rows = np.array(embed(embedding, mx.array([[-1, 3, 32]])))
    assert not rows[0, 0].any() and rows[0, 1].any() and rows[0, 2].any()


def test_text_model_reads_a_prompt_and_goes_on():
    text_only = {"n_q": 0, "dep_q": 0, "delays": [0]}
    prompt = mx.array([[1, 5, 9, 30, 2, 7]])
    generator = FrameGenerator(build(**text_only), **greedy())
    generator.prefill_text(prompt)
    got = [int(generator.step().read()[0][0]) for _ in range(6)]
    model = build(**text_only)
    tokens = prompt
    for _ in range(6):  # the whole text at once, under a mask, each time
        generator = FrameGenerator(model, **greedy())
        out = generator._transform(tokens[:, None], generator.caches)
        tokens = mx.concatenate([tokens, mx.argmax(model.text_linear(out[:, -1:]), -1)], axis=1)
    assert got == tokens[0, 6:].tolist()


def test_a_text_without_a_prompt_begins_with_bos():
    """Helium's embedding has no row beyond its vocabulary."""
    mx.random.seed(3)
    cfg = LmConfig.from_config_dict(config(n_q=0, dep_q=0, delays=[0]))
    cfg.text_in_vocab_size = cfg.text_out_vocab_size
    model = Lm(cfg)
    free, prompted = (FrameGenerator(model, **greedy()) for _ in range(2))
    prompted.prefill_text(mx.array([[1]]))
    got, want = ([int(g.step().read()[0][0]) for _ in range(5)] for g in (free, prompted))
    assert got == want


def test_memory_does_not_grow():
    generator = FrameGenerator(build(), **greedy(), window=12)
    user = codes(30)
    ours(generator, user)
    shapes = {n: a.shape for n, a in generator.state()[0].items()}
    ours(generator, user)
    assert {n: a.shape for n, a in generator.state()[0].items()} == shapes


@pytest.mark.parametrize(
    "given, message",
    [
        ({"user_codes": np.zeros((1, 3))}, r"user_codes must be \[1, 4\], got \[1, 3\]"),
        ({}, r"user_codes must be \[1, 4\], got \[1, 0\]"),
        ({"user_codes": np.zeros((1, 4)), "text": np.zeros((2, 1))}, r"text must be \[1, 1\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        FrameGenerator(build(), **greedy()).step(**given)


def test_the_window_is_written_in_place():
    """At 7B the rings of all layers are 1.6 GB: a frame must not copy them."""
    generator = FrameGenerator(build(), **greedy())
    places = set()
    for frame in codes(CONTEXT + 20):
        generator.step(frame).read()
        if generator.frame > CONTEXT:
            keys = np.array(generator.caches[0].self_attn.keys, copy=False)
            places.add(keys.__array_interface__["data"][0])
            del keys
    assert len(places) == 1
