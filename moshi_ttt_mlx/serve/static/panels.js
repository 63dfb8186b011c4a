// What the meters show: timing and memory. They only read messages; nothing here acts on the talk.

import { Sparkline } from './charts.js';
import { clock } from './transcript.js';

const $ = (id) => document.getElementById(id);
const FRAME_MS = 80;
const LAG_LIMIT_MS = 240;
const SAMPLES_PER_MS = 24;

const milliseconds = (value) => (value == null ? '–' : `${Math.round(value)} ms`);
const count = (value) => (value == null ? '–' : value.toLocaleString('en'));
const small = (value) => (value == null ? '–' : Number(value.toPrecision(3)).toString());

function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

export class TimingPanel {
  constructor() {
    this.lag = new Sparkline($('lag-spark'), LAG_LIMIT_MS);
    this.frame = new Sparkline($('frame-spark'), FRAME_MS);
  }

  clear() {
    this.lag.clear();
    this.frame.clear();
    for (const id of ['lag', 'frame', 'buffered']) show(id, '–');
  }

  /** @param {object} meter the server's message @param {number} unsent frames the network refused */
  meter({ age, lag_ms, frame_ms, dropped }, unsent) {
    show('age', clock(age));
    show('lag', milliseconds(lag_ms));
    show('frame', frame_ms == null ? '–' : `${Math.round(frame_ms)} of ${FRAME_MS} ms`);
    show('dropped', count(dropped + unsent));
    $('lag').classList.toggle('bad', lag_ms > LAG_LIMIT_MS);
    $('frame').classList.toggle('bad', frame_ms > FRAME_MS);
    this.lag.push(lag_ms);
    if (frame_ms != null) this.frame.push(frame_ms);
  }

  /** @param {object} played the playback worklet's report, in samples */
  played({ buffered, gaps, skipped }) {
    show('buffered', milliseconds(buffered / SAMPLES_PER_MS));
    show('gaps', count(gaps));
    show('skipped', milliseconds(skipped / SAMPLES_PER_MS));
  }
}

const MODES = { on: 'learning', frozen: 'frozen', off: 'off' };

export class MemoryPanel {
  /** @param {(mode: string) => void} onMode the user chose `on` or `frozen` */
  constructor(onMode) {
    this.drift = new Sparkline($('drift-spark'));
    $('memory-modes').addEventListener('change', ({ target }) => onMode(target.value));
  }

  /** @param {object} info of /api/info */
  useInfo({ memory }) {
    $('memory-body').hidden = !memory;
    $('memory-none').hidden = Boolean(memory);
    show('memory-mode', memory ? `in ${count(memory.layers.length)} of the model's layers` : 'none');
  }

  clear() {
    this.drift.clear();
    for (const id of ['updates', 'tokens', 'step', 'drift']) show(id, '–');
  }

  /** @param {number} context the window's size in frames */
  meter({ memory, window_fill }, context) {
    $('window-fill').value = window_fill;
    const frames = Math.round(window_fill * context);
    show('window-value', `${count(frames)} of ${count(context)} frames`);
    if (memory) this.#memory(memory);
  }

  #memory({ mode, ok, updates, tokens, step, drift }) {
    show('memory-mode', ok ? MODES[mode] ?? mode : 'shut: no longer finite');
    show('updates', count(updates));
    show('tokens', count(tokens));
    show('step', small(step));
    show('drift', small(drift));
    if (drift != null) this.drift.push(drift);
    this.setMode(mode);
  }

  setMode(mode) {
    const choice = $('memory-modes').querySelector(`[value="${CSS.escape(mode)}"]`);
    if (choice) choice.checked = true;
  }

  /** A memory that was off at the start stays off. */
  allow(allowed) {
    $('memory-modes').disabled = !allowed;
  }
}
