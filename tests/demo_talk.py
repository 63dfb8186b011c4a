"""A small talk for the demo's tests: tones for the user's voice, and the json beside them."""

import json

import numpy as np
import soundfile

from moshi_ttt_mlx.audio import FRAME_SIZE, SAMPLE_RATE

TURNS = [
    {"start": 0.4, "end": 1.2, "kind": "tell", "text": "Remember, my cat is Bella."}
    | {"key": "cat", "value": "Bella"},
    {"start": 2.0, "end": 2.5, "kind": "talk", "text": "Hello there."},
    {"start": 3.0, "end": 3.6, "kind": "ask", "text": "What is my cat?"}
    | {"key": "cat", "value": "Bella"},
]
FRAMES = 60


def user_sound(frames=FRAMES, turns=TURNS):
    """A tone while the user speaks, else silence: float32 `[frames * 1920]`."""
    time = np.arange(frames * FRAME_SIZE) / SAMPLE_RATE
    speaking = sum((turn["start"] <= time) & (time < turn["end"]) for turn in turns)
    return (0.3 * speaking * np.sin(2 * np.pi * 220 * time)).astype(np.float32)


def write_talk(folder, turns=TURNS, frames=FRAMES, name="talk"):
    """Write `talk.flac` and `talk.json`; returns the path of the first."""
    path = folder / f"{name}.flac"
    soundfile.write(path, user_sound(frames, turns), SAMPLE_RATE, subtype="PCM_16")
    notes = json.dumps({"voice": "a tone", "turns": turns})
    path.with_suffix(".json").write_text(notes)
    return path
