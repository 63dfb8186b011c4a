// Saved talks: the list, the dialog that names one, and the downloads of this talk.

import { clock } from './transcript.js';

const $ = (id) => document.getElementById(id);

/** A path of ours with the token, where there is one. */
export function withToken(path, token) {
  return token ? `${path}?token=${encodeURIComponent(token)}` : path;
}

function text(className, words) {
  const made = document.createElement('span');
  made.className = className;
  made.textContent = words;
  made.title = words;
  return made;
}

function about(age, fits) {
  if (age == null) return 'damaged';
  return fits ? clock(age) : 'another model’s';
}

export class SavedTalks {
  /** @param {(name: string) => void} onResume */
  constructor(onResume) {
    this.onResume = onResume;
    this.names = new Set();
  }

  async refresh(token) {
    const response = await fetch(withToken('/api/sessions', token));
    if (!response.ok) return;
    const talks = await response.json();
    this.names = new Set(talks.map(({ session }) => session));
    $('saved').replaceChildren(...talks.map((talk) => this.#item(talk)));
    $('saved-none').hidden = talks.length > 0;
  }

  #item({ session, age, fits }) {
    const item = document.createElement('li');
    item.append(text('saved-name', session), text('quiet', about(age, fits)));
    if (fits) item.append(this.#button(session));
    return item;
  }

  #button(session) {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'button small';
    button.textContent = 'Resume';
    button.setAttribute('aria-label', `Resume ${session}`);
    button.addEventListener('click', () => this.onResume(session));
    button.disabled = !this.allowed;
    return button;
  }

  /** No second talk beside the first. */
  allow(allowed) {
    this.allowed = allowed;
    for (const button of $('saved').querySelectorAll('button')) button.disabled = !allowed;
  }
}

const suggestion = () => `talk ${new Date().toISOString().slice(0, 16).replace('T', ' ').replace(':', '')}`;

export class SaveDialog {
  /**
   * @param {SavedTalks} saved
   * @param {(name: string, replace: boolean) => void} onSave
   */
  constructor(saved, onSave) {
    this.saved = saved;
    $('save-name').addEventListener('input', () => this.#check());
    $('save-cancel').addEventListener('click', () => $('save-dialog').close());
    $('save-form').addEventListener('submit', () =>
      onSave($('save-name').value.trim(), $('save-replace').checked),
    );
  }

  /** @param {string|null} own the name under which this talk is saved already */
  open(own) {
    this.own = own;
    $('save-name').value = own ?? suggestion();
    $('save-replace').checked = false;
    this.#check();
    $('save-dialog').showModal();
    $('save-name').select();
  }

  /** Another talk's name needs a second thought. */
  #check() {
    const name = $('save-name').value.trim();
    const taken = name !== this.own && this.saved.names.has(name);
    $('replace-field').hidden = !taken;
    $('save-replace').required = taken;
  }
}

/** Point the links at a talk's files. */
export function offerDownloads(key, token) {
  for (const link of $('downloads').querySelectorAll('a')) {
    const { file } = link.dataset;
    link.href = withToken(`/api/talks/${encodeURIComponent(key)}/${file}`, token);
  }
  $('downloads').hidden = false;
}
