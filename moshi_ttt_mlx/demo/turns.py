"""The user's side of the demo's talk: a recording, and beside it a json of what is said when.

{"voice": "af_nova", "turns": [
  {"start": 1.2, "end": 3.0, "kind": "tell", "text": "Remember, my cat is Bella.",
   "key": "cat", "value": "Bella"},
  {"start": 5.1, "end": 6.4, "kind": "talk", "text": "Hello there."},
  {"start": 90.0, "end": 91.2, "kind": "ask", "text": "What is my cat?",
   "key": "cat", "value": "Bella"}]}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..audio import FRAME_SECONDS, iter_frames
from ..errors import UserError

BUNDLED = Path(__file__).parents[1] / "assets" / "demo_talk.flac"

Kind = Literal["tell", "ask", "talk"]


@dataclass(frozen=True)
class Turn:
    """What the user says.

    Attributes:
        start, end: of its sound, in seconds.
        kind: it tells a fact, asks for one, or is small talk.
        text: in words.
        key, value: of a fact; of a question the value is the answer to expect. Empty in small talk.
    """

    start: float
    end: float
    kind: Kind
    text: str
    key: str = ""
    value: str = ""


@dataclass(frozen=True)
class Recording:
    """The user's sound and words.

    Attributes:
        frames: float32 `[1920]` each, at 24 kHz.
        turns: in the order of time; every question asks for a fact that was told before.
    """

    frames: list[np.ndarray]
    turns: list[Turn]

    @property
    def seconds(self) -> float:
        return len(self.frames) * FRAME_SECONDS


def read_recording(path: str | Path | None = None) -> Recording:
    """Read a recording and the json of the same name beside it.

    Args:
        path: wav, flac, mp3 or ogg; several channels are mixed. Default: the bundled one.

    Raises:
        UserError: either is missing, broken, or does not go with the other.
    """
    if path is None:
        path = BUNDLED
        if not path.is_file():
            raise UserError(
                f"the bundled recording {path} is missing: install the package again, or name "
                "another one with --recording FILE"
            )
    notes = Path(path).with_suffix(".json")
    turns = read_turns(notes)
    with iter_frames(path) as reader:
        recording = Recording(list(reader), turns)
    if turns[-1].end > recording.seconds + FRAME_SECONDS:
        raise UserError(
            f"{notes}: its last turn ends at {turns[-1].end:.1f} s, {path} at "
            f"{recording.seconds:.1f} s: do they belong together?"
        )
    return recording


def read_turns(path: Path) -> list[Turn]:
    """Read and check the json; fields that are not ours are left alone.

    Raises:
        UserError: naming the first turn that cannot be used.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["turns"]
        turns = [_turn(entry) for entry in entries]
    except OSError as error:
        raise UserError(
            f"{path}: expected what is said in the recording beside it: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{path}: expected {{"turns": [{{start, end, kind, text, key, value}}, ..]}}, '
            f"found something else ({error})"
        ) from error
    if not turns:
        raise UserError(f"{path}: expected turns, found an empty list")
    _check_order(path, turns)
    return turns


def _turn(entry: dict[str, Any]) -> Turn:
    start, end = float(entry["start"]), float(entry["end"])
    words = {name: entry.get(name) or "" for name in ("kind", "text", "key", "value")}
    turn = Turn(start, end, **words)
    if not all(isinstance(word, str) for word in words.values()) or not turn.text.strip():
        raise ValueError(f"a turn without words: {entry}")
    if turn.kind not in get_args(Kind):
        raise ValueError(f"kind is {' or '.join(get_args(Kind))}, not {turn.kind!r}")
    if turn.kind != "talk" and not (turn.key.strip() and turn.value.strip()):
        raise ValueError(f"a fact without key or value: {turn.text!r}")
    if not 0 <= start < end < float("inf"):
        raise ValueError(f"{turn.text!r} from {start} to {end} s")
    return turn


def _check_order(path: Path, turns: list[Turn]) -> None:
    told: dict[str, str] = {}
    for number, turn in enumerate(turns):
        if number and turn.start < turns[number - 1].end:
            raise UserError(f"{path}: {turn.text!r} begins before the turn ahead of it has ended")
        if turn.kind == "ask" and told.get(turn.key) != turn.value:
            raise UserError(
                f"{path}: {turn.text!r} at {turn.start:.1f} s expects {turn.value!r}, told was "
                f"{told.get(turn.key) or 'nothing'!r}"
            )
        if turn.kind == "tell":
            told[turn.key] = turn.value
