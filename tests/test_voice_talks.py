"""The small voice's talks: who speaks when, what is told, and that nothing but sound gives it away."""

import json
import random
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from voice import talks
from voice.bank import (
    CLEARER,
    find,
    moshi_pieces,
    say,
    slug,
    training_voices,
    trimmed,
    user_sentences,
)
from voice.clips import Voice, cut_of
from voice.kokoro import Said, style
from voice.model import BINS, CODEBOOKS, LOUD, LOUDER, ears
from voice.remix import (
    LATE,
    MADE,
    OTHER,
    SIMILAR,
    Library,
    Remix,
    dictation,
    similar_codes,
)
from voice.talks import (
    FRAME,
    RATE,
    REPLY_AFTER,
    Deck,
    Mix,
    Talk,
    chat,
    deck,
    probe,
    recital,
    scripted,
    tape,
)
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

from moshi_ttt_mlx.train.data import NOTHING, unlearned
from moshi_ttt_mlx.train.interleave import PADDING, Word, text_stream

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


def test_a_voice_may_be_the_mean_of_two_and_beyond_a_third(tmp_path):
    rng = np.random.default_rng(0)
    one, two, other = rng.standard_normal((3, 510 * 256)).astype(np.float32)
    for name, voice in ("am_one", one), ("am_two", two), ("bf_other", other):
        voice.tofile(tmp_path / f"{name}.bin")
    for name, wanted in (
        ("am_one", one),
        ("am_one+am_two", (one + two) / 2),
        ("am_one-bf_other", 1.4 * one - 0.4 * other),
        ("am_one+am_two-bf_other", 0.7 * (one + two) - 0.4 * other),
    ):
        made = style(tmp_path, name)
        assert made.shape == (510, 256) and made.dtype == np.float32
        np.testing.assert_allclose(made.ravel(), wanted, atol=1e-5)


class Spelling:
    """A text-to-speech model whose sound is ramps: 0.1 s a letter, after half a second of nothing."""

    def say(self, text, voice, speed=1.0):
        ends = [round(RATE * (0.5 + 0.1 * (1 + i) / speed)) for i in range(len(text))]
        return Said(np.arange(ends[-1] + 100, dtype=np.float32), text, ends, RATE // 2)


def test_what_is_hard_to_understand_is_cut_out_of_a_sentence_with_its_onset():
    six = say(Spelling(), MOSHI_VOICE, "six.", 1.0)
    whole = Spelling().say("My number, six.", MOSHI_VOICE, 0.95)
    cut = whole.ends[10] - RATE // 4
    assert six.symbols == "six." and six.begin == RATE // 4
    assert six.ends == [end - cut for end in whole.ends[11:]]
    np.testing.assert_array_equal(six.pcm, whole.pcm[cut:])


@pytest.mark.parametrize(
    "voice, text, wanted",
    [(MOSHI_VOICE, "Lucy.", "Lucy!"), (MOSHI_VOICE, "ten.", "ten."), (WHOLE, "six.", "six.")],
)
def test_all_else_is_said_whole(voice, text, wanted):
    said, whole = say(Spelling(), voice, text, 1.0), Spelling().say(wanted, voice, 1.0)
    assert said.symbols == wanted and said.ends == whole.ends and said.begin == whole.begin
    np.testing.assert_array_equal(said.pcm, whole.pcm)


def test_what_is_said_in_another_way_is_said_by_the_model():
    assert set(CLEARER) <= set(moshi_pieces())
    for text, (sentence, _) in CLEARER.items():
        assert slug(sentence).endswith(slug(text))


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


def span(frame, frames):
    return {"start": frame * FRAME / RATE, "end": (frame + frames) * FRAME / RATE}


LEFT = 5000  # added to the codes of a tape's left user


def library():
    """Tapes and recitals in codes: each key, value and sentence of a user has a code of its own.

    A recital's streams are marked by number: what gives it away.
    """
    made = Library()
    for number, fact in enumerate(FACTS):
        key, value = KEYS.index(fact.key), ALL_VALUES.index(fact.value)
        codes = np.full((17, 130), PADDING, np.int32)
        turns = {"turns": [], "left_turns": []}
        for side, streams, mark in (
            ("turns", slice(MADE, 17), 0),
            ("left_turns", slice(1, MADE), LEFT),
        ):
            codes[streams, 4:11], codes[streams, 11:16] = mark + 300 + key, mark + 400 + value
            codes[streams, 40:52] = mark + 300 + key
            about = {"key": fact.key, "value": fact.value}
            turns[side] = [
                span(4, 12) | about | {"kind": "tell", "cut": 11 * FRAME / RATE},
                span(40, 12) | about | {"kind": "ask"},
                span(80, 20) | {"kind": "rest"},
                span(110, 12) | {"kind": "rest"},
            ]
        made.add(codes, turns)
        codes = np.full((17, 130), PADDING, np.int32)
        codes[1:MADE] = 1000 + number
        codes[0, [10, 14, 18]] = 100, 120 + key, 140 + value
        pieces = [frame * FRAME / RATE for frame in (10, 14, 18)]
        recited = span(10, -REPLY_AFTER) | about | {"kind": "recite", "pieces": pieces}
        rest, end = span(40, 20) | {"kind": "rest"}, span(100, 12) | {"kind": "rest"}
        made.add(codes, {"turns": [recited, rest, end]})
    for number, exchange in enumerate(SMALL_TALK):
        codes = np.full((17, 60), PADDING, np.int32)
        codes[MADE:, 4:16] = 500 + number
        end = span(40, 10) | {"kind": "rest"}
        turn = span(4, 12) | {"kind": "talk", "text": exchange.user}
        made.add(codes, {"turns": [turn, end], "left_turns": []})
        codes[1:MADE], codes[0, 19] = 2000 + number, 200 + number
        recited = span(19, -REPLY_AFTER) | {"kind": "recite", "key": "", "reply": exchange.moshi}
        made.add(codes, {"turns": [recited, end]})
    return made


def remixed(rng, haste=None):
    """A talk in which a code is near itself alone."""
    talk = Remix(library(), rng, np.repeat(np.arange(2 * LEFT)[:, None], SIMILAR, axis=1))
    talk.haste = haste
    return talk


def test_a_tape_teaches_from_both_of_its_sides():
    made = library()
    assert {len(made.told[fact]) for fact in FACTS} == {2}
    for unit in (unit for units in made.told.values() for unit in units):
        assert unit.codes.shape[0] == 8 and len({code // LEFT for code in unit.codes[:, 4]}) == 1
    assert {int(u.codes[0, 4]) // LEFT for u in made.told[FACTS[0]]} == {0, 1}
    assert {len(made.keys[key]) for key in KEYS} == {2 * 8}
    assert {len(made.values[value]) for value in ALL_VALUES} == {2 * 3}
    assert len(made.silence) == 2 * len(FACTS) and len(made.quiet) == len(FACTS)
    assert {codes.shape[0] for codes in made.silence} == {8}
    assert {codes.shape[0] for codes in made.quiet} == {MADE}


def test_a_remixed_talk_answers_what_the_user_says():
    rng = random.Random(0)
    talk = remixed(rng)
    talk._muffled = lambda heard, wear: heard
    for fact in rng.sample(KNOWN_FACTS, 40):
        key, value = KEYS.index(fact.key), ALL_VALUES.index(fact.value)
        for act in (talk.tell, talk.ask):
            talk.parts.clear()
            act(fact)
            codes = talk.codes(999)
            assert codes[0][codes[0] >= 100].tolist() == [100, 120 + key, 140 + value]
            heard = codes[MADE, : int(np.flatnonzero(codes[0] == 100)[0])]
            assert {code % LEFT for code in heard.tolist()} - {PADDING} == (
                {300 + key, 400 + value} if act == talk.tell else {300 + key}
            )


def test_small_talk_is_answered_beside_silence_from_elsewhere():
    rng = random.Random(3)
    talk, own = remixed(rng), 0
    for number, exchange in enumerate(SMALL_TALK * 5):
        talk.parts.clear()
        talk.small(exchange)
        text, voice = talk.codes(999)[:2]
        assert text[text >= 100].tolist() == [200 + number % len(SMALL_TALK)]
        own += voice[0] == 2000 + number % len(SMALL_TALK)
    assert own == 0


def test_the_models_own_streams_do_not_tell_which_turn_of_the_user_they_lie_beside():
    rng = random.Random(1)
    talk = remixed(rng)
    fact, marks, origins = FACTS[5], [], set()
    for _ in range(60):
        talk.parts.clear()
        talk.tell(fact)
        codes = talk.codes(999)
        reply = int(np.flatnonzero(codes[0] == 100)[0])
        # Before the reply, under its first word and under the key: of this fact's talk as seldom as
        # of any other's.
        key = int(np.flatnonzero(codes[0] == 120 + KEYS.index(fact.key))[0])
        origins.add(int(codes[1, key]))
        marks.append([codes[1, 0] == 1005, codes[1, reply] == 1005, codes[1, key] == 1005])
    assert (np.mean(marks, axis=0) < [0.1, 0.1, 0.35]).all()
    assert len(origins) == 8  # every recital of the key


def test_a_remixed_turn_keeps_its_pause_before_the_reply():
    rng = random.Random(2)
    talk = remixed(rng)
    talk._muffled = lambda heard, wear: heard
    for _ in range(50):
        talk.parts.clear()
        talk.tell(FACTS[rng.randrange(len(FACTS))])
        codes = talk.codes(999)
        reply = int(np.flatnonzero(codes[0] == 100)[0])
        spoken = codes[MADE, : reply - REPLY_AFTER]
        assert 6 <= len(spoken) <= 18


@pytest.mark.parametrize("seed", range(4))
def test_dictation_is_written_just_behind_each_word_without_a_sound(seed):
    talk, words = remixed(random.Random(seed)), set()
    talk._muffled = lambda heard, wear: heard
    dictation(talk, 2000)
    codes = np.concatenate(talk.parts, axis=1)
    assert (codes[1:MADE] == NOTHING).all()
    for frame in np.flatnonzero(codes[0] >= 100):
        token = codes[0, frame]
        word = 300 + token - 120 if token < 140 else 400 + token - 140
        # A frame behind its last one; of what ends a turn there is one more of silence.
        heard = [code % LEFT == word for code in codes[MADE, frame - LATE - 1 : frame]]
        assert any(heard) and not heard[-1]
        words.add(int(token))
    # Keys or values, never both: no pair is told.
    assert len(words) in (len(KEYS), len(ALL_VALUES))


def test_a_value_that_nothing_has_told_is_read_and_not_learned():
    talk, known = remixed(random.Random(8)), {}
    talk._muffled = lambda heard, wear: heard
    for fact in [FACTS[3], FACTS[3], FACTS[30], FACTS[3], Fact("cat", "Bella"), FACTS[3]]:
        token = 140 + ALL_VALUES.index(fact.value)
        for act in (talk.recite, talk.tell)[: 1 + (fact == FACTS[30])]:
            talk.parts.clear()
            act(fact)
            text = np.concatenate(talk.parts, axis=1)[0]
            first = act == talk.recite and known.get(fact.key) != fact.value
            assert (token in text, unlearned(token) in text) == (not first, first)
        known[fact.key] = fact.value


def facts_said(text):
    """Keys and values in a row of text, in order, as facts."""
    said = [t for t in np.maximum(text, unlearned(text)).tolist() if 120 <= t < 200]
    keys, values = said[::2], said[1::2]
    assert all(k < 140 <= v for k, v in zip(keys, values, strict=True))
    return [Fact(KEYS[k - 120], ALL_VALUES[v - 140]) for k, v in zip(keys, values, strict=True)]


@pytest.mark.parametrize("haste", [None, (0.0, 0.0), (0.5, 0.2)])
def test_a_deck_says_each_fact_again_before_others_come(haste):
    for seed in range(5):
        talk = remixed(random.Random(seed), haste=haste)
        deck(talk, 900, Deck(facts=(3, 5), again=2, p_tell=0.0, p_ask=0.0))
        facts, orders = facts_said(np.concatenate(talk.parts, axis=1)[0]), set()
        while facts:
            count = next(n for n in (3, 4, 5) if set(facts[:n]) == set(facts[n : 2 * n]))
            rounds = [facts[i * count : (i + 1) * count] for i in range(3)]
            assert {frozenset(some) for some in rounds} == {frozenset(facts[:count])}
            orders |= {tuple(some) for some in rounds}
            facts = facts[3 * count :]
        assert len(orders) > 4


def test_what_the_model_says_of_itself_lies_beside_a_silent_user():
    talk = remixed(random.Random(0))
    talk.recite(FACTS[7])
    codes = talk.codes(99)
    assert (codes[MADE:] == PADDING).all() and (codes[1] >= 1000).any()


def test_haste_keeps_key_and_value_and_no_sound():
    talk = remixed(random.Random(0), haste=(0.0, 0.0))
    for fact in FACTS[:5]:
        talk.recite(fact)
    codes = talk.codes(99)
    assert codes.shape[1] == 10 and (codes[1:] == NOTHING).all()
    assert facts_said(codes[0]) == list(FACTS[:5])


def test_a_deck_with_users_tells_first_and_asks_later():
    talk = remixed(random.Random(1))
    talk._muffled = lambda heard, wear: heard
    deck(talk, 600, Deck(facts=(2, 3), again=1, p_tell=1.0, p_ask=1.0))
    codes = np.concatenate(talk.parts, axis=1)
    heard, known, last = codes[MADE] % LEFT, set(), 0
    for fact, at in zip(facts_said(codes[0]), np.flatnonzero(codes[0] >= 140), strict=True):
        said = {400 + ALL_VALUES.index(fact.value)} & set(heard[last:at].tolist())
        assert said if fact not in known else not said  # a question does not tell
        known, last = known | {fact}, at
    assert len(known) > 6


@pytest.mark.parametrize("wear", [1.0, 0.4])
def test_another_voice_says_the_same_with_codes_near_by(wear):
    near = np.arange(2 * LEFT)[:, None] + np.arange(1, 1 + SIMILAR)
    talk = Remix(library(), random.Random(3), near)
    heard = np.full((8, 4000), 50, np.int32)
    heard[:, :2000] = NOTHING
    talk.wear = 0.0
    assert (talk._muffled(heard, wear) == heard).all() and talk._tempo(50) == list(range(50))
    talk.wear = 1.0
    first = talk._muffled(heard, wear)[0]
    assert (first[:2000] == NOTHING).all()
    kinds, counts = np.unique(first[2000:], return_counts=True)
    assert set(kinds) == {NOTHING, 50, *range(51, 51 + SIMILAR)}
    others = counts[kinds > 50].sum() / counts[kinds >= 50].sum()
    assert others == pytest.approx(wear * OTHER, abs=0.03)


def write_codebooks(file, vectors, ways):
    """Vectors `[codebooks, BINS, n]` and ways to latents `[2, dim, n, 1]` as a codec's file has them."""
    usage = np.random.default_rng(1).uniform(1, 9, vectors.shape[:2])
    tensors = {
        f"rvq_{name}.output_proj.weight": w for name, w in zip(("first", "rest"), ways, strict=True)
    }
    for number, (some, used) in enumerate(zip(vectors, usage, strict=True)):
        book = f"rvq_{'rest' if number else 'first'}.vq.layers.{max(number - 1, 0)}._codebook"
        tensors |= {f"{book}.cluster_usage": used, f"{book}.embedding_sum": some * used[:, None]}
    arrays = {f"quantizer.{name}": mx.array(a, mx.float32) for name, a in tensors.items()}
    mx.save_safetensors(str(file), arrays)


def test_similar_codes_are_the_nearest_of_the_first_codebook(tmp_path):
    places = np.array([[0, 10, 1, 30, 2, 50, 3, 4], *[range(8)] * (CODEBOOKS - 1)])
    write_codebooks(
        tmp_path / "mimi.safetensors", np.stack([places, places], axis=2), np.ones((2, 3, 2, 1))
    )
    near = similar_codes(tmp_path / "mimi.safetensors")
    assert near.shape == (8, SIMILAR)
    assert near[0].tolist() == [2, 4, 6, 7, 1]
    assert near[5].tolist() == [3, 1, 7, 6, 4]


def test_a_user_is_embedded_by_the_codecs_own_vectors(tmp_path):
    rng = np.random.default_rng(0)
    vectors, ways = rng.standard_normal((CODEBOOKS, BINS, 4)), rng.standard_normal((2, 6, 4, 1))
    write_codebooks(tmp_path / "mimi.safetensors", vectors, ways)
    tables = ears(tmp_path / "mimi.safetensors", 6)
    assert len(tables) == CODEBOOKS
    want = [v - v.mean(axis=0) for v in vectors]
    want = [v @ ways[min(number, 1)][..., 0].T for number, v in enumerate(want)]
    loud = LOUD / np.sqrt(np.square(want[0]).mean())
    for number, (table, latents) in enumerate(zip(tables, want, strict=True)):
        assert not np.array(table[BINS]).any()
        latents = latents * loud * (LOUDER if number else 1)
        np.testing.assert_allclose(table[:BINS], latents, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="latents, the model is 8 wide"):
        ears(tmp_path / "mimi.safetensors", 8)
