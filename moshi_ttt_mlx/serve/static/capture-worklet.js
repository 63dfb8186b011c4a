// Runs on the audio thread: cuts the microphone's sound into frames of 1920 samples at 24 kHz.
// Out: {frame: Float32Array [1920], level: RMS, full scale 1}.

import { Resampler } from './resampler.js';

const RATE = 24000;
const FRAME = 1920;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.frame = new Float32Array(FRAME);
    this.filled = 0;
  }

  process([channels]) {
    // Without a source there are no channels; a stereo microphone's first one is enough.
    if (channels.length) this.#take(this.resampler.push(channels[0]));
    return true;
  }

  #take(samples) {
    for (let start = 0; start < samples.length; ) {
      const part = samples.subarray(start, start + FRAME - this.filled);
      this.frame.set(part, this.filled);
      this.filled += part.length;
      start += part.length;
      if (this.filled === FRAME) this.#send();
    }
  }

  #send() {
    const energy = this.frame.reduce((sum, sample) => sum + sample * sample, 0);
    const message = { frame: this.frame, level: Math.sqrt(energy / FRAME) };
    this.port.postMessage(message, [this.frame.buffer]);
    this.frame = new Float32Array(FRAME);
    this.filled = 0;
  }
}

registerProcessor('capture', Capture);
