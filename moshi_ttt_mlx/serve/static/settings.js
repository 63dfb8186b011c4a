// The settings form: its limits from /api/info, its values kept in this browser, its devices.

import { canChooseSpeaker, listDevices } from './sound.js';
import { forever, keep, load } from './store.js';

const STORE = 'moshi-settings';
const FRAMES_PER_SECOND = 12.5;
const NUMBERS = ['temp', 'text_temp', 'top_k', 'seed', 'context'];
const CHECKS = ['echoCancellation', 'noiseSuppression', 'autoGainControl'];
const DEVICES = ['microphone', 'speaker'];

const SHOWN = {
  temp: (value) => value.toFixed(2),
  text_temp: (value) => value.toFixed(2),
  context: (value) => `${value} frames, ${duration(value / FRAMES_PER_SECOND)}`,
};

function duration(seconds) {
  return seconds < 60 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${(seconds / 60).toFixed(1)} min`;
}

const stored = () => load(forever, STORE) ?? {};

export class Settings {
  /** @param {HTMLFormElement} form @param {(name: string) => void} onDevice a device was chosen */
  constructor(form, onDevice) {
    this.form = form;
    this.fields = form.elements;
    // Not read from the lists: before the permission is given those are empty.
    this.devices = { microphone: '', speaker: '', ...stored().devices };
    form.addEventListener('input', ({ target }) => {
      if (DEVICES.includes(target.name)) this.devices[target.name] = target.value;
      this.#changed();
    });
    form.addEventListener('change', ({ target: { name } }) => {
      if (DEVICES.includes(name) || CHECKS.includes(name)) onDevice(name);
    });
    form.addEventListener('submit', (event) => event.preventDefault());
    document.getElementById('defaults').addEventListener('click', () => this.#reset());
    document.getElementById('speaker-field').hidden = !canChooseSpeaker();
    navigator.mediaDevices?.addEventListener?.('devicechange', () => this.refreshDevices());
  }

  /** @param {object} info the answer of /api/info */
  useInfo(info) {
    this.info = info;
    this.fields.context.max = info.max_context;
    this.fields.context.min = Math.min(25, info.max_context);
    this.fields.seed.placeholder = info.defaults.seed ?? 'random';
    document.getElementById('memory-field').hidden = !info.memory;
    this.#fill({ ...info.defaults, seed: '', ...stored() });
    this.refreshDevices();
  }

  /** What `start` sends; a field left empty means the server's default. */
  get talk() {
    const settings = {};
    for (const name of NUMBERS) {
      const value = this.fields[name].valueAsNumber;
      if (Number.isFinite(value)) settings[name] = value;
    }
    if (this.info.memory) settings.memory = this.fields.memory.value;
    return settings;
  }

  /** What Sound.open takes. */
  get sound() {
    return { ...this.devices, ...this.#checks() };
  }

  #checks() {
    return Object.fromEntries(CHECKS.map((name) => [name, this.fields[name].checked]));
  }

  async refreshDevices() {
    const { microphones, speakers } = await listDevices();
    this.#offer('microphone', microphones);
    this.#offer('speaker', speakers);
  }

  #offer(name, devices) {
    const chosen = this.devices[name];
    const options = devices.map(({ id, label }) => new Option(label, id, false, id === chosen));
    this.fields[name].replaceChildren(new Option('System default', ''), ...options);
  }

  #fill(values) {
    for (const name of [...NUMBERS, 'memory']) {
      if (values[name] !== undefined) this.fields[name].value = values[name];
    }
    for (const name of CHECKS) this.fields[name].checked = values[name] ?? true;
    this.#label();
  }

  #label() {
    for (const [name, show] of Object.entries(SHOWN)) {
      const text = show(this.fields[name].valueAsNumber);
      document.getElementById(`${name}-value`).textContent = text;
    }
  }

  #changed() {
    this.#label();
    keep(forever, STORE, { ...this.talk, ...this.#checks(), devices: this.devices });
  }

  #reset() {
    this.#fill({ ...this.info.defaults, seed: '' });
    this.#changed();
  }
}
