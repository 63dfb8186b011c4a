"""`load`: every family from a folder, from files and in every layout; what does not fit is one line."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_ttt_mlx import Session, UserError, load
from moshi_ttt_mlx.audio import WavWriter
from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.config import build_lm, check_config, lm_config
from moshi_ttt_mlx.mimi_weights import fingerprint
from moshi_ttt_mlx.model import NOT_PRINTED

FAMILIES = {
    "moshi": tiny.tiny_moshi,
    "hibiki": tiny.tiny_hibiki,
    "stt": tiny.tiny_stt,
    "helium": tiny.tiny_helium,
}
SOUNDING = ["moshi", "hibiki", "stt"]


def single_files(folder, **others):
    """The flags that name a folder's files one by one."""
    flags = {
        "moshi_weight": next(folder.glob("model.*")),
        "mimi_weight": folder / tiny.MIMI_NAME,
        "tokenizer": folder / tiny.TOKENIZER_NAME,
        "lm_config_file": folder / "config.json",
    }
    return {name: str(path) for name, path in flags.items() if path.is_file()} | others


def talk(model, frames=6, **settings):
    session = Session(model, **settings)
    sound = 0.1 * np.random.default_rng(0).standard_normal((frames, 1920)).astype(np.float32)
    return [session.step(pcm) for pcm in sound]


# -- what loads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout, bits", [("mlx", None), ("pytorch", None), ("mlx", 4), ("mlx", 8)])
def test_every_family_in_every_format(family, layout, bits, tmp_path):
    folder = FAMILIES[family](tmp_path / "tiny", layout=layout, bits=bits)
    model = load(str(folder))
    assert model.name == str(folder)
    if family == "helium":
        assert model.codec is None and not model.speaks
        with pytest.raises(UserError, match="is a text model: it neither listens nor speaks"):
            Session(model)
        return
    frames = talk(model)
    assert model.speaks == (family != "stt")
    assert (frames[-1].pcm is not None) == model.speaks
    assert all(f.piece is None or isinstance(f.piece, str) for f in frames)


@pytest.mark.parametrize("family", SOUNDING)
def test_single_files_are_the_same_model(family, tmp_path):
    folder = FAMILIES[family](tmp_path / "tiny")
    whole, parts = load(str(folder)), load(**single_files(folder))
    assert parts.name == str(folder / "model.safetensors")
    assert parts.fingerprint == whole.fingerprint
    for a, b in zip(talk(whole), talk(parts), strict=True):
        assert a.piece == b.piece
        np.testing.assert_array_equal(a.codes, b.codes)


def test_a_text_model_from_single_files(tmp_path):
    folder = tiny.tiny_helium(tmp_path / "tiny")
    # Its default repository is moshiko's only for what is missing, and nothing is.
    model = load(str(folder), **single_files(folder))
    assert model.codec is None


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_on_load_talks(bits, tmp_path):
    folder = tiny.tiny_moshi(tmp_path / "tiny", dim=tiny.QUANTIZED_DIM[bits])
    model = load(str(folder), quantized=bits)
    assert model.lm.text_linear.bits == bits
    assert talk(model)[-1].pcm is not None


def test_the_demo_talks():
    assert talk(load("demo"))[-1].pcm is not None


def test_hibiki_is_conditioned_and_guided(tmp_path):
    model = load(str(tiny.tiny_hibiki(tmp_path / "tiny")))
    said = {
        name: [f.codes.tolist() for f in talk(model, 8, temp=0, **how) if f.codes is not None]
        for name, how in {
            "default": {},
            "very_good": {"conditions": {"description": "very_good"}},
            "bad": {"conditions": {"description": "bad"}},
            "guided": {"cfg_coef": 3.0},
        }.items()
    }
    assert said["default"] == said["very_good"]
    assert len({json.dumps(codes) for codes in said.values()}) == 3


def test_conditions_that_do_not_exist_are_named(tmp_path):
    hibiki, moshi = (
        load(str(f(tmp_path / f.__name__))) for f in (tiny.tiny_hibiki, tiny.tiny_moshi)
    )
    with pytest.raises(UserError, match=r"no condition 'mood': this model has \['description'\]"):
        hibiki.condition({"mood": "x"}, False)
    with pytest.raises(UserError, match=r"expected one of .*'very_bad'.*, got 'superb'"):
        hibiki.condition({"description": "superb"}, False)
    with pytest.raises(UserError, match="this model has none"):
        moshi.condition({"description": "very_good"}, False)
    assert moshi.condition(None, True) is None


def test_a_models_own_sampling_is_used_unless_told(tmp_path):
    config = {"lm_gen_config": {"temp": 0.6, "temp_text": 0.3, "top_k": 20, "top_k_text": 5}}
    model = load(str(tiny.tiny_moshi(tmp_path / "tiny", **config)))
    text, audio = model.samplers()
    assert (text.temp, text.top_k, audio.temp, audio.top_k) == (0.3, 5, 0.6, 20)
    text, audio = model.samplers(temp=0, text_top_k=7)
    assert (text.temp, text.top_k, audio.temp) == (0, 7, 0)
    text, audio = load(tiny.SMALL).samplers()
    assert (text.temp, text.top_k, audio.temp) == (0.8, 25, 0.8)
    assert audio.top_k == 250  # of 256 codes
    assert model.samplers(top_k=10_000)[1].top_k is None


def test_stt_says_when_its_words_were_spoken(tmp_path):
    model = load(str(tiny.tiny_stt(tmp_path / "tiny")))
    assert model.audio_delay == 0.5
    assert model.silence_prefix == pytest.approx(13 * 0.08)  # of 1.0: whole frames
    moshi = load(tiny.SMALL)
    assert (moshi.audio_delay, moshi.silence_prefix) == (0.0, 0.0)


def test_padding_has_no_piece():
    model = load(tiny.SMALL)
    assert [model.piece(token) for token in NOT_PRINTED] == [None, None]
    assert model.piece(5)


# -- which models are the same --------------------------------------------------------------------


def test_a_fingerprint_tells_models_apart(tmp_path):
    plain = tiny.tiny_moshi(tmp_path / "a", dim=128)
    prints = {
        "plain": load(str(plain)),
        "other weights": load(str(tiny.tiny_moshi(tmp_path / "b", dim=128, seed=1))),
        "other config": load(str(tiny.tiny_moshi(tmp_path / "c", dim=128, max_period=5000))),
        "quantized on load": load(str(plain), quantized=4),
        "ready made": load(str(tiny.tiny_moshi(tmp_path / "d", bits=4))),
    }
    assert len({model.fingerprint for model in prints.values()}) == len(prints)
    assert (
        load(str(shutil.copytree(plain, tmp_path / "e"))).fingerprint == prints["plain"].fingerprint
    )


@settings(max_examples=30, deadline=None)
@given(at=st.floats(0, 1), size=st.sampled_from([1, 4_000_000, 9_999_999, 40_000_000]))
def test_a_fingerprint_sees_a_change_of_a_256th_anywhere(at, size, tmp_path_factory):
    path = tmp_path_factory.mktemp("print") / "weights"
    content = bytearray(size)
    path.write_bytes(content)
    before = fingerprint(path)
    changed = max(1, -(-size // 256))
    start = round(at * (size - changed))
    content[start : start + changed] = b"\1" * changed
    path.write_bytes(content)
    assert fingerprint(path) != before


def test_asking_for_the_bits_a_file_has_changes_nothing(tmp_path):
    folder = str(tiny.tiny_moshi(tmp_path / "a", bits=4))
    assert load(folder, quantized=4).fingerprint == load(folder).fingerprint


# -- what does not fit: one line, exit status 2, nothing left behind -------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(kept))

    return edit


def edit_tensors(change):
    def edit(folder):
        path = folder / "model.safetensors"
        tensors = mx.load(str(path))
        change(tensors)
        mx.save_safetensors(str(path), tensors)

    return edit


def rename_to_pickle(folder):
    (folder / "model.safetensors").rename(folder / "model.pt")
    edit_config(moshi_name="model.pt")(folder)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def widen(tensors):
    tensors["text_linear.weight"] = mx.zeros((64, 65))


BROKEN = {
    "missing tensor": (
        edit_tensors(lambda t: t.pop("text_linear.weight")),
        "1 tensors missing: text_linear.weight",
    ),
    "extra tensor": (
        edit_tensors(lambda t: t.update(more=mx.zeros(3))),
        "1 tensors do not belong to this model: more",
    ),
    "wrong shape": (edit_tensors(widen), "text_linear.weight is [64, 65], expected [64, 64]"),
    "truncated weights": (
        lambda folder: truncate(folder / "model.safetensors"),
        "model.safetensors: not a whole safetensors file",
    ),
    "truncated codec": (
        lambda folder: truncate(folder / tiny.MIMI_NAME),
        f"{tiny.MIMI_NAME}: not a whole safetensors file",
    ),
    "another codec": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / tiny.MIMI_NAME),
        f"{tiny.MIMI_NAME}",
    ),
    "a pickle": (rename_to_pickle, "model.pt: pickled weights can run code when opened"),
    "config is not JSON": (write("config.json", b"{"), "expected a JSON model config"),
    "config is not text": (write("config.json", b"\xff\xfe"), "expected a JSON model config"),
    "config is a list": (write("config.json", b"[1]"), "expected a JSON object, found list"),
    "config lacks a field": (edit_config(dim="gone"), "not a Moshi config, it has no dim"),
    "a size is text": (edit_config(dim="64"), "dim should be a whole number above 0, found '64'"),
    "a size is nothing": (edit_config(num_heads=0), "num_heads should be a whole number above 0"),
    "a size is a truth": (edit_config(num_layers=True), "num_layers should be a whole number"),
    "heads do not fit": (edit_config(num_heads=3), "dim 64 does not split into 3 heads"),
    "depformer heads do not fit": (
        edit_config(depformer_num_heads=3),
        "depformer_dim 64 does not split into 3 heads",
    ),
    "delays do not fit": (edit_config(delays=[0, 1]), "2 delays for 16 codebooks and the text"),
    "delays are no list": (edit_config(delays=0), "delays should be a list of whole numbers"),
    "too many slices": (edit_config(dep_q=17), "the depformer makes 17 codebooks (dep_q)"),
    "a strange schedule": (
        edit_config(depformer_weights_per_step_schedule=[0, 2]),
        "should give each of 8 codebooks the number of its weights",
    ),
    "an unknown position": (
        edit_config(positional_embedding="sin"),
        "positional_embedding is 'sin'; moshi_mlx has rope and none",
    ),
    "a strange condition": (
        edit_config(conditioners={"a": {"type": "b"}}),
        "unsupported conditioner type b",
    ),
    "a condition without values": (
        edit_config(conditioners={"a": {"type": "lut", "lut": {"n_bins": 3}}}),
        "no field 'dim'",
    ),
    "a condition that is no object": (edit_config(conditioners={"a": 3}), "config.json: "),
    "a name that is a number": (edit_config(moshi_name=3), "moshi_name should be a file name"),
    "sampling that is text": (
        edit_config(lm_gen_config={"temp": "hot"}),
        "lm_gen_config should hold numbers by name",
    ),
    "another config": (edit_config(num_layers=1), "tensors do not belong to this model"),
    "another width": (edit_config(dim=32), "is this the config of these weights?"),
    "another codec config": (edit_config(mimi_config={"seanet": {}}), "mimi config, seanet"),
    "a codec config of text": (edit_config(mimi_config="small"), "mimi config"),
    "other codes": (edit_config(card=100), "the model has 100 codes (card), its codec 256"),
    "a larger vocabulary": (
        edit_config(text_card=90),
        "has 64 pieces, the model speaks 90: is this the tokenizer of this model?",
    ),
    "a smaller vocabulary": (
        edit_config(text_card=60),
        "has 64 pieces, the model speaks 60: is this the tokenizer of this model?",
    ),
    "no tokenizer": (write(tiny.TOKENIZER_NAME, b"spoken"), "not a SentencePiece model"),
    "an empty tokenizer": (write(tiny.TOKENIZER_NAME, b""), tiny.TOKENIZER_NAME),
    "a way out": (edit_config(mimi_name="../x"), "the config names a file outside its folder"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.tiny_moshi(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture
def wav(tmp_path):
    with WavWriter(tmp_path / "in.wav") as writer:
        writer.write(np.zeros(1920 * 3, np.float32))
    return tmp_path / "in.wav"


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_is_one_line(how, whole, wav, tmp_path, capfd):
    break_it, message = BROKEN[how]
    folder = shutil.copytree(whole, tmp_path / "broken")
    break_it(folder)
    before = sorted(tmp_path.rglob("*"))
    outputs = [str(tmp_path / "out.wav"), "--txt", str(tmp_path / "out.txt")]
    status = main(["transcribe", str(wav), *outputs, "--hf-repo", str(folder)])
    out, err = capfd.readouterr()
    assert status == 2
    assert out == "" and message in err
    assert len(err.splitlines()) == 1 and err.startswith("moshi-ttt-mlx: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_reasons_quoted_from_elsewhere_stay_on_the_line():
    assert str(UserError("it broke: first\nsecond")) == "it broke: first second"


def test_an_older_output_survives_a_model_that_does_not_load(whole, wav, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "broken")
    truncate(folder / "model.safetensors")
    old = tmp_path / "out.wav"
    old.write_bytes(b"an hour of talk")
    assert main(["transcribe", str(wav), str(old), "--hf-repo", str(folder)]) == 2
    assert old.read_bytes() == b"an hour of talk"


JUNK = st.one_of(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(sorted(tiny.hibiki_config())), value=JUNK)
def test_no_value_of_a_field_gets_past_the_check_into_a_traceback(field, value):
    config = tiny.hibiki_config(**{field: value})
    try:
        check_config(config, "config.json")
        build_lm(lm_config(config, name="tiny"), "tiny")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
