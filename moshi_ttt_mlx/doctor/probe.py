"""The real model for a second: does the codec give back what it was given, does a frame take less
time than it lasts?
"""

import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..audio import FRAME_MS, FRAME_SIZE, SAMPLE_RATE, read_audio, to_mono
from ..codec import Codec
from ..config import lm_config
from ..generate import FrameGenerator
from ..model import mimi_shape, open_model_codec
from ..session import Session
from ..user_words import Dialogue, open_talk
from ..voice import level
from ..watches import too_slow_message
from .case import Case, NotDownloaded
from .finding import Finding

SECOND = 13
"""Frames in a second, rounded up."""

WARM_UP = 5
PATIENCE_SECONDS = 20.0
"""A machine that is far too slow need not show it for a whole second of sound."""

QUIET = -60.0
RESEMBLES = 0.6
"""Of `resemblance`: speech under noise as loud as itself has 0.7, two seconds of it up to 0.55."""

_CLIP = Path(__file__).parent.parent / "assets" / "demo_clip.flac"


def speech(frames: int) -> np.ndarray:
    """The bundled recording: float32 `[frames, 1920]`, from its loudest second on, again and again."""
    mono = to_mono(read_audio(_CLIP).samples)
    loudness = np.convolve(mono**2, np.ones(SAMPLE_RATE), "valid")[::FRAME_SIZE]
    mono = np.roll(mono, -FRAME_SIZE * int(loudness.argmax()))
    return np.resize(mono, (frames, FRAME_SIZE)).astype(np.float32)


# -- codec ----------------------------------------------------------------------------------------


def check_codec(case: Case) -> Finding:
    """A second of speech through the codec and back."""
    try:
        files = case.chosen.files
    except NotDownloaded as error:
        return Finding("codec", "skipped", str(error))
    if files.mimi is None:
        return Finding("codec", "skipped", f"{files.name} is a text model: it needs none")
    # The codec alone: it is examined even if the model cannot be loaded.
    codec = open_model_codec(files, lm_config(files.config, name=files.name), case.chosen.codec)
    sound = speech(SECOND)
    came_back = np.concatenate([codec.decode(codec.encode(frame)) for frame in sound])
    is_kyutais = mimi_shape(files) is None
    return _judge_codec(codec, sound.reshape(-1), came_back, is_kyutais)


def _judge_codec(codec: Codec, sent: np.ndarray, came_back: np.ndarray, trained: bool) -> Finding:
    which = f"{codec.name}, {codec.num_codebooks} codebooks"
    facts = {"backend": codec.name, "codebooks": codec.num_codebooks}
    facts["finite"] = bool(np.isfinite(came_back).all())
    if not facts["finite"]:
        line = f"{which}: a second of speech came back with NaN: are the weights whole?"
        return Finding("codec", "problem", line, facts)
    facts |= {"sent_dbfs": round(level(sent), 1), "came_back_dbfs": round(level(came_back), 1)}
    facts["resemblance"] = alike = round(resemblance(sent, came_back), 3)
    heard = f"{which}: a second of speech came back at {facts['came_back_dbfs']:.0f} dBFS"
    heard += f" ({facts['sent_dbfs']:.0f} sent), resemblance {alike:.2f}"
    if level(came_back) < QUIET:
        return Finding("codec", "problem", f"{heard}: silence; are the weights whole?", facts)
    if not trained:
        return Finding("codec", "ok", f"{heard} (not judged: not Kyutai's codec)", facts)
    if alike < RESEMBLES:
        return Finding("codec", "problem", f"{heard}: it is not what was sent", facts)
    return Finding("codec", "ok", heard, facts)


def resemblance(a: np.ndarray, b: np.ndarray) -> float:
    """How alike two sounds are to an ear: the correlation of their loudness by moment and band.

    Args:
        a, b: float `[N]` at 24 kHz. Phases do not count, nor does the volume.
    """
    a, b = _loudness(a), _loudness(b)
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norm) if norm else 0.0


def _loudness(sound: np.ndarray) -> np.ndarray:
    """Decibels by 40 ms and by band (12 a piece, wider towards the top), less each band's mean."""
    blocks = sound[: len(sound) // 960 * 960].reshape(-1, 960)
    power = np.abs(np.fft.rfft(blocks * np.hanning(960), axis=1)) ** 2
    edges = np.unique(np.geomspace(4, power.shape[1], 13).astype(int))
    bands = np.add.reduceat(power, edges[:-1], axis=1)
    decibels = 10 * np.log10(bands + 1e-6)
    return decibels - decibels.mean(axis=0)


# -- frame time -----------------------------------------------------------------------------------


def check_frame_time(case: Case) -> Finding:
    """The time of a frame, sound to sound, once attention's windows are full."""
    try:
        session = _open_session(case)
    except NotDownloaded as error:
        return Finding("frame time", "skipped", str(error))
    case.progress("timing a second of frames")
    return judge_times(frame_times(session), case.context or _context(session))


def _open_session(case: Case) -> Session:
    models = []
    for chosen in case.models:
        case.progress(f"loading {chosen.name}")
        models.append(chosen.model)
    return open_talk(*models, context=case.context)


def _context(session: Session) -> int:
    return session.model.lm.cfg.transformer.context


def frame_times(session: Session, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Milliseconds of a second's frames of a talk whose windows are full, fewer on a slow machine."""
    sound = speech(2 * WARM_UP + SECOND)
    for pcm in sound[:WARM_UP]:
        session.step(pcm)
    for one in (session, session.user) if isinstance(session, Dialogue) else (session,):
        fill_window(one.generator)
    for pcm in sound[WARM_UP : 2 * WARM_UP]:  # a full window is traced anew
        session.step(pcm)
    times, began = [], clock()
    for pcm in sound[2 * WARM_UP :]:
        start = clock()
        session.step(pcm)
        times.append(1000 * (clock() - start))
        if clock() - began > PATIENCE_SECONDS:
            break
    return times


def fill_window(generator: FrameGenerator) -> None:
    """Take a talk that has begun to where all its windows are full: attention reads all of them.

    What the new keys and values hold is of no use but for timing: zeros.
    """
    arrays, meta = generator.state()
    for i, layer in enumerate(generator.caches):
        window = layer.self_attn.window
        for name in (f"layers.{i}.keys", f"layers.{i}.values"):
            held = arrays[name]
            missing = (*held.shape[:2], window - held.shape[2], held.shape[3])
            arrays[name] = mx.concatenate([held, mx.zeros(missing, held.dtype)], axis=2)
        for name in ("length", "offset"):
            meta[f"layers.{i}.{name}"] = max(window, meta[f"layers.{i}.{name}"])
    generator.load_state(arrays, meta)


def judge_times(times: list[float], context: int) -> Finding:
    """The verdict on frame times in milliseconds."""
    median, p95 = (float(np.percentile(times, percent)) for percent in (50, 95))
    facts = {
        "real_time": median <= FRAME_MS,
        "median_ms": round(median, 1),
        "p95_ms": round(p95, 1),
        "budget_ms": FRAME_MS,
        "frames": len(times),
        "context": context,
    }
    of = f"{median:.0f} of {FRAME_MS:.0f} ms (p95 {p95:.0f}) with {context} frames in sight"
    if median > FRAME_MS:
        line = f"real time: no, {of}: {too_slow_message(median, context)}"
        return Finding("frame time", "problem", line, facts)
    if p95 > FRAME_MS:
        return Finding("frame time", "ok", f"real time: just, {of}: close other programs", facts)
    return Finding("frame time", "ok", f"real time: yes, {of}", facts)
