"""A talk of ten minutes in a real browser, past every wall that stops Moshi elsewhere.

    python scripts/browser_talk.py [--seconds 600] [--plot docs/images/browser_talk.png]

The walls: 3,000 frames, where Moshi's window is full (4:00), 4,000 steps (5:20) and frame 4,096
(5:27.68). The real server runs the small model of the tests, a headless Chromium opens the page, its
microphone says the same clip over and over. Prints what a person would feel (lag, drops, gaps) and the
memory of both sides as one line of JSON; exit status 1 when a check fails. On a machine with other
work, put `chrt --rr 1` before it. Needs chromium on PATH and playwright; the plot needs matplotlib.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
from make_small_model import SMALL
from playwright.sync_api import expect, sync_playwright

import moshi_ttt_mlx

CLIP = Path(moshi_ttt_mlx.__file__).parent / "assets" / "demo_clip.flac"
WALL_SECONDS = [frame * 0.08 for frame in (3000, 4000, 4096)]
WALLS = "frames 3,000, 4,000, 4,096"
SETTLED_SECONDS = 30  # by then every buffer has its final size
LATE_SAMPLES = 60  # a minute
LAG_MS = 240
REPLY_MS = 350  # what static/jitter.js comes down to by itself, and a frame

SAMPLE = """() => {
  const text = (id) => document.getElementById(id).textContent;
  const number = (id) => parseFloat(text(id).replaceAll(',', ''));
  const [minutes, seconds] = text('age').split(':').map(Number);
  return { age: 60 * minutes + seconds, lag: number('lag'), frame: number('frame'),
    buffered: number('buffered'), dropped: number('dropped'), gaps: number('gaps'),
    skipped: number('skipped'), state: text('state'), turns: document.querySelectorAll('.turn').length,
    heap: performance.memory.usedJSHeapSize / 2 ** 20 };
}"""


@contextmanager
def served():
    """The server with the small model: its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--hf-repo", str(SMALL), "--port", str(port), "--no-browser"]
    process = subprocess.Popen([sys.executable, "-m", "moshi_ttt_mlx", "serve", *flags])
    url = f"http://localhost:{port}"
    try:
        wait_for(process, url)
        yield process, url
    finally:
        process.terminate()
        process.wait(30)


def wait_for(process: subprocess.Popen, url: str) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/info", timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    sys.exit("the server did not start")


@contextmanager
def opened(url: str, microphone: Path):
    """The page, in a browser that hears a wav over and over."""
    arguments = [
        "--no-sandbox",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
    ]
    os.environ.pop("LD_PRELOAD", None)  # OpenBLAS is for MLX, not for a browser
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=arguments
        )
        page = browser.new_context(permissions=["microphone"]).new_page()
        page.goto(url)
        yield page
        browser.close()


def resident_mib(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def follow(page, process: subprocess.Popen, seconds: float) -> list[dict]:
    """A sample a second, until the talk is that old or no talk any more."""
    samples = []
    while not samples or (samples[-1]["age"] < seconds and samples[-1]["state"] == "Talking"):
        page.wait_for_timeout(1000)
        samples.append(page.evaluate(SAMPLE) | {"resident": resident_mib(process)})
    return samples


def talk(seconds: float) -> tuple[list[dict], float, int]:
    """Talk; returns the samples, the seconds of the recording and the number of words."""
    with tempfile.TemporaryDirectory() as folder:
        speech, rate = soundfile.read(CLIP)
        microphone = Path(folder) / "microphone.wav"
        soundfile.write(microphone, np.concatenate([speech, np.zeros(2 * rate)]), rate)
        with served() as (process, url), opened(url, microphone) as page:
            page.click("#start")
            expect(page.locator("#state")).to_have_text("Talking", timeout=60_000)
            samples = follow(page, process, seconds)
            page.click("#end")
            links = page.eval_on_selector_all("#downloads a", "all => all.map((a) => a.href)")
            wav = Path(folder) / "talk.wav"
            wav.write_bytes(urllib.request.urlopen(links[-1]).read())
            words = json.load(urllib.request.urlopen(links[1]))["words"]
            return samples, soundfile.info(wav).duration, len(words)


def summarise(samples: list[dict], recorded: float, words: int) -> dict:
    settled = next((s for s in samples if s["age"] >= SETTLED_SECONDS), samples[-1])
    last = samples[-1]
    of = {name: np.array([s[name] for s in samples]) for name in ("lag", "frame", "buffered")}
    return {
        "seconds": last["age"],
        "past_the_wall": last["age"] > max(WALL_SECONDS),
        "lag_ms_median": float(np.nanmedian(of["lag"])),
        "lag_ms_late": float(np.nanmedian(of["lag"][-LATE_SAMPLES:])),
        "lag_ms_max": float(np.nanmax(of["lag"])),
        "frame_ms_median": float(np.nanmedian(of["frame"])),
        "buffered_ms_late": float(np.nanmedian(of["buffered"][-LATE_SAMPLES:])),
        "buffered_ms_max": float(np.nanmax(of["buffered"])),
        "dropped": last["dropped"],
        "gaps": last["gaps"],
        "skipped_ms": last["skipped"],
        "recorded_seconds": round(recorded, 2),
        "words": words,
        "page_heap_mib": [round(settled["heap"], 1), round(last["heap"], 1)],
        "server_mib": [round(settled["resident"], 1), round(last["resident"], 1)],
    }


def faults(samples: list[dict], facts: dict) -> list[str]:
    checks = {
        "the talk ended early": samples[-1]["state"] == "Talking",
        "user frames were dropped": facts["dropped"] == 0,
        "the lag grew": facts["lag_ms_late"] < LAG_MS,
        "the reply stayed late": facts["buffered_ms_late"] < REPLY_MS,
        "the recording lacks sound": abs(facts["recorded_seconds"] - facts["seconds"]) < 3,
        "no words": facts["words"] > 0,
    }
    return [fault for fault, passed in checks.items() if not passed]


def plot(samples: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    age = [s["age"] for s in samples]
    figure, (lags, frames) = pyplot.subplots(2, sharex=True, figsize=(8, 4.5), layout="constrained")
    lags.plot(age, [s["lag"] for s in samples], label="lag: your sound that waits")
    lags.plot(age, [s["buffered"] for s in samples], label="reply that waits to be played")
    frames.plot(age, [s["frame"] for s in samples], label="frame time")
    frames.axhline(80, linestyle="--", color="grey", label="real time")
    for axes in (lags, frames):
        top = 1.3 * axes.get_ylim()[1]  # room for the legend
        axes.vlines(WALL_SECONDS, 0, top, color="tab:red", linewidth=1, label=WALLS)
        axes.set_ylabel("ms")
        axes.set_ylim(0, top)
        axes.legend(loc="upper right", fontsize="small", ncols=3)
    frames.set_xlabel("seconds of talk")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--plot", type=Path, help="png of lag and frame time over the talk")
    args = parser.parse_args()
    samples, recorded, words = talk(args.seconds)
    facts = summarise(samples, recorded, words)
    if args.plot:
        plot(samples, args.plot)
    found = faults(samples, facts)
    for fault in found:
        print(f"FAILED: {fault}")
    print(json.dumps(facts))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
