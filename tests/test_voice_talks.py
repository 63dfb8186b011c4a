"""The small voice's talks: who speaks when, what is told, and that nothing but sound gives it away."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice import talks
from voice.bank import find, moshi_pieces, slug, training_voices, trimmed, user_sentences
from voice.clips import Voice, cut_of
from voice.remix import MADE, PADDING, Library, Remix
from voice.talks import FRAME, RATE, REPLY_AFTER, Mix, Talk, chat, probe, recital, scripted, tape
from voice.world import (
    ALL_VALUES,
    FACTS,
    HELD_OUT_FACTS,
    HELD_OUT_VOICES,
    KEYS,
    KNOWN_FACTS,
    MOSHI_VOICE,
    SMALL_TALK,
    VALUES,
    Fact,
)

from moshi_ttt_mlx.train.interleave import Word, text_stream

USER = "am_adam"
WHOLE = HELD_OUT_VOICES[0]  # has every sentence


def write_clip(path, text, samples):
    """A hum, the first half of it higher than the second, and notes with a word on each part of it."""
    path.parent.mkdir(exist_ok=True)
    pitch = np.where(np.arange(samples) < samples // 2, 0.1, 0.05)
    soundfile.write(path, (0.1 * np.sin(np.cumsum(pitch))).astype(np.float32), RATE)
    symbols = [c for word in text.split() for c in (word[0], " ")][:-1]
    edges = np.linspace(0, samples, len(symbols) + 1).astype(int)
    rows = list(zip(symbols, edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    path.with_suffix(".json").write_text(json.dumps({"text": text, "symbols": rows}))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Hums of odd lengths for everything that one user, one test voice and the model say."""
    folder = tmp_path_factory.mktemp("bank")
    rng = np.random.default_rng(0)
    for voice, pieces in (
        (MOSHI_VOICE, moshi_pieces()),
        *((name, user_sentences(name)) for name in (USER, WHOLE)),
    ):
        for text in pieces:
            write_clip(find(folder, voice, text), text, int(rng.integers(9000, 19000)))
    return folder


@pytest.fixture(autouse=True)
def letters_for_phonemes(monkeypatch):
    monkeypatch.setattr(talks, "phonemes", lambda text: text)


def make(bank, voice=WHOLE, seed=0):
    return Talk(bank, voice, random.Random(seed))


# -- the world -------------------------------------------------------------------------------------


def test_two_facts_of_each_key_are_held_out_and_keys_of_a_kind_hold_out_different_ones():
    assert [fact.key for fact in HELD_OUT_FACTS] == [key for key in KEYS for _ in range(2)]
    assert set(HELD_OUT_FACTS) <= set(FACTS) and not set(HELD_OUT_FACTS) & set(KNOWN_FACTS)
    for values in {id(v): v for v in VALUES.values()}.values():
        assert len(values) == len(set(values)) == 8
        same_kind = [f.value for f in HELD_OUT_FACTS if VALUES[f.key] is values]
        assert len(set(same_kind)) == len(same_kind)


def test_training_voices_say_no_held_out_fact_and_are_no_voices_for_testing():
    names = [f"{sex}_{n}" for sex in ("af", "am", "bf", "ef", "jm") for n in range(9)]
    voices = training_voices([*names, *HELD_OUT_VOICES, MOSHI_VOICE])
    for kept in (*HELD_OUT_VOICES, MOSHI_VOICE):
        assert not any(kept in voice for voice in voices)  # not in a blend either
    held_out = {slug(f"Remember, my {k} is {v}.") for k, v in HELD_OUT_FACTS}
    for voice in voices:
        assert not held_out & {slug(text) for text in user_sentences(voice)}


def test_a_name_of_a_clip_is_its_words():
    assert slug("Remember, my cat is Bella.") == "remember-my-cat-is-bella"


def test_silence_is_cut_off_and_loudness_made_equal():
    hum = np.sin(np.arange(RATE) * 0.05).astype(np.float32)
    for gain in (0.5, 0.01):
        pcm, start = trimmed(np.pad(gain * hum, 9600))
        assert start == pytest.approx(9600, abs=0.05 * RATE)
        assert RATE <= len(pcm) <= 1.05 * RATE
        assert np.sqrt(np.square(pcm).mean()) == pytest.approx(0.06, rel=1e-3)


# -- clips -----------------------------------------------------------------------------------------


def crossings(pcm):
    """Of zero, a sample: the pitch."""
    return np.mean(np.diff(np.sign(pcm)) != 0)


def test_a_fact_that_nobody_said_is_put_together_of_two_halves(bank):
    user, rng = Voice(bank, USER), random.Random(0)
    said = {slug(text) for text in user_sentences(USER)}
    facts = [f for f in KNOWN_FACTS if f.key in user.keys and f.value in user.values]
    new = [f for f in facts if slug(f"Remember, my {f.key} is {f.value}.") not in said]
    assert len(new) > 100
    for fact in rng.sample(new, 10):
        sentence = user.tells(fact, rng)
        lengths = {
            cut_of(head) + len(soundfile.read(tail)[0]) - cut_of(tail)
            for head in user.keys[fact.key]
            for tail in user.values[fact.value]
        }
        assert len(sentence.pcm) in lengths
        assert sentence.cut in {cut_of(head) for head in user.keys[fact.key]}
        # The first half of a hum is high, the second low: "is" begins at two thirds of a sentence.
        assert crossings(sentence.pcm[sentence.cut :]) < 0.7 * crossings(sentence.pcm[:3000])


def test_a_faster_voice_is_higher_and_cut_at_the_same_word(bank):
    fact = next(
        f for f in KNOWN_FACTS if find(bank, USER, f"Remember, my {f.key} is {f.value}.").exists()
    )
    plain, fast = (Voice(bank, USER, rate).tells(fact, random.Random(5)) for rate in (1.0, 1.25))
    assert len(fast.pcm) == pytest.approx(len(plain.pcm) / 1.25, rel=1e-3)
    assert fast.cut == pytest.approx(plain.cut / 1.25, rel=1e-2)
    assert crossings(fast.pcm) == pytest.approx(1.25 * crossings(plain.pcm), rel=0.02)


def natural(rng, key):
    """A fact that a voice for testing tells."""
    return Fact(key, rng.choice(VALUES[key]))


# -- talks -----------------------------------------------------------------------------------------


def silent(pcm, start, stop):
    return not np.abs(pcm[start:stop]).max() > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_model_keeps_quiet_while_the_user_talks_and_answers_on_a_frame(bank, seed):
    talk = make(bank, seed=seed)
    chat(talk, 400, Mix(), natural)
    pcm = talk.stereo(talk.frame)
    assert len(talk.turns) > 5
    for turn in talk.turns:
        start, end = round(turn.start * RATE), round(turn.end * RATE)
        assert silent(pcm[:, 0], start, end) and not silent(pcm[:, 1], start, end)
        reply = -(-end // FRAME) + REPLY_AFTER
        assert all(round(second * RATE) % FRAME == 0 for second in turn.pieces)
        assert round(turn.pieces[0] * RATE) == reply * FRAME
        assert silent(pcm[:, 0], end, reply * FRAME)
        assert not silent(pcm[:, 0], reply * FRAME, (reply + 1) * FRAME)


def test_training_tells_no_held_out_fact(bank):
    told = []
    for seed in range(6):
        talk = make(bank, USER, seed)
        tape(talk, 600)
        told += [Fact(t.key, t.value) for t in talk.turns if t.kind == "tell"]
        assert not talk.sides[0]  # nobody answers
        for turn in talk.turns:
            assert (turn.start < turn.cut < turn.end) is (turn.kind == "tell")
    talk = make(bank)
    recital(talk, 600)
    told += [Fact(t.key, t.value) for t in talk.turns if t.key]
    assert len(told) > 60 and set(told) <= set(KNOWN_FACTS)


def test_a_talk_asks_only_what_was_told(bank):
    for seed in range(6):
        talk, known = make(bank, seed=seed), {}
        chat(talk, 600, Mix(far=(90, 420), p_near=0.3), natural)
        for turn in talk.turns:
            if turn.kind == "tell":
                known[turn.key] = turn.value
            elif turn.kind == "ask":
                assert known[turn.key] == turn.value


def test_near_questions_lie_in_the_window_that_they_are_for(bank):
    talk, said = make(bank, seed=4), {}
    chat(talk, 2000, Mix(near=(60, 85)), natural)
    distances = []
    for turn in talk.turns:
        at = turn.pieces[-1] * RATE / FRAME
        if turn.kind == "ask":
            distances.append(at - said[turn.key])
        said[turn.key] = at
    # A question may have to wait until the exchange before it has ended.
    assert len(distances) > 10
    assert np.median(distances) == pytest.approx(80, abs=25)


@pytest.mark.parametrize("distance", [70, 192, 768])
def test_a_probe_asks_each_fact_once_at_its_distance(bank, distance):
    talk = make(bank, HELD_OUT_VOICES[0])
    facts = list(HELD_OUT_FACTS[:10:2])
    probe(talk, distance, facts)
    for fact in facts:
        told, asked = [
            next(t for t in talk.turns if t.kind == kind and t.key == fact.key)
            for kind in ("tell", "ask")
        ]
        frames = (asked.pieces[-1] - told.pieces[-1]) * RATE / FRAME
        assert frames == pytest.approx(distance, abs=16)
        between = [t for t in talk.turns if told.end < t.start < asked.start]
        assert not any(t.key == fact.key for t in between)


def test_a_script_fills_the_time_between_without_touching_its_facts(bank):
    talk = make(bank, HELD_OUT_VOICES[0])
    fact = HELD_OUT_FACTS[0]
    scripted(talk, [(4, fact, False), (500, fact, True)])
    mine = [t for t in talk.turns if t.key == fact.key]
    assert [t.kind for t in mine] == ["tell", "ask"]
    assert len(talk.turns) > 6


def test_every_word_of_the_model_is_written_in_the_frame_in_which_it_begins(bank, monkeypatch):
    talk = make(bank)
    recital(talk, 300)
    spoken = [Word(word, *times) for word, times, _ in talk.alignments]

    class Tokens:
        def encode(self, text):
            return [10 + KEYS.index(text)] if text in KEYS else [9]

    stream = text_stream(spoken, Tokens(), talk.frame).tokens
    for turn in (turn for turn in talk.turns if turn.key):
        frame = round(turn.pieces[1] * RATE) // FRAME
        assert stream[frame] == 10 + KEYS.index(turn.key)


# -- remixed talks -----------------------------------------------------------------------------------


def library(rng):
    """Talks in codes: each turn of the user and each word of the model has a code of its own.

    The model's streams are marked by turn too while it listens, as real ones are.
    """
    made = Library()
    for number, fact in enumerate(FACTS):
        turns, codes = [], np.full((17, 120), PADDING, np.int32)
        codes[1:MADE] = 1000 + number  # what gives the turn away
        for i, kind in enumerate(("tell", "ask", "recite")):
            begin = 4 + 36 * i
            reply = begin + (12 if kind != "recite" else 0)
            codes[MADE:, begin : begin + 12] = KEYS.index(fact.key)
            if kind == "tell":
                codes[MADE:, begin + 7 : begin + 12] = 300 + ALL_VALUES.index(fact.value)
            pieces = [(reply + 4 * j) * FRAME / RATE for j in range(3)]
            for j, word in enumerate((0, KEYS.index(fact.key), VALUES[fact.key].index(fact.value))):
                codes[0, reply + 4 * j] = 100 + 20 * j + word
            end = (reply - REPLY_AFTER) * FRAME / RATE
            about = {"kind": kind, "key": fact.key, "value": fact.value, "pieces": pieces}
            about["cut"] = (begin + 7) * FRAME / RATE
            turns.append(about | {"start": begin * FRAME / RATE, "end": end})
        turns.append(turns[-1] | {"start": 110 * FRAME / RATE, "end": 112 * FRAME / RATE})
        made.add(codes, turns)
    for number, exchange in enumerate(SMALL_TALK):
        codes = np.full((17, 60), PADDING, np.int32)
        codes[1:MADE], codes[MADE:, 4:16] = 2000 + number, 50 + number
        codes[0, 19] = 200 + number
        turn = {"kind": "talk", "text": exchange.user, "reply": exchange.moshi}
        turn |= {"start": 4 * FRAME / RATE, "end": 16 * FRAME / RATE}
        reply = turn | {"kind": "recite", "key": "", "value": ""}
        made.add(codes, [turn, turn | {"start": 40 * FRAME / RATE, "end": 44 * FRAME / RATE}])
        made.add(codes, [reply, turn | {"start": 40 * FRAME / RATE, "end": 44 * FRAME / RATE}])
    return made


def test_a_remixed_talk_answers_what_the_user_says():
    rng = random.Random(0)
    talk = Remix(library(rng), rng)
    talk._muffled = lambda heard: heard
    for fact in rng.sample(KNOWN_FACTS, 40):
        for act in (talk.tell, talk.ask):
            talk.parts.clear()
            act(fact)
            codes = talk.codes(999)
            said = codes[0][codes[0] >= 100].tolist()
            value = next(v for v in VALUES.values() if fact.value in v).index(fact.value)
            assert said == [100, 120 + KEYS.index(fact.key), 140 + value]
            heard = codes[MADE, : int(np.flatnonzero(codes[0] == 100)[0])]
            assert KEYS.index(fact.key) in heard
            values = set(heard[heard >= 300].tolist())
            assert values == ({300 + ALL_VALUES.index(fact.value)} if act == talk.tell else set())


def test_small_talk_is_answered_beside_silence_from_elsewhere():
    rng = random.Random(3)
    talk, own = Remix(library(rng), rng), 0
    for number, exchange in enumerate(SMALL_TALK * 5):
        talk.parts.clear()
        talk.small(exchange)
        text, voice = talk.codes(999)[:2]
        assert text[text >= 100].tolist() == [200 + number % len(SMALL_TALK)]
        own += voice[0] == 2000 + number % len(SMALL_TALK)
    assert own == 0


def test_the_models_own_streams_do_not_tell_which_turn_of_the_user_they_lie_beside():
    rng = random.Random(1)
    talk = Remix(library(rng), rng)
    fact, marks = FACTS[5], []
    for _ in range(60):
        talk.parts.clear()
        talk.tell(fact)
        codes = talk.codes(999)
        reply = int(np.flatnonzero(codes[0] == 100)[0])
        # Before the reply, under its first word and under the key: of this fact's talk as seldom as
        # of any other's.
        key = int(np.flatnonzero(codes[0] == 120 + KEYS.index(fact.key))[0])
        marks.append([codes[1, 0] == 1005, codes[1, reply] == 1005, codes[1, key] == 1005])
    assert (np.mean(marks, axis=0) < [0.1, 0.1, 0.35]).all()


def test_a_remixed_turn_keeps_its_pause_before_the_reply():
    rng = random.Random(2)
    talk = Remix(library(rng), rng)
    talk._muffled = lambda heard: heard
    for _ in range(50):
        talk.parts.clear()
        talk.tell(FACTS[rng.randrange(len(FACTS))])
        codes = talk.codes(999)
        reply = int(np.flatnonzero(codes[0] == 100)[0])
        spoken = codes[MADE, : reply - REPLY_AFTER]
        assert 6 <= len(spoken) <= 18
