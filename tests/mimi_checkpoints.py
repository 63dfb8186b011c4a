"""Random Mimi checkpoints for tests, made once by `scripts/make_mimi_checkpoint.py` and kept."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "make_mimi_checkpoint.py"
FRAME = 1920


def checkpoint(config: str) -> Path:
    """The file of `small` or `kyutai` (385 MB); its name changes with the script that makes it."""
    default = Path.home() / ".cache" / "moshi-ttt-mlx-tests"
    folder = Path(os.environ.get("MOSHI_TTT_TEST_CACHE", default))
    made_by = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    path = folder / f"mimi-{config}-{made_by}.safetensors"
    if not path.exists():
        search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
        command = [sys.executable, str(SCRIPT), str(path), "--config", config]
        subprocess.run(command, check=True, env=env)
    return path


def sound(frames: int, seed: int = 0) -> np.ndarray:
    """Syllables of a gliding tone with breath in them, float32 `[frames, 1920]`."""
    t = np.arange(frames * FRAME) / 24000
    syllables = np.abs(np.sin(2 * np.pi * 3.1 * t)) * (np.sin(2 * np.pi * 0.37 * t) > -0.3)
    voice = 0.2 * np.sin(2 * np.pi * (150 + 40 * np.sin(2 * np.pi * 0.7 * t)) * t)
    breath = 0.05 * np.random.default_rng(seed).standard_normal(t.size)
    return (syllables * (voice + breath)).astype(np.float32).reshape(frames, FRAME)
