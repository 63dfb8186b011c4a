"""The parts of the page that run on its audio thread, by their numbers: they need no sound to run."""

import numpy as np
import pytest

from .chromium import FRAME, NEEDS_CHROMIUM, RATE

pytest.importorskip("aiohttp", reason="needs aiohttp: requirements/web.txt")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

pytestmark = NEEDS_CHROMIUM


def run(page, body):
    """The value of JavaScript that may use JitterBuffer, its constants and Resampler."""
    imports = """
    const { JitterBuffer, CUSHION, CALM, LIMIT } = await import('/static/jitter.js');
    const { Resampler } = await import('/static/resampler.js');
    const frame = (value) => new Float32Array(1920).fill(value);
    const pull = (queue, count) => { const out = new Float32Array(count); queue.pull(out); return out; };
    """
    return page.evaluate(f"async () => {{ {imports} {body} }}")


def test_the_queue_plays_everything_in_order(page):
    out = run(
        page,
        """const queue = new JitterBuffer();
        const sound = Float32Array.from({ length: 3840 }, (_, i) => i / 3840);
        queue.push(sound.subarray(0, 1920));
        queue.push(sound.subarray(1920));
        const out = [];
        while (queue.size) out.push(...pull(queue, 32));
        return [CUSHION, ...out];""",
    )
    cushion, sound = int(out[0]), np.array(out[1:])
    assert not sound[:cushion].any()
    assert np.allclose(sound[cushion:], np.arange(2 * FRAME) / (2 * FRAME), atol=1e-6)  # float32


def test_a_late_frame_is_a_gap_once(page):
    gaps, size, edges = run(
        page,
        """const queue = new JitterBuffer();
        queue.push(frame(0.5));
        pull(queue, CUSHION + 1900);
        const dry = pull(queue, 2000);
        queue.push(frame(0.5));
        const wet = pull(queue, 200);
        return [queue.gaps, queue.size, [...dry.slice(20), ...wet]];""",
    )
    assert gaps == 1
    assert size == FRAME - 200
    # Ramps, not steps: 64 samples from 0.5 to 0 and back.
    assert np.abs(np.diff(edges)).max() < 0.5 / 60


def test_a_long_queue_loses_silence_first(page):
    skipped, size, kept = run(
        page,
        """const queue = new JitterBuffer();
        for (const value of [0, 0, 0, 0, 0, 0.5]) queue.push(frame(value));
        const before = queue.size;
        pull(queue, 128);
        return [queue.skipped, queue.size + queue.skipped + 128 - before,
                [...pull(queue, queue.size)].filter((sample) => sample > 0.1).length];""",
    )
    assert skipped >= 2 * FRAME
    assert size == 0  # nothing else is missing
    assert kept == FRAME


def test_a_loud_queue_is_bounded(page):
    largest, calm, size = run(
        page,
        """const queue = new JitterBuffer();
        let largest = 0;
        for (let i = 0; i < 40; i++) { queue.push(frame(0.5)); largest = Math.max(largest, queue.size); }
        queue.clear();
        for (let i = 0; i < 12; i++) queue.push(frame(0.5));
        return [largest / LIMIT, CALM, queue.size];""",
    )
    assert largest <= 1
    assert size == calm


# 125 Hz: a period fits. 45 Hz: none does, so that only the blending is left against a step.
@pytest.mark.parametrize("pitch", [125, 45])
def test_a_voice_without_a_pause_catches_up_slowly(page, pitch):
    calm, size, gaps, skipped, gone, *out = run(
        page,
        """const queue = new JitterBuffer();
        let n = 0;
        const tone = () => new Float32Array(1920).map(() => 0.5 * Math.sin(PHASE * n++));
        for (let i = 0; i < 7; i++) queue.push(tone());
        const before = queue.size;
        const out = [];
        for (let i = 0; i < 250; i++) {
          queue.push(tone());
          for (let part = 0; part < 15; part++) out.push(...pull(queue, 128));
        }
        const gone = before - queue.size;
        return [CALM, queue.size, queue.gaps, queue.skipped, gone, ...out];""".replace(
            "PHASE", str(2 * np.pi * pitch / RATE)
        ),
    )
    sound, slope = np.array(out[2880:]), 0.5 * 2 * np.pi * pitch / RATE
    assert gaps == 0 and skipped == gone
    assert size < calm + FRAME
    assert np.abs(np.diff(sound)).max() < 2 * slope
    peak = np.argmax(np.abs(np.fft.rfft(sound))) * RATE / len(sound)
    assert peak == pytest.approx(pitch, rel=0.01)
    if pitch == 125:  # and as loud: it does not cancel itself
        loudness = np.sqrt((sound[: len(sound) // 192 * 192].reshape(-1, 192) ** 2).mean(axis=1))
        assert loudness.min() > 0.9 * loudness.max()


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100, 48000, 96000])
def test_the_resampler_keeps_a_tone_and_its_pace(page, rate):
    tone = 1000
    out = run(
        page,
        f"""const resampler = new Resampler({rate}, 24000);
        const out = [];
        for (let start = 0; start < {rate}; start += 128) {{
          const block = Float32Array.from({{ length: 128 }},
            (_, i) => Math.sin(2 * Math.PI * {tone} * (start + i) / {rate}));
          out.push(...resampler.push(block));
        }}
        return out;""",
    )
    out = np.array(out)
    blocks = -(-rate // 128) * 128
    # The filter holds back 16 periods of the lower rate, at most 2 ms.
    assert blocks / rate - 0.0045 <= len(out) / RATE <= blocks / rate + 1e-4
    middle = out[RATE // 4 : RATE // 4 + RATE // 2]
    spectrum = np.abs(np.fft.rfft(middle)) / (len(middle) / 2)
    assert spectrum[tone // 2] == pytest.approx(1, abs=0.01)
    rest = np.delete(spectrum, tone // 2)
    assert np.sqrt((rest**2).sum()) < 1e-3  # float32 and the window's side lobes


def test_the_resampler_lets_no_alias_through(page):
    out = run(
        page,
        """const resampler = new Resampler(48000, 24000);
        return [...resampler.push(Float32Array.from({ length: 48000 },
          (_, i) => Math.sin(2 * Math.PI * 15000 * i / 48000)))];""",
    )
    assert np.abs(np.array(out)[1000:]).max() < 1e-2  # 9 kHz would be its alias
