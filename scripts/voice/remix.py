"""New talks out of tokenized ones: their turns in another order, about other facts.

    python -m voice.remix --from TALKS SHARDS MIMI OUT --plan near [--talks 1000]      (in scripts/)

A model of this size learned a hundred talks by heart within minutes (each has its own noise) and heard
nothing. Here no talk comes twice: every turn of the user is taken from some tokenized talk, whatever
its voice, and gets the reply of the fact that it is about, taken from a recital. `SHARDS` come from
`moshi-ttt-mlx tokenize TALKS`; what is written is of the same kind.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from moshi_ttt_mlx.train.data import NOTHING, Shard, find_shards, unlearned, write_shard
from moshi_ttt_mlx.train.interleave import END_OF_PADDING, PADDING

from .model import codebooks
from .talks import FRAME, RATE, REPLY_AFTER, Deck, Mix, chat, deck
from .world import ALL_VALUES, KEYS, Exchange, Fact

# Of a hasty talk, one of these; see `Remix.haste`.
HASTE = ((0.0, 0.0), (0.3, 0.05), (0.7, 0.1), (1.0, 0.3))
LATE = 2  # frames from where a word ends to where it is written down
MADE = 9  # streams of the model: text and its codebooks
WHOLE = 0.4  # share of facts that are told as they were in some talk
# Of what the user says, so that it is not learned by heart either; in talks, where a model that does not
# understand learns to guess, a share of it.
LIGHTLY = 0.4
TEMPO = 0.07  # chance of a frame to be left out, or to come twice
HOLES = 0.08  # chance of a code to be missing
KEPT = (1, 1, 2, 4, 8, 8)  # codebooks
OTHER, SIMILAR = 0.25, 5  # chance of another code of the first codebook, one of so many near ones


class Unit(NamedTuple):
    """A turn of the user and the pause behind it.

    Attributes:
        codes: of the user, int32 `[8, n]`, from the frame before the turn's first.
        reply: the frame of `codes` in which the reply begins.
    """

    codes: np.ndarray
    reply: int


class Library:
    """What users say, what the model says, and what either is like while nobody speaks.

    Attributes:
        told, asked, small: turns of users, by what is said.
        keys, values: halves of told facts, up to the key and from "is" on.
        silence: of users, int32 `[8, n]`.
        words: of the model, text and codes, int32 `[9, n]`; the frame before a word says that one comes.
        quiet: of the model.
    """

    def __init__(self) -> None:
        self.told: dict[Fact, list[Unit]] = defaultdict(list)
        self.asked: dict[str, list[Unit]] = defaultdict(list)
        self.small: dict[str, list[Unit]] = defaultdict(list)
        self.keys: dict[str, list[np.ndarray]] = defaultdict(list)
        self.values: dict[str, list[Unit]] = defaultdict(list)
        self.silence: list[np.ndarray] = []
        self.words: dict[str, list[np.ndarray]] = defaultdict(list)
        self.quiet: list[np.ndarray] = []

    def add(self, codes: np.ndarray, notes: dict) -> None:
        """One talk: codes `[17, T]`, and its notes."""
        user, other = codes[MADE:], codes[1:MADE]
        for turn, begin, stop in _spans(notes["turns"], codes.shape[1]):
            if turn["kind"] == "recite":
                self._recited(turn, codes[:MADE, begin:stop])
            elif turn["kind"] == "rest" and "left_turns" not in notes:
                self.quiet.append(codes[:MADE, begin + 4 : stop])
            else:
                self._said(turn, user[:, begin:stop], begin)
        for turn, begin, stop in _spans(notes.get("left_turns", []), codes.shape[1]):
            self._said(turn, other[:, begin:stop], begin)

    def _recited(self, turn: dict, codes: np.ndarray) -> None:
        if not turn["key"]:
            self.words[turn["reply"]].append(codes)
            return
        begins = [round(second * RATE) // FRAME for second in turn["pieces"]]
        parts = np.split(codes, [1 + begin - begins[0] for begin in begins[1:]], axis=1)
        for word, part in zip(("Your", turn["key"], turn["value"]), parts, strict=True):
            self.words[word].append(part)

    def _said(self, turn: dict, codes: np.ndarray, begin: int) -> None:
        if turn["kind"] == "rest":
            self.silence.append(codes[:, 4:])
            return
        unit = Unit(codes, -(-round(turn["end"] * RATE) // FRAME) + REPLY_AFTER - begin)
        if turn["kind"] == "talk":
            self.small[turn["text"]].append(unit)
        elif turn["kind"] == "ask":
            self.asked[turn["key"]].append(unit)
        else:
            self.told[Fact(turn["key"], turn["value"])].append(unit)
            cut = round(turn["cut"] * RATE) // FRAME - begin
            self.keys[turn["key"]].append(codes[:, :cut])
            self.values[turn["value"]].append(Unit(codes[:, cut:], unit.reply - cut))


def _spans(turns: list[dict], frames: int) -> Iterator[tuple[dict, int, int]]:
    """Turns with their first frame, one before they begin, and the next turn's.

    The end of a talk may cut its last turn off, and before its first frame there is none.
    """
    begins = [round(turn["start"] * RATE) // FRAME - 1 for turn in turns]
    for number, (turn, begin) in enumerate(zip(turns, begins, strict=True)):
        stop = begins[number + 1] if number + 1 < len(begins) else frames
        if begin >= 0 and stop < frames:
            yield turn, begin, stop


class Remix:
    """A talk in codes, with the methods of `talks.Talk` that `talks.chat` and `talks.deck` use.

    Args:
        library: of turns.
        rng: chooses among them.
        similar: of `similar_codes`.
        wear: of users' turns, beside the usual; 0 leaves them as they were heard.

    Attributes:
        haste: if set, there is no sound on either side, and of a fact's frames besides key and value
            a share is left: of those in which another word begins, and of those in which none does.
        known: values by their keys, as they were said last.
    """

    def __init__(
        self, library: Library, rng: random.Random, similar: np.ndarray, wear: float = 1.0
    ):
        self.library, self.rng, self.similar, self.wear = library, rng, similar, wear
        self.haste: tuple[float, float] | None = None
        self.parts, self.frame, self.known = [], 0, {}

    def pause(self, frames: float) -> None:
        frames = int(frames)
        self._put(np.concatenate([self._quiet(frames), self._silence(frames)]))

    def tell(self, fact: Fact) -> None:
        units = self.library.told[fact]
        if units and self.rng.random() < WHOLE:
            user = self.rng.choice(units)
        else:
            # Of two talks, and so of two voices: no turn comes often enough to be learned by heart.
            key, value = (
                self.rng.choice(self.library.keys[fact.key]),
                self.rng.choice(self.library.values[fact.value]),
            )
            joined = np.concatenate([key, value.codes], axis=1)
            user = Unit(joined, key.shape[1] + value.reply)
        self._answer(user, ("Your", *fact))
        self.known[fact.key] = fact.value

    def small(self, exchange: Exchange) -> None:
        self._answer(self.rng.choice(self.library.small[exchange.user]), (exchange.moshi,))

    def ask(self, fact: Fact) -> None:
        self._answer(self.rng.choice(self.library.asked[fact.key]), ("Your", *fact))

    def recite(self, fact: Fact) -> None:
        """The model says a fact of itself; a value that nothing has told yet is not to be learned.

        To guess it is to learn which pairs are told in training, and that all others never are.
        """
        said = self._said(("Your", *fact))
        if self.known.get(fact.key) != fact.value:
            said[-1] = said[-1].copy()
            text, token = said[-1][0], self._token(fact.value)
            text[text == token] = unlearned(token)
        self.known[fact.key] = fact.value
        made = np.concatenate(said, axis=1)
        if self.haste:
            self._put(self._text_alone(made[:1, self._hasty(said)]))
        else:
            self._put(np.concatenate([made, self._silence(made.shape[1])]))
            self.pause(self.rng.randint(0, 3))

    def _text_alone(self, text: np.ndarray) -> np.ndarray:
        """Neither side has sound: a user's silence, as loud as speech, drowned the words at first."""
        return np.pad(text, ((0, 2 * MADE - 2), (0, 0)), constant_values=NOTHING)

    def _hasty(self, said: list[np.ndarray]) -> list[int]:
        """Which frames of a fact to keep; key and value are the first ones of their parts."""
        words, rest = self.haste
        kept, frame = [], 0
        for number, part in enumerate(said):
            for within, token in enumerate(part[0]):
                share = rest if token == PADDING else words
                if (number and not within) or self.rng.random() < share:
                    kept.append(frame)
                frame += 1
        return kept

    def _said(self, reply: Sequence[str]) -> list[np.ndarray]:
        # Each word from another talk: what surrounds it must not tell the next one.
        return [self.rng.choice(self.library.words[word]) for word in reply]

    def write_down(self, word: str) -> None:
        """The user says a part of a sentence; without sound the model writes its key or value behind it.

        Nothing is told: what is said with what can be learned only where both are said.
        """
        if word in KEYS and self.rng.random() < 0.5:
            codes = self.rng.choice(self.library.keys[word])
        else:
            units = self.library.asked if word in KEYS else self.library.values
            unit = self.rng.choice(units[word])
            codes = unit.codes[:, : unit.reply - 2]
        codes = codes[:, self._tempo(codes.shape[1])]
        user = np.concatenate([codes, self._silence(self.rng.randint(LATE, 5))], axis=1)
        made = np.full((MADE, user.shape[1]), NOTHING, np.int32)
        made[0], end = PADDING, codes.shape[1] + LATE
        made[0, end - 2 : end] = END_OF_PADDING, self._token(word)
        self._put(np.concatenate([made, self._muffled(user, 1.0)]))

    def _token(self, word: str) -> int:
        text = self.library.words[word][0][0]
        return next(token for token in text if token not in (PADDING, END_OF_PADDING))

    def _answer(self, user: Unit, reply: Sequence[str]) -> None:
        spoken = user.codes[:, self._tempo(user.reply - 1)]
        made = np.concatenate([self._quiet(spoken.shape[1]), *self._said(reply)], axis=1)
        tail = user.codes[:, user.reply - 1 :]
        silence = self._silence(made.shape[1])
        heard = self._muffled(np.concatenate([spoken, tail, silence], axis=1), LIGHTLY)
        self._put(np.concatenate([made, heard[:, : made.shape[1]]]))
        self.pause(self.rng.uniform(2, 8))

    def _quiet(self, frames: int) -> np.ndarray:
        """The model's streams while it listens: from anywhere, or they would tell which turn it is."""
        return self._some(self.library.quiet, frames)

    def _silence(self, frames: int) -> np.ndarray:
        """The user's streams while nobody speaks."""
        return self._some(self.library.silence, frames)

    def _some(self, pieces: list[np.ndarray], frames: int) -> np.ndarray:
        piece = self.rng.choice(pieces)
        return np.tile(piece, -(-frames // piece.shape[1]))[:, :frames]

    def _tempo(self, frames: int) -> list[int]:
        """Frames of a turn with some left out and some twice, but for those just before the reply."""
        kept, tempo = [], self.wear * TEMPO
        for frame in range(frames):
            chance = self.rng.random() if frame < frames - REPLY_AFTER else 1.0
            kept += [frame] * (0 if chance < tempo else 2 if chance < 2 * tempo else 1)
        return kept

    def _muffled(self, heard: np.ndarray, share: float) -> np.ndarray:
        """As another voice might say it, often without the last codebooks, and with holes.

        The words are in the first codebook, where one voice's code for a sound is near another's.

        Args:
            heard: codes of the user, `[8, n]`.
            share: of the wear that dictation has.
        """
        wear = share * self.wear
        heard, rng = heard.copy(), np.random.default_rng(self.rng.randrange(1 << 30))
        other = rng.random(heard.shape[1]) < wear * OTHER
        near = self.similar[heard[0], rng.integers(0, SIMILAR, heard.shape[1])]
        heard[0] = np.where(other & (heard[0] >= 0), near, heard[0])
        if self.rng.random() < wear:
            heard[self.rng.choice(KEPT) :] = NOTHING
        return np.where(rng.random(heard.shape) < wear * HOLES, NOTHING, heard)

    def _put(self, codes: np.ndarray) -> None:
        self.parts.append(codes)
        self.frame += codes.shape[1]

    def codes(self, frames: int) -> np.ndarray:
        return np.concatenate(self.parts, axis=1)[:, :frames]


def dictation(talk: Remix, frames: int) -> None:
    """The user says keys or values alone, and the model writes them down: hearing and nothing else."""
    words = talk.rng.choice([KEYS, ALL_VALUES, ALL_VALUES])
    while talk.frame < frames:
        talk.write_down(talk.rng.choice(words))


def hasty(talk: Remix, frames: int) -> None:
    """Facts, most of them said before, in few frames: looking up, as dense as it can be."""
    talk.haste = talk.rng.choice(HASTE)
    deck(talk, frames, Deck(facts=(3, 9), p_tell=0.0, p_ask=0.0))


PLANS: dict[str, Callable[[Remix, int], None]] = {
    "hasty": hasty,
    "dictation": dictation,
    "hear": partial(deck, plan=Deck(facts=(2, 4), again=0, p_tell=1.0)),
    "deck": partial(deck, plan=Deck(facts=(2, 4))),
    # As far as the base looks back, and no farther: what cannot be known is guessed, and the best guess
    # is which pairs are told in training. The memory's share of questions lies beyond.
    "near": partial(chat, mix=Mix()),
    "far": partial(
        chat, mix=Mix(far=(90, 800), p_near=0.3, p_fact=0.6, p_pause=0.05, again=0.7, most=7)
    ),
    "farther": partial(
        chat, mix=Mix(far=(600, 1600), p_near=0.2, p_fact=0.6, p_pause=0.05, again=0.7, most=7)
    ),
}


def similar_codes(mimi: Path) -> np.ndarray:
    """For each code of the first codebook those nearest to it, int32 `[codes, SIMILAR]`."""
    vectors = np.array(codebooks(mimi)[0][0], np.float64)
    distances = np.square(vectors[:, None] - vectors[None]).sum(axis=-1)
    return np.argsort(distances, axis=1)[:, 1 : 1 + SIMILAR].astype(np.int32)


def read_library(pairs: list[tuple[Path, Path]]) -> Library:
    """From folders of talks and of their shards."""
    library = Library()
    for talks, shards in pairs:
        for shard in find_shards(shards):
            library.add(shard.codes(), read_notes(talks, shard))
    return library


def read_notes(talks: Path, shard: Shard) -> dict:
    """What `voice.dialogues` wrote about the talk of a shard."""
    return json.loads((talks / Path(shard.meta["source"]).with_suffix(".json").name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--from", dest="sources", nargs=2, type=Path, action="append", required=True
    )
    parser.add_argument("mimi", type=Path, help="the codec whose codes they are")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--talks", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=768)
    parser.add_argument("--wear", type=float, default=1.0, help="0: users as they were heard")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    library = read_library([tuple(pair) for pair in args.sources])
    similar = similar_codes(args.mimi)
    print(f"{sum(map(len, library.told.values()))} facts told, {len(library.told)} different ones")

    for number in track(range(args.talks), args.plan):
        rng = random.Random(f"{args.seed} {args.plan} {number}")
        talk = Remix(library, rng, similar, args.wear)
        PLANS[args.plan](talk, args.frames)
        name = f"{args.plan}-{args.seed}-{number:05d}"
        write_shard(args.out / f"{name}.safetensors", talk.codes(args.frames), {"source": name})


if __name__ == "__main__":
    main()
