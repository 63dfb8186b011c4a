"""The same facts in Moshi's streams: heard from the user, answered in text and in voice.

What lives here: how a token of the world sounds, a talk as codes, and asking a model frame by frame
through the generator, which feeds on what it says itself. What does not: the talks (`recall.py`).

In frame `t` the user says one token. When that was the key of a question, Moshi's text stream says
the value in frame `t + 2`, when it has heard all codes of the key, those with a delay too, and its
codebooks sound like it; else it pads and is silent. The user does not say the answers: where a talk
has one, there is filler.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from moshi_mlx.models import Lm
from moshi_mlx.utils import Sampler

from ..generate import FrameGenerator
from ..memory import Mode
from .recall import Talks, World

PADDING = 3
ANSWER_AFTER = 2  # frames
CARD = 64  # codes of a codebook; a world's tokens have to fit


def voice(tokens: np.ndarray, codebooks: int) -> np.ndarray:
    """How tokens sound: int32 `[B, T]` -> codes `[B, codebooks, T]`.

    The first code tells the token, the others are its timbre: all depend on the token alone.
    """
    turns = np.arange(codebooks, dtype=np.int32)[None, :, None]
    sounds = (tokens[:, None] * (2 * turns + 1) + 7 * turns) % CARD
    return np.where(turns == 0, tokens[:, None], sounds).astype(np.int32)


def spoken(talks: Talks, world: World, codebooks: int) -> np.ndarray:
    """Talks as undelayed codes, int32 `[B, 1 + 2 * codebooks, T]`: text, Moshi's voice, the user's."""
    text = np.where(talks.targets >= 0, talks.targets, PADDING)
    user = np.where(_later(text, 1) == PADDING, talks.inputs, world.filler(0))
    text = _later(text, ANSWER_AFTER)
    return np.concatenate([text[:, None], voice(text, codebooks), voice(user, codebooks)], axis=1)


def _later(text: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(text, ((0, 0), (frames, 0)), constant_values=PADDING)[:, :-frames]


class Heard(NamedTuple):
    """What came back, bool `[B, T]` as `recall.answers`: False where nothing was asked.

    Attributes:
        text: the text stream said the value.
        sound: all codebooks sounded like it.
        silent: share of the other frames in which it said nothing.
    """

    text: np.ndarray
    sound: np.ndarray
    silent: float


def talk_answers(lm: Lm, talks: Talks, world: World, window: int, mode: Mode = "on") -> Heard:
    """Ask frame by frame, greedily; the model hears the user and feeds on what it says itself.

    Args:
        lm: a model of `2 * codebooks` codebooks, half of them its own.
        talks: of its world.
        window: keys that attention sees.
        mode: of the memory.
    """
    codebooks = lm.cfg.generated_codebooks
    codes = spoken(talks, world, codebooks)
    batch, _, tokens = codes.shape
    greedy = Sampler(temp=0.0)
    generator = FrameGenerator(lm, greedy, greedy, batch_size=batch, window=window, memory=mode)
    delay = max(lm.cfg.audio_delays)
    text, sound = np.zeros((batch, tokens), np.int32), np.zeros((batch, codebooks, tokens))
    for frame in range(tokens + delay):
        heard = codes[:, 1 + codebooks :, min(frame, tokens - 1)]
        said, codes_made = generator.step(mx.array(heard)).read()
        if frame < tokens:
            text[:, frame] = said
        if codes_made is not None:
            sound[:, :, frame - delay] = codes_made
    asked = codes[:, 0] != PADDING
    right = (text == codes[:, 0]) & asked
    heard = right & (sound == codes[:, 1 : 1 + codebooks]).all(axis=1)
    silent = float((text == PADDING)[~asked].mean())
    # Back to the frame of the question, where `Talks` has it.
    right, heard = (np.roll(x, -ANSWER_AFTER, axis=1) for x in (right, heard))
    return Heard(right, heard, silent)
