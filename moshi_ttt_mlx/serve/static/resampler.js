// A streaming resampler, for browsers that refuse a 24 kHz graph on a 48 kHz microphone (Firefox).
// Windowed sinc, one filter per phase; equal rates pass through untouched.

const ZERO_CROSSINGS = 16; // per side, at the lower of the two rates
const PASSBAND = 0.92; // of the lower Nyquist frequency; the rest is the filter's slope

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

/** Filters [up][taps]: phase p evaluates the input p/up of a sample later. */
function makeFilters(up, down) {
  const cutoff = PASSBAND * Math.min(1, up / down);
  const half = Math.ceil((ZERO_CROSSINGS * Math.max(up, down)) / up);
  return Array.from({ length: up }, (_, phase) => {
    const filter = Float32Array.from({ length: 2 * half }, (_, tap) => {
      const x = tap - half + 1 - phase / up;
      const sinc = x === 0 ? 1 : Math.sin(Math.PI * cutoff * x) / (Math.PI * cutoff * x);
      const hann = Math.abs(x) < half ? 0.5 + 0.5 * Math.cos((Math.PI * x) / half) : 0;
      return sinc * hann;
    });
    const sum = filter.reduce((total, weight) => total + weight, 0);
    return filter.map((weight) => weight / sum); // every phase passes a constant unchanged
  });
}

export class Resampler {
  /** @param {number} from input rate in Hz @param {number} to output rate in Hz, both integers */
  constructor(from, to) {
    const divisor = gcd(from, to);
    this.up = to / divisor;
    this.down = from / divisor;
    this.filters = this.up === this.down ? null : makeFilters(this.up, this.down);
    this.rest = new Float32Array(0); // input that later outputs still need
    this.position = 0; // of the next output, in 1/up input samples from the start of `rest`
  }

  /** Take input samples of any number; give the output samples they complete. */
  push(input) {
    if (!this.filters) return input;
    const data = new Float32Array(this.rest.length + input.length);
    data.set(this.rest);
    data.set(input, this.rest.length);
    const taps = this.filters[0].length;
    const output = [];
    for (;;) {
      const start = Math.floor(this.position / this.up);
      if (start + taps > data.length) break;
      const filter = this.filters[this.position % this.up];
      let sum = 0;
      for (let tap = 0; tap < taps; tap++) sum += filter[tap] * data[start + tap];
      output.push(sum);
      this.position += this.down;
    }
    const used = Math.min(Math.floor(this.position / this.up), data.length);
    this.rest = data.slice(used);
    this.position -= used * this.up;
    return Float32Array.from(output);
  }
}
