"""A talk with the words of both sides: a speech-to-text model listens to the user beside Moshi.

    talk = Dialogue(load("kyutai/moshiko-mlx-q4"), load("kyutai/stt-1b-en_fr-mlx"), seed=7)
    frame = talk.step(pcm)                      # Moshi's, with the user's words in frame.user
    talk.transcript.write("talk.srt", "srt")    # two speakers in the order of their words
    talk.save("talk.session")                   # one file for both

Moshi's text stream holds Moshi's words alone. What lives here: a `Session` of Moshi's with a second
one, on the user's sound, inside. What does not: how either of them works. Nothing that Moshi hears or
says changes by it, and the user's words are those of the second model alone on the same sound.

         microphone -> codec.encode -+-> first 8 codes  -> Moshi --> words, codec.decode -> loudspeaker
                       (once)        +-> first 32 codes -> stt ----> words, moved back by its delay

Codebooks are made one after another, each from what the earlier ones left, so the first 8 of 32 are
the 8: where both models have the same codec it encodes once, with as many as the greedier one needs.
"""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from .audio import FRAME_SECONDS, SILENCE
from .errors import UserError
from .model import Model
from .session import Session, SpokenFrame, check_origin, damage_named, read_session
from .transcript import USER, Transcript
from .trees import under


class Dialogue(Session):
    """A `Session` whose transcript has the user's words, too.

    Args:
        model: the one that speaks.
        listener: a speech-to-text model for the user's words. It decodes greedily: there is one right
            answer.
        settings: of the speaking model, as `Session`'s.

    Attributes:
        user: the listener's own session. It trails: see `Model.audio_delay`.

    Raises:
        UserError: models of another kind, or settings that the speaking one cannot follow.
    """

    def __init__(self, model: Model, listener: Model, **settings):
        if listener.speaks or listener.codec is None:
            raise UserError(
                f"--user-stt {listener.name}: expected a speech-to-text model such as "
                "kyutai/stt-1b-en_fr-mlx"
            )
        if not model.speaks:
            raise UserError(f"{model.name} writes the user's words itself: leave out --user-stt")
        self.user = Session(listener, temp=0)
        self._joined_at = 0
        super().__init__(model, **settings)
        self._shared = _common_encoder(self, self.user)
        self._begin()

    def _begin(self) -> None:
        """The first moment of a talk: one transcript, and the silence that the listener expects."""
        self.user.transcript = self.transcript
        for _ in range(self.user.model.silence_frames):
            self.user.step(SILENCE)

    def _new_transcript(self) -> Transcript:
        return Transcript({self.speaker: 0.0, self.user.speaker: self._trail})

    @property
    def _trail(self) -> float:
        """Seconds by which the listener's frames are behind the sound, on this talk's clock."""
        listener = self.user.model
        return listener.audio_delay + listener.silence_prefix - self._joined_at * FRAME_SECONDS

    @property
    def _encoder(self) -> Session | None:
        """Whose codec encodes for both; None where each does for itself."""
        return None if self._joined_at else self._shared

    def reset(self) -> None:
        """Begin a new talk with the same settings; equal to a fresh one."""
        self._joined_at = 0
        super().reset()
        self.user.reset()
        self._begin()

    def warm_up(self) -> None:
        """As `Session.warm_up`, for both models."""
        super().warm_up()
        self.user.warm_up()

    def step(self, user: np.ndarray) -> SpokenFrame:
        """As `Session.step`; what the listener wrote is in the frame's `user`.

        Raises:
            ValueError: another shape, or a talk that is finished.
        """
        self._check_unfinished()
        user = self._heard(user)
        words = self.user.step(user)
        return replace(super().step(user), user=words)

    def _heard(self, user: np.ndarray) -> np.ndarray:
        """What both sessions step on: codes where one codec encodes for both."""
        if self._encoder is None or np.issubdtype(np.asarray(user).dtype, np.integer):
            return user
        return self._encoder.listen(np.asarray(user))

    def finish(self) -> list[SpokenFrame]:
        """As `Session.finish`: silence for the listener alone."""
        self._left = self.parts()
        frames = range(self.user.model.trailing_frames)
        return [self.user.step(self._heard(SILENCE)) for _ in frames]

    # -- save and resume ----------------------------------------------------------------------

    def parts(self) -> tuple[dict[str, mx.array], dict[str, str]]:
        """As `Session.parts`, with the listener's under its own name."""
        if self._left is not None:
            return self._left
        tree, meta = super().parts()
        arrays, own = self.user.parts()
        tree |= {f"{USER}.{name}": array for name, array in arrays.items()}
        own["joined_at"] = str(self._joined_at)
        del own["transcript"]  # it is the talk's
        return tree, meta | {USER: json.dumps(own)}

    @classmethod
    def load(cls, path: str | Path, model: Model, listener: Model) -> "Dialogue":
        """Go on with a saved talk, bit for bit; one that was held without a listener gets one now.

        Raises:
            UserError: as `Session.load`, for either model.
        """
        tree, meta = read_session(Path(path))
        check_origin(Path(path), meta, model)
        if USER in meta:
            with damage_named(path):
                own = json.loads(meta[USER])
            check_origin(Path(path), own, listener)
        with damage_named(path):
            talk = cls(model, listener, **json.loads(meta["settings"]))
            talk._restore(tree, meta)
        return talk

    def _restore(self, tree: dict[str, mx.array], meta: dict[str, str]) -> None:
        super()._restore(tree, meta)
        if USER in meta:
            own = json.loads(meta[USER]) | {"transcript": meta["transcript"]}
            self._joined_at = int(own["joined_at"])
            self.user._restore(under(f"{USER}.", tree), own)
        else:
            self._join(json.loads(meta["transcript"]))
        self.user.transcript = self.transcript

    def _join(self, words: dict) -> None:
        """Let a fresh listener begin in the middle of a talk."""
        self._joined_at = self.frame
        delays = words["delays"] | {self.user.speaker: self._trail}
        self.transcript = Transcript.from_state(words | {"delays": delays})


def open_talk(
    model: Model, listener: Model | None = None, path: str | Path | None = None, **settings
) -> Session:
    """A `Dialogue` where there is a listener, else a `Session`.

    Args:
        path: of a saved talk to go on with; it keeps its settings. None begins a new one.

    Raises:
        UserError: as theirs.
    """
    kind, models = (Session, (model,)) if listener is None else (Dialogue, (model, listener))
    return kind(*models, **settings) if path is None else kind.load(path, *models)


def _common_encoder(a: Session, b: Session) -> Session | None:
    """The one of two fresh sessions whose codes serve both; None where the codecs are not the same.

    Silence that only one of them hears first makes two streams of sound of one, too.
    """
    if a.model.silence_frames != b.model.silence_frames:
        return None
    kinds = [session.codec.state()[1] for session in (a, b)]
    if any(kinds[0][key] != kinds[1][key] for key in ("backend", "weights")):
        return None
    return max((a, b), key=lambda session: session.codec.num_codebooks)
