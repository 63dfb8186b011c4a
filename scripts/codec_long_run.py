"""Measure rustymimi past its wall, on random weights: `make_mimi_checkpoint.py W --config kyutai`.

python scripts/codec_long_run.py W long --frames 10000   # frames, milliseconds, memory
python scripts/codec_long_run.py W warmup --frames 550   # agreement at a seam, by warm-up
python scripts/codec_long_run.py W costs                 # a tokenizer: time, memory, table size
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import rustymimi

from moshi_ttt_mlx.rusty_codec import FRAME_SIZE, RustyCodec

AFTER_SEAM = 25  # frames compared


def sound(frames: int) -> np.ndarray:
    """Syllables of a gliding tone with breath in them, float32 `[frames, 1920]`."""
    t = np.arange(frames * FRAME_SIZE) / 24000
    syllables = np.abs(np.sin(2 * np.pi * 3.1 * t)) * (np.sin(2 * np.pi * 0.37 * t) > -0.3)
    voice = 0.2 * np.sin(2 * np.pi * (150 + 40 * np.sin(2 * np.pi * 0.7 * t)) * t)
    breath = 0.05 * np.random.default_rng(1).standard_normal(t.size)
    return (syllables * (voice + breath)).astype(np.float32).reshape(frames, FRAME_SIZE)


def memory_mb() -> float:
    """Resident memory now; where /proc is missing (macOS), the most there has been."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def long(weights: Path, frames: int) -> None:
    """Encode and decode without end; every 1000 frames, what a frame took and what is in memory."""
    codec, pcm, spent = RustyCodec(weights), sound(1000), []
    for n in range(frames):
        start = time.perf_counter()
        out = codec.decode(codec.encode(pcm[n % len(pcm)]))
        spent.append(time.perf_counter() - start)
        if not np.isfinite(out).all():
            sys.exit(f"frame {n}: not finite")
        if (n + 1) % 1000 == 0:
            ms = 1e3 * np.percentile(spent, [50, 95, 100])
            print(
                f"frame {n + 1:6}: p50 {ms[0]:5.1f} ms, p95 {ms[1]:5.1f}, worst {ms[2]:6.1f}; "
                f"{memory_mb():.0f} MB; loudness {out.std():.3f}",
                flush=True,
            )
            spent.clear()


def run_raw(weights: Path, pcm: np.ndarray, codes: np.ndarray | None) -> list[np.ndarray]:
    """A plain tokenizer: its codes for `pcm` and its samples for `codes` (its own if None)."""
    raw = rustymimi.Tokenizer(str(weights), num_codebooks=8)
    own = np.stack([raw.encode_step(frame[None, None])[0, :, 0] for frame in pcm])
    given = own if codes is None else codes
    return [own, np.stack([raw.decode_step(frame[None, :, None])[0, 0] for frame in given])]


def warmup(weights: Path, frames: int) -> None:
    """Compare tokenizers that begin `w` frames before a seam with one that began at frame 0."""
    pcm, seam = sound(frames), frames - AFTER_SEAM
    codes, samples = run_raw(weights, pcm, None)
    print("warm-up  codes equal  first codebook  largest difference  below the sound")
    for w in (1, 8, 32, 64, 125, 250, 500):
        if w > seam:
            break
        new = run_raw(weights, pcm[seam - w :], codes[seam - w :])
        equal, error = new[0][w:] == codes[seam:], new[1][w:] - samples[seam:]
        below = 10 * np.log10(np.square(samples[seam:]).mean() / np.square(error).mean())
        print(
            f"{w:7}  {equal.mean():11.3f}  {equal[:, 0].mean():14.2f}  "
            f"{np.abs(error).max():18.1e}  {below:12.1f} dB",
            flush=True,
        )


def costs(weights: Path, frames: int) -> None:
    """Time and resident memory of one tokenizer when new, and what `frames` frames add to it."""
    pcm = sound(frames)
    for steps in (1000, 8192, 16384, 1_000_000):
        before, start = memory_mb(), time.perf_counter()
        raw = rustymimi.Tokenizer(str(weights), num_codebooks=8, max_seq_len=steps)
        took, new = time.perf_counter() - start, memory_mb()
        start = time.perf_counter()
        for frame in pcm:
            raw.decode_step(raw.encode_step(frame[None, None]))
        ms = 1e3 * (time.perf_counter() - start) / frames
        print(
            f"table {steps:7}: made in {1e3 * took:5.0f} ms, {new - before:4.0f} MB; "
            f"{frames} frames add {memory_mb() - new:5.1f} MB at {ms:.1f} ms a frame",
            flush=True,
        )
        del raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("what", choices=("long", "warmup", "costs"))
    parser.add_argument("--frames", type=int, default=200)
    args = parser.parse_args()
    {"long": long, "warmup": warmup, "costs": costs}[args.what](args.weights, args.frames)


if __name__ == "__main__":
    main()
