"""One talk: everything that changes while a model listens and speaks, in one place.

model = load("demo")
session = Session(model, seed=1)
for pcm in frames:                     # float32 [1920], 80 ms each
    frame = session.step(pcm)
    play(frame.pcm); print(frame.text, end="")
session.save("talk.session")
session = Session.load("talk.session", model)      # goes on as if never interrupted
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import safetensors

from .audio import FRAME_SECONDS, SILENCE
from .codec import finite
from .errors import UserError
from .generate import Frame, FrameGenerator
from .memory import MODES, Mode
from .model import Model
from .session_store import FORMAT, VERSION
from .transcript import MOSHI, USER, Transcript
from .trees import under


@dataclass(frozen=True)
class Settings:
    """What a talk is started with, and keeps when it is resumed.

    Attributes:
        seed: of the random key.
        temp, text_temp, top_k, text_top_k: sampling; None takes the model's own. `temp = 0` is
            greedy.
        cfg_coef: classifier-free guidance; 1 is off.
        conditions: value by conditioner name (hibiki: `description`); None takes the default.
        context: keys attention sees; None takes what the model was trained with.
        sinks: first frames kept visible for ever.
        memory: `on`, `frozen` (read, never learn) or `off`, for models loaded with an adapter.
    """

    seed: int = 299792458
    temp: float | None = None
    text_temp: float | None = None
    top_k: int | None = None
    text_top_k: int | None = None
    cfg_coef: float = 1.0
    conditions: dict[str, str] | None = None
    context: int | None = None
    sinks: int = 0
    memory: Mode = "on"


@dataclass(frozen=True)
class SpokenFrame:
    """What one step of 80 ms brought.

    Attributes:
        index: frames before this one in the talk.
        time: seconds from the talk's beginning to this frame's.
        text: words to show now, with their spaces; often empty.
        piece: the SentencePiece piece, None for padding.
        codes: int32 `[K]` of the reply frame that became complete, `max_delay` frames ago, or None.
        pcm: its sound, float32 `[1920]` at 24 kHz, or None (the first frames; models that only write).
        memory_ok: False once the memory has stopped being finite: it is shut, the talk goes on.
        user: in a `user_words.Dialogue`, what the model that listens to the user wrote meanwhile.
    """

    index: int
    time: float
    text: str
    piece: str | None
    codes: np.ndarray | None
    pcm: np.ndarray | None
    memory_ok: bool = True
    user: "SpokenFrame | None" = None


class Session:
    """Model + caches + token history + random key + codec + transcript.

    Several sessions may share one model; all of them must step on one thread (MLX streams are bound
    to the thread that made them).

    Args:
        model: from `load`.
        settings: any of `Settings`' fields by name.

    Raises:
        UserError: settings that the model cannot follow.
    """

    def __init__(self, model: Model, **settings):
        self.model, self.settings = model, Settings(**settings)
        s = self.settings
        context = model.lm.cfg.transformer.context
        window = context if s.context is None else s.context
        if not 1 <= window <= context:
            raise UserError(f"context must be 1..{context} frames for {model.name}, got {window}")
        if not 0 <= s.sinks < window:
            raise UserError(f"sinks must be 0..{window - 1} (they count in the context)")
        if s.memory not in MODES:
            raise UserError(f"memory must be one of {', '.join(MODES)}, got {s.memory!r}")
        text, audio = model.samplers(s.temp, s.text_temp, s.top_k, s.text_top_k)
        self.generator = FrameGenerator(
            model.lm,
            text,
            audio,
            cfg_coef=s.cfg_coef,
            window=window,
            sinks=s.sinks,
            memory=s.memory,
            seed=s.seed,
            condition=model.condition(s.conditions, s.cfg_coef != 1),
        )
        self.codec = model.new_codec()
        self.transcript = self._new_transcript()
        self._left: tuple | None = None  # what a finished talk is saved as

    def _new_transcript(self) -> Transcript:
        return Transcript({self.speaker: self.model.audio_delay + self.model.silence_prefix})

    @property
    def speaker(self) -> str:
        """Whose words the model writes: its own, or (stt) the user's."""
        return MOSHI if self.model.speaks else USER

    def reset(self) -> None:
        """Begin a new talk with the same settings; equal to a fresh session."""
        self.generator.reset()
        self.codec.reset()
        self.transcript = self._new_transcript()
        self._left = None

    def warm_up(self) -> None:
        """Do now what the first frames would wait for; the talk stays where it is, bit for bit."""
        self.generator.warm_up()

    @property
    def frame(self) -> int:
        """Frames so far."""
        return self.generator.frame

    def step(self, user: np.ndarray) -> SpokenFrame:
        """Listen to 80 ms and answer with 80 ms.

        Args:
            user: sound, float `[1920]` at 24 kHz, or codes, int `[K]`. Samples that are not finite
                count as silence.

        Raises:
            ValueError: another shape, or a talk that is finished.
        """
        self._check_unfinished()
        return self._step(np.asarray(user))

    def _check_unfinished(self) -> None:
        if self._left is not None:
            raise ValueError("[Session] the talk is finished: reset it, or load it again")

    def _step(self, user: np.ndarray) -> SpokenFrame:
        codes = user if np.issubdtype(user.dtype, np.integer) else self.listen(user)
        user_codes = codes[None, : self.model.lm.cfg.other_codebooks]
        return self._spoken(self.generator.step(user_codes))

    def finish(self) -> list[SpokenFrame]:
        """Bring out the user's last words, which trail: silence for the model that writes them.

        The talk has no more steps after that, where there is one; `save` writes it as it was before.

        Returns:
            Its frames; none of a model that speaks.
        """
        if self.model.speaks:
            return []
        self._left = self.parts()
        return [self._step(SILENCE) for _ in range(self.model.trailing_frames)]

    def listen(self, pcm: np.ndarray) -> np.ndarray:
        """The codes of the next frame of the user's sound: the first half of `step`.

        Args:
            pcm: as in `step`.

        Returns:
            int32 `[K]`, as many as the codec makes; `step` takes them, too.

        Raises:
            ValueError: another shape.
        """
        if pcm.shape != (self.codec.frame_size,):
            raise ValueError(
                f"[Session] a frame is [{self.codec.frame_size}] samples, got {list(pcm.shape)}"
            )
        return self.codec.encode(finite(pcm))

    def _spoken(self, frame: Frame) -> SpokenFrame:
        text, codes = frame.read()
        piece = self.model.piece(int(text[0]))
        words = self.transcript.add(frame.index, piece, self.speaker) if piece is not None else None
        codes = None if codes is None else codes[0]
        pcm = None if codes is None else self.codec.decode(codes)
        time = frame.index * FRAME_SECONDS
        return SpokenFrame(frame.index, time, words or "", piece, codes, pcm, frame.memory_ok)

    def set_memory(self, mode: str) -> None:
        """Let the memory learn (`on`) or only be read (`frozen`) from the next frame on.

        Raises:
            UserError: another mode, no memory, or a talk that was begun without it.
        """
        if mode not in ("on", "frozen"):
            raise UserError(f"while a talk goes on its memory is on or frozen, not {mode!r}")
        if self.model.memory is None or self.settings.memory == "off":
            raise UserError("this talk was begun without a memory: begin another one")
        self.generator.set_memory(mode)
        self.settings = replace(self.settings, memory=mode)

    def memory_report(self) -> dict[int, dict[str, float | int]]:
        """How each layer's memory fares; reads the device, so ask now and then, not every frame.

        Returns:
            By layer: `tokens` and `updates` so far, `step` and `drift` (largest over heads and inner
            layers: `||dW|| / ||W||` of the last fold, and of all of them against the initial
            weights), `gate` (largest absolute value). Layers whose gate is shut do not appear.
        """
        return self.generator.memory_report()

    # -- save and resume ----------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the talk to one safetensors file; the old file stays whole until the new one is.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        write_session(Path(path), *self.parts())

    def parts(self) -> tuple[dict[str, mx.array], dict[str, str]]:
        """What a session file holds: arrays by name, and text by name."""
        if self._left is not None:
            return self._left
        arrays, counters = self.generator.state()
        sound, codec_meta = self.codec.state()
        tree = {f"generator.{name}": a for name, a in arrays.items()}
        tree |= {f"codec.{name}": mx.array(a) for name, a in sound.items()}
        meta = {
            "format": FORMAT,
            "version": str(VERSION),
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "settings": json.dumps(asdict(self.settings)),
            "counters": json.dumps(counters),
            "codec": json.dumps({"name": self.codec.name, **codec_meta}),
            "transcript": json.dumps(self.transcript.state()),
        }
        return tree, meta

    @classmethod
    def load(cls, path: str | Path, model: Model) -> "Session":
        """Go on with a saved talk, bit for bit as if it had never been interrupted.

        Raises:
            UserError: not a session, a broken one, or one of another model, quantization or version.
        """
        tree, meta = read_session(Path(path))
        if USER in meta:  # a model that listens to the user, see `user_words.py`
            name = json.loads(meta[USER])["model"]
            raise UserError(
                f"{path}: this talk was held with --user-stt {name}: name it again, both go on "
                "together"
            )
        check_origin(Path(path), meta, model)
        with damage_named(path):
            session = cls(model, **json.loads(meta["settings"]))
            session._restore(tree, meta)
        return session

    def _restore(self, tree: dict[str, mx.array], meta: dict[str, str]) -> None:
        codec_meta = json.loads(meta["codec"])
        if (name := codec_meta.pop("name")) != self.codec.name:
            raise UserError(
                f"the session was held with the {name} codec, this is {self.codec.name}: "
                f"load the model with --codec {name}"
            )
        self.generator.load_state(under("generator.", tree), json.loads(meta["counters"]))
        sound = {n: np.array(a) for n, a in under("codec.", tree).items()}
        self.codec.load_state(sound, codec_meta)
        self.transcript = Transcript.from_state(json.loads(meta["transcript"]))


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong inside, where a session is put together, into a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a damaged session file ({error})") from error


def write_session(path: Path, tree: dict[str, mx.array], meta: dict[str, str]) -> None:
    """Write a session file, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(".safetensors", f".{path.name}.", path.parent)
        os.close(handle)
        mx.save_safetensors(temporary, tree, meta)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or not _has_room(path.parent, tree)
        why = "the disk is full" if full else str(error)
        raise UserError(f"could not save the session to {path}: {why}") from error


def _has_room(folder: Path, tree: dict[str, mx.array]) -> bool:
    # MLX reports a short write without its reason.
    if not folder.is_dir():
        return True
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize > sum(a.nbytes for a in tree.values())


def read_session(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays and text of a session file, as they were given to `write_session`.

    Raises:
        UserError: no such file, or not a whole one.
    """
    if not path.is_file():
        raise UserError(f"no session file {path}")
    try:
        # MLX does not notice that the end of a file is missing.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        # MLX goes by the ending, which a user may choose freely.
        with path.open("rb") as file:
            return mx.load(file, format="safetensors", return_metadata=True)
    except (safetensors.SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a whole session file ({error})") from error


def check_origin(path: Path, meta: dict[str, str], model: Model) -> None:
    """Whether a file holds a talk of this model.

    Raises:
        UserError: it does not.
    """
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: not a session of moshi-ttt-mlx")
    if meta.get("version") != str(VERSION):
        raise UserError(
            f"{path}: a session of version {meta.get('version')}, this program reads {VERSION}"
        )
    if meta.get("fingerprint") != model.fingerprint:
        raise UserError(
            f"{path}: a session of {meta.get('model')}; the loaded model {model.name} has other "
            "weights, config or quantization"
        )
