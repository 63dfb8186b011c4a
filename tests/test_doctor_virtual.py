"""The examination of sound devices on real PortAudio, with devices made of software."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import moshi_ttt_mlx

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

from virtual_sound import VirtualSound, missing  # noqa: E402

CLIP = Path(moshi_ttt_mlx.__file__).parent / "assets" / "demo_clip.flac"

pytestmark = [
    pytest.mark.audio_device,
    pytest.mark.skipif(missing() is not None, reason=f"virtual sound devices: {missing()}"),
]

LISTEN = """
import json
from moshi_ttt_mlx.doctor import Case, Chosen
from moshi_ttt_mlx.doctor.sound import check_loudspeaker, check_microphone

case = Case(Chosen({}))
print(json.dumps([check(case).to_dict() for check in (check_microphone, check_loudspeaker)]))
"""


def examined(sound):
    search = os.pathsep.join(filter(None, [str(ROOT), sound.env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", LISTEN]
    env = sound.env | {"PYTHONPATH": search}
    return json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)


def test_a_silent_microphone_and_one_that_hears():
    # Not tmp_path: a socket's path has to be short.
    with (
        tempfile.TemporaryDirectory(prefix="sound-") as folder,
        VirtualSound(Path(folder)) as sound,
    ):
        microphone, loudspeaker = examined(sound)
        assert microphone["verdict"] == "problem" and "exact zeros" in microphone["line"]
        assert loudspeaker["verdict"] == "ok" and loudspeaker["facts"]["host"] == "ALSA"
        playing = threading.Thread(target=sound.play, args=(CLIP,))
        playing.start()  # eight seconds
        microphone, loudspeaker = examined(sound)
        playing.join()
        assert microphone["verdict"] == loudspeaker["verdict"] == "ok"
        assert -60 < microphone["facts"]["rms_dbfs"] < -10
