// The queue in front of the loudspeaker: bounded, and always on its way back to a short delay.
//
// Start:    a little silence goes ahead of the first frame, so that a late second frame is no gap.
// Too late: silence is played and the gap counted. The late frame then finds a longer queue: lateness
//           that happened once is allowed for, by itself.
// Too long: above CALM, silent stretches are left out; nobody hears that. A voice without pauses loses
//           a period now and then, blended, which makes it a little faster. At LIMIT the oldest sound
//           goes, down to CALM: a jump once is better than a delay for good.
// Every edge is a ramp of RAMP samples, because a step is a click.

const MS = 24; // samples
export const CUSHION = 60 * MS;
export const CALM = 240 * MS;
export const LIMIT = 1000 * MS;
const STRETCH = 20 * MS;
const SILENT = 10 ** (-50 / 20); // RMS, full scale 1
const [SHORTEST, LONGEST] = [5 * MS, 20 * MS]; // a period to leave out
const BLEND = 10 * MS;
const BETWEEN_CUTS = 500 * MS; // at most 4 % faster
const RAMP = 64;
const CAPACITY = 1 << 15;
const MASK = CAPACITY - 1;

export class JitterBuffer {
  constructor() {
    this.ring = new Float32Array(CAPACITY);
    this.played = 0; // samples of sound given out
    this.skipped = 0; // samples left out to catch up
    this.gaps = 0; // times that there was nothing to play in the middle of a talk
    this.clear();
  }

  /** Forget what waits; the next frame counts as the first. */
  clear() {
    this.read = 0;
    this.size = 0;
    this.flowing = false;
    this.fresh = true;
    this.ramp = 0; // position in the fade-in, RAMP when over
    this.last = 0; // the sample from which a fade-out starts
    this.uncut = 0; // samples played since a period was left out
  }

  /** @param {Float32Array} samples one frame of reply */
  push(samples) {
    if (this.fresh) this.#append(new Float32Array(CUSHION));
    this.fresh = false;
    const excess = this.size + samples.length - LIMIT;
    if (excess > 0) this.#drop(Math.min(this.size, this.size + samples.length - CALM));
    this.#append(samples);
  }

  /** Fill `out` with what comes next. @param {Float32Array} out */
  pull(out) {
    this.#catchUp();
    const count = Math.min(out.length, this.size);
    for (let i = 0; i < count; i++) {
      const gain = this.ramp < RAMP ? ++this.ramp / RAMP : 1;
      out[i] = this.ring[(this.read + i) & MASK] * gain;
    }
    this.read = (this.read + count) & MASK;
    this.size -= count;
    this.played += count;
    this.uncut += count;
    if (count) this.last = out[count - 1];
    if (count < out.length) this.#runDry(out, count);
    else this.flowing = true;
  }

  #append(samples) {
    for (let i = 0; i < samples.length; i++) {
      this.ring[(this.read + this.size + i) & MASK] = samples[i];
    }
    this.size += samples.length;
  }

  #drop(count) {
    this.read = (this.read + count) & MASK;
    this.size -= count;
    this.skipped += count;
    this.ramp = 0;
  }

  #catchUp() {
    while (this.size > CALM + STRETCH && this.#silentAhead()) {
      this.read = (this.read + STRETCH) & MASK;
      this.size -= STRETCH;
      this.skipped += STRETCH;
    }
    if (this.size > CALM + LONGEST + BLEND && this.uncut >= BETWEEN_CUTS) this.#shorten();
  }

  /** Leave out what makes the sound go on most like before. */
  #shorten() {
    const period = this.#period();
    for (let i = 0; i < BLEND; i++) {
      const [from, to] = [(this.read + i) & MASK, (this.read + period + i) & MASK];
      const share = (i + 1) / (BLEND + 1);
      this.ring[to] = (1 - share) * this.ring[from] + share * this.ring[to];
    }
    this.read = (this.read + period) & MASK;
    this.size -= period;
    this.skipped += period;
    this.uncut = 0;
  }

  /** The shift at which the next samples resemble themselves most. */
  #period() {
    let [best, likeness] = [LONGEST, -Infinity];
    for (let shift = SHORTEST; shift <= LONGEST; shift++) {
      let [product, energy] = [0, 1e-9];
      for (let i = 0; i < BLEND; i++) {
        const later = this.ring[(this.read + shift + i) & MASK];
        product += this.ring[(this.read + i) & MASK] * later;
        energy += later * later;
      }
      const found = product / Math.sqrt(energy);
      if (found > likeness) [best, likeness] = [shift, found];
    }
    return best;
  }

  #silentAhead() {
    let energy = 0;
    for (let i = 0; i < STRETCH; i++) energy += this.ring[(this.read + i) & MASK] ** 2;
    return energy / STRETCH < SILENT ** 2;
  }

  #runDry(out, from) {
    if (this.flowing) this.gaps += 1;
    this.flowing = false;
    for (let i = from; i < out.length; i++) {
      out[i] = this.last * Math.max(0, 1 - (i - from + 1) / RAMP);
    }
    this.last = 0;
    this.ramp = 0;
  }
}
