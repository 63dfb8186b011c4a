// Runs on the audio thread: plays the frames it is sent and reports, ten times a second, how it goes.
// In: Float32Array (a frame of 24 kHz sound) or "clear". Out: {level, buffered, played, skipped, gaps}.

import { JitterBuffer } from './jitter.js';

const REPORT_SAMPLES = 2400;

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = new JitterBuffer();
    this.energy = 0;
    this.samples = 0;
    this.port.onmessage = ({ data }) => {
      if (data === 'clear') this.queue.clear();
      else this.queue.push(data);
    };
  }

  process(_inputs, [channels]) {
    const out = channels[0];
    this.queue.pull(out);
    for (const sample of out) this.energy += sample * sample;
    this.samples += out.length;
    for (const channel of channels.slice(1)) channel.set(out);
    if (this.samples >= REPORT_SAMPLES) this.#report();
    return true;
  }

  #report() {
    const { size, played, skipped, gaps } = this.queue;
    const level = Math.sqrt(this.energy / this.samples);
    this.port.postMessage({ level, buffered: size, played, skipped, gaps });
    this.energy = 0;
    this.samples = 0;
  }
}

registerProcessor('playback', Playback);
