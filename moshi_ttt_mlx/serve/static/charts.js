// Small canvases: the voices' levels and the lines of lag and frame time. Colours come from the style
// sheet, so that light and dark need no code.

const FLOOR_DB = -60;
const BARS = 400; // more than any screen shows
const POINTS = 180; // a minute of the server's meters
const STILL = matchMedia('(prefers-reduced-motion: reduce)');

const decibel = (level) => 20 * Math.log10(Math.max(level, 1e-6));

/** A level (RMS, full scale 1) as 0..1 of the meter's height. */
export const height = (level) => Math.min(1, Math.max(0, 1 - decibel(level) / FLOOR_DB));

/** Match the canvas to its place on the screen; give its context in CSS pixels. */
function prepare(canvas) {
  const { clientWidth: width, clientHeight: tall } = canvas;
  const scale = window.devicePixelRatio || 1;
  const [pixels, lines] = [Math.round(width * scale), Math.round(tall * scale)];
  if (canvas.width !== pixels || canvas.height !== lines) {
    canvas.width = pixels;
    canvas.height = lines;
  }
  const pen = canvas.getContext('2d');
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, tall);
  return { pen, width, tall, colour: getComputedStyle(canvas) };
}

/** Draw now, when the canvas gets another size, and when the system changes its colours. */
function redraw(canvas, draw) {
  new ResizeObserver(draw).observe(canvas);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
}

/** The last seconds of a voice as bars, newest at the right; one still bar with reduced motion. */
export class LevelStrip {
  constructor(canvas) {
    this.canvas = canvas;
    this.levels = [];
    redraw(canvas, () => this.draw());
  }

  push(level) {
    this.levels.push(height(level));
    if (this.levels.length > BARS) this.levels.shift();
    this.draw();
  }

  clear() {
    this.levels = [];
    this.draw();
  }

  draw() {
    const { pen, width, tall, colour } = prepare(this.canvas);
    if (STILL.matches) this.#drawStill(pen, width, tall, colour);
    else this.#drawBars(pen, width, tall, colour);
  }

  #drawBars(pen, width, tall, colour) {
    const [bar, step] = [3, 5];
    const count = Math.floor(width / step);
    const shown = this.levels.slice(-count);
    for (let i = 0; i < count; i++) {
      const level = shown[shown.length - 1 - i] ?? 0;
      const size = Math.max(bar, level * tall);
      pen.fillStyle = level > 0.02 ? colour.color : colour.getPropertyValue('--track');
      pen.beginPath();
      pen.roundRect(width - (i + 1) * step, (tall - size) / 2, bar, size, bar / 2);
      pen.fill();
    }
  }

  #drawStill(pen, width, tall, colour) {
    const bar = (length, style) => {
      pen.fillStyle = style;
      pen.beginPath();
      pen.roundRect(0, tall / 2 - 4, length, 8, 4);
      pen.fill();
    };
    bar(width, colour.getPropertyValue('--track'));
    bar((this.levels.at(-1) ?? 0) * width, colour.color);
  }
}

/** A line of the last values with a marked limit. */
export class Sparkline {
  /** @param {HTMLCanvasElement} canvas @param {number|null} limit drawn as a dashed line */
  constructor(canvas, limit = null) {
    this.canvas = canvas;
    this.limit = limit;
    this.values = [];
    redraw(canvas, () => this.draw());
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > POINTS) this.values.shift();
    this.draw();
  }

  clear() {
    this.values = [];
    this.draw();
  }

  draw() {
    const { pen, width, tall, colour } = prepare(this.canvas);
    const top = Math.max((this.limit ?? 0) * 1.25, 1e-9, ...this.values);
    const y = (value) => tall - 2 - (value / top) * (tall - 4);
    const floor = this.limit == null ? tall - 1 : y(this.limit);
    pen.setLineDash(this.limit == null ? [] : [3, 3]);
    this.#line(pen, colour.getPropertyValue('--track-strong'), [[0, floor], [width, floor]]);
    pen.setLineDash([]);
    pen.lineWidth = 1.5;
    const first = POINTS - this.values.length;
    const x = (i) => ((first + i) / (POINTS - 1)) * (width - 2);
    this.#line(pen, colour.color, this.values.map((value, i) => [x(i), y(value)]));
  }

  #line(pen, style, points) {
    pen.strokeStyle = style;
    pen.lineJoin = 'round';
    pen.beginPath();
    for (const [x, y] of points) pen.lineTo(x, y);
    pen.stroke();
  }
}
