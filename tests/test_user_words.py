"""The user's words beside Moshi's: neither model notices the other, and both go on after a save."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mimi_checkpoints import checkpoint, sound

from moshi_ttt_mlx import Session, UserError, load
from moshi_ttt_mlx.codec import open_codec, small_mimi
from moshi_ttt_mlx.mlx_codec import MlxCodec
from moshi_ttt_mlx.user_words import Dialogue

FRAMES = 16
# Whole frames, so that times can be told exactly: 2 of delay, 3 of silence before.
PLAIN = {"audio_delay_seconds": 0.16, "audio_silence_prefix_seconds": 0.0}
WITH_PREFIX = PLAIN | {"audio_silence_prefix_seconds": 0.24}


def make(folder, name, family=tiny.tiny_stt, **config):
    return load(str(family(folder / name, **config)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Moshi, and listeners: with as many codebooks as Moshi's codec, fewer, after silence, another
    codec."""
    folder = tmp_path_factory.mktemp("user_words")
    models = {
        "moshi": make(folder, "moshi", tiny.tiny_moshi),
        "equal": make(folder, "equal", stt_config=PLAIN),
        "fewer": make(folder, "fewer", stt_config=PLAIN, n_q=5, delays=[0] * 6),
        "prefix": make(folder, "prefix", stt_config=WITH_PREFIX),
    }
    other = tiny.tiny_stt(folder / "other", stt_config=PLAIN)
    mimi = mx.load(str(other / tiny.MIMI_NAME))
    mimi["encoder.model.0.conv.conv.weight"] = -mimi["encoder.model.0.conv.conv.weight"]
    mx.save_safetensors(str(other / tiny.MIMI_NAME), mimi)
    # A Moshi that hears with fewer codebooks than its listener: the real case, 8 of 32.
    few = make(folder, "few", tiny.tiny_moshi, n_q=8, dep_q=4, delays=[0, 0, 1, 1, 1, 0, 1, 1, 1])
    return models | {"other": load(str(other)), "few": few}


LISTENERS = ["equal", "fewer", "prefix", "other"]
PAIRS = [*(("moshi", name) for name in LISTENERS), ("few", "equal")]
pairs = pytest.mark.parametrize("speaker, listener", PAIRS)


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a.index, a.time, a.text, a.piece) == (b.index, b.time, b.text, b.piece)
        assert (a.pcm is None) == (b.pcm is None)
        if a.pcm is not None:
            np.testing.assert_array_equal(a.codes, b.codes)
            np.testing.assert_array_equal(a.pcm, b.pcm)


def alone(model, pcm, before=0, after=0, **settings):
    """A model by itself: its session and the frames of `pcm`."""
    session, silence = Session(model, **settings), np.zeros((1, 1920), np.float32)
    for frame in np.repeat(silence, before, 0):
        session.step(frame)
    frames = [session.step(frame) for frame in pcm]
    for frame in np.repeat(silence, after, 0):
        session.step(frame)
    return session, frames


def prefix(model):
    return model.silence_frames


@pairs
def test_both_models_do_as_if_alone(speaker, listener, models):
    pcm = sound(FRAMES)
    talk = Dialogue(models[speaker], models[listener], seed=5)
    frames = [talk.step(frame) for frame in pcm]
    theirs, expected = alone(models[speaker], pcm, seed=5)
    assert_same(frames, expected)
    before = prefix(models[listener])
    users, expected = alone(models[listener], pcm, before, temp=0)
    assert_same([frame.user for frame in frames], expected)
    assert any(frame.piece for frame in expected) and any(frame.piece for frame in frames)
    words = talk.transcript.words
    assert [w for w in words if w.speaker == "user"] == users.transcript.words
    assert [w for w in words if w.speaker == "moshi"] == theirs.transcript.words
    assert words == sorted(words, key=lambda w: w.start)


@pytest.mark.parametrize(
    "speaker, listener, encoded",
    [
        ("moshi", "equal", 1),
        ("moshi", "fewer", 1),
        ("few", "equal", 1),
        ("moshi", "prefix", 2),
        ("moshi", "other", 2),
    ],
)
def test_sound_is_encoded_once_where_the_codecs_are_the_same(
    speaker, listener, encoded, models, monkeypatch
):
    talk = Dialogue(models[speaker], models[listener])
    calls, encode = [], MlxCodec.encode
    monkeypatch.setattr(
        MlxCodec, "encode", lambda codec, pcm: (calls.append(1), encode(codec, pcm))[1]
    )
    for frame in sound(3):
        talk.step(frame)
    assert len(calls) == 3 * encoded


@pytest.mark.parametrize(
    "shape, backend, counts",
    [("small", "mlx", (3, 8)), ("kyutai", "rustymimi", (8, 32))],
)
def test_the_first_codes_of_many_are_the_few(shape, backend, counts):
    """What encoding once rests on."""
    if backend == "rustymimi":
        pytest.importorskip("rustymimi")
    config = small_mimi() if shape == "small" else None
    few, many = (open_codec(checkpoint(shape), k, backend, config) for k in counts)
    for frame in sound(5):
        codes = many.encode(frame)
        np.testing.assert_array_equal(codes[: few.num_codebooks], few.encode(frame))


def with_kyutais_codec(folder):
    """Let a tiny model of 2,048 codes run on Mimi as it is."""
    config = json.loads((folder / "config.json").read_text())
    del config["mimi_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / tiny.MIMI_NAME).unlink()
    (folder / tiny.MIMI_NAME).symlink_to(checkpoint("kyutai"))
    return load(str(folder))


def test_8_of_32_codebooks_of_rustymimi(tmp_path, monkeypatch):
    """Kyutai's own sizes: moshiko hears 8 codebooks, stt-1b 32."""
    pytest.importorskip("rustymimi")
    from moshi_ttt_mlx.rusty_codec import RustyCodec

    stt = {"card": 2048, "n_q": 32, "delays": [0] * 33, "stt_config": PLAIN}
    pair = (
        with_kyutais_codec(tiny.tiny_moshi(tmp_path / "moshi", card=2048)),
        with_kyutais_codec(tiny.tiny_stt(tmp_path / "stt", **stt)),
    )
    pcm = sound(6)
    expected = [alone(pair[0], pcm)[1], alone(pair[1], pcm, temp=0)[1]]
    calls, encode = [], RustyCodec.encode
    monkeypatch.setattr(
        RustyCodec, "encode", lambda codec, pcm: (calls.append(codec), encode(codec, pcm))[1]
    )
    talk = Dialogue(*pair)
    frames = [talk.step(frame) for frame in pcm[:3]]
    talk.save(tmp_path / "talk")
    talk = Dialogue.load(tmp_path / "talk", *pair)
    frames += [talk.step(frame) for frame in pcm[3:]]
    assert_same(frames, expected[0])
    assert_same([frame.user for frame in frames], expected[1])
    assert len(calls) == 6 and {codec.num_codebooks for codec in calls} == {32}


def test_times_are_moved_back_by_delay_and_silence(models):
    talk = Dialogue(models["moshi"], models["prefix"])
    pieces = [(frame.user.index, frame.user.piece) for frame in map(talk.step, sound(FRAMES))]
    starts = {w.start for w in talk.transcript.words if w.speaker == "user"}
    # 3 frames of silence and 2 of delay; nothing is earlier than the talk.
    marked = {max(0, i - 5) for i, piece in pieces if piece and piece.startswith("\u2581")}
    assert marked and {round(i * 0.08, 3) for i in marked} <= starts | {0.0}
    assert pieces[0][0] == 3


def test_a_talk_is_told_by_both(models):
    talk = Dialogue(models["moshi"], models["equal"])
    for frame in sound(FRAMES):
        talk.step(frame)
    speakers = [line.partition(": ")[0] for line in talk.transcript.to_txt().splitlines()]
    assert set(speakers) == {"You", "Moshi"}
    assert json.loads(talk.transcript.to_json())["speakers"] == ["moshi", "user"]
    assert "<v You>" in talk.transcript.to_vtt() and "Moshi: " in talk.transcript.to_srt()


# -- save and resume ------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("cut", [1, 7])
def test_resumed_it_goes_on_bit_for_bit(speaker, listener, cut, models, tmp_path):
    pcm, path = sound(FRAMES), tmp_path / "talk.session"
    pair = models[speaker], models[listener]
    whole = Dialogue(*pair, seed=3)
    expected = [whole.step(frame) for frame in pcm]
    half = Dialogue(*pair, seed=3)
    for frame in pcm[:cut]:
        half.step(frame)
    half.save(path)
    again = Dialogue.load(path, *pair)
    frames = [again.step(frame) for frame in pcm[cut:]]
    assert_same(frames, expected[cut:])
    assert_same([f.user for f in frames], [f.user for f in expected[cut:]])
    assert again.transcript.words == whole.transcript.words


@pairs
def test_the_last_words_come_out_and_are_not_saved(speaker, listener, models, tmp_path):
    pcm, pair = sound(FRAMES), (models[speaker], models[listener])
    talk = Dialogue(*pair)
    for frame in pcm:
        talk.step(frame)
    talk.save(tmp_path / "before")
    before = talk.transcript.state()
    tail = talk.finish()
    assert len(tail) == 15  # 0.16 s and a second: 14.5 frames
    after = len(tail)
    users, _ = alone(models[listener], pcm, prefix(models[listener]), after, temp=0)
    assert [w for w in talk.transcript.words if w.speaker == "user"] == users.transcript.words
    talk.save(tmp_path / "after")
    assert Dialogue.load(tmp_path / "after", *pair).transcript.state() == before
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    with pytest.raises(ValueError, match="finished"):
        talk.step(pcm[0])


def test_a_speech_to_text_model_alone_brings_out_its_last_words_too(models, tmp_path):
    pcm, model = sound(FRAMES), models["equal"]
    talk = alone(model, pcm, temp=0)[0]
    talk.save(tmp_path / "before")
    tail = talk.finish()
    whole = alone(model, pcm, after=15, temp=0)[0]
    assert len(tail) == 15 and any(frame.text for frame in tail)
    assert talk.transcript.words == whole.transcript.words
    talk.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    with pytest.raises(ValueError, match="finished"):
        talk.step(pcm[0])
    talk.reset()
    talk.step(pcm[0])


@pytest.mark.parametrize("listener", ["equal", "prefix"])
def test_a_listener_may_join_a_talk_that_had_none(listener, models, tmp_path):
    pcm, path, pair = sound(FRAMES), tmp_path / "talk", (models["moshi"], models[listener])
    theirs, expected = alone(models["moshi"], pcm, seed=3)
    half = alone(models["moshi"], pcm[:6], seed=3)[0]
    half.save(path)
    talk = Dialogue.load(path, *pair)
    frames = [talk.step(frame) for frame in pcm[6:11]]
    talk.save(path)  # and it is still one that joined
    talk = Dialogue.load(path, *pair)
    frames += [talk.step(frame) for frame in pcm[11:]]
    assert_same(frames, expected[6:])
    before = prefix(models[listener])
    users, written = alone(models[listener], pcm[6:], before, temp=0)
    assert_same([frame.user for frame in frames], written)
    words = talk.transcript.words
    assert [w for w in words if w.speaker == "moshi"] == theirs.transcript.words
    mine = {(w.text, w.start) for w in words if w.speaker == "user"}
    late = {(w.text, round(w.start + 0.48, 3)) for w in users.transcript.words if w.start > 0}
    assert late and late <= mine


def test_a_reset_talk_is_a_fresh_one(models):
    talk, pcm = Dialogue(models["moshi"], models["prefix"], seed=2), sound(4)
    first = [talk.step(frame) for frame in pcm]
    words = talk.transcript.state()
    talk.finish()
    talk.reset()
    again = [talk.step(frame) for frame in pcm]
    assert_same(again, first)
    assert_same([f.user for f in again], [f.user for f in first])
    assert talk.transcript.state() == words


def test_warming_up_changes_nothing(models):
    warm, cold = (Dialogue(models["moshi"], models["equal"], seed=2) for _ in range(2))
    warm.warm_up()
    for frame in sound(4):
        a, b = warm.step(frame), cold.step(frame)
        assert_same([a, a.user], [b, b.user])


# -- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def saved(models, tmp_path):
    talk = Dialogue(models["moshi"], models["equal"])
    for frame in sound(3):
        talk.step(frame)
    talk.save(tmp_path / "talk")
    return tmp_path / "talk"


def test_a_talk_of_two_is_not_taken_up_by_one(saved, models):
    with pytest.raises(UserError, match=r"held with --user-stt .*equal: name it again"):
        Session.load(saved, models["moshi"])


def test_another_listener_is_refused(saved, models):
    with pytest.raises(UserError, match=r"a session of .*equal; the loaded model .*fewer"):
        Dialogue.load(saved, models["moshi"], models["fewer"])
    with pytest.raises(UserError, match=r"a session of .*moshi; the loaded model .*few"):
        Dialogue.load(saved, models["few"], models["equal"])


def test_models_of_the_wrong_kind_are_refused(models, tmp_path):
    with pytest.raises(
        UserError, match=r"moshi: expected a speech-to-text model such as kyutai/stt"
    ):
        Dialogue(models["moshi"], models["moshi"])
    with pytest.raises(UserError, match="writes the user's words itself"):
        Dialogue(models["equal"], models["fewer"])
    helium = load(str(tiny.tiny_helium(tmp_path / "helium")))
    with pytest.raises(UserError, match="expected a speech-to-text model"):
        Dialogue(models["moshi"], helium)


def test_a_damaged_listener_is_named(saved, models):
    tree, meta = mx.load(str(saved), format="safetensors", return_metadata=True)
    for broken in ("{", json.dumps(json.loads(meta["user"]) | {"joined_at": "soon"})):
        path = str(saved) + ".safetensors"
        mx.save_safetensors(path, tree, meta | {"user": broken})
        with pytest.raises(UserError, match="a damaged session file"):
            Dialogue.load(path, models["moshi"], models["equal"])
