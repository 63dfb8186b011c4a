// Saved talks: the list, the dialog that names one, and the downloads of this talk.

import { clock } from './transcript.js';

const $ = (id) => document.getElementById(id);

/** A path of ours with the token, where there is one. */
export function withToken(path, token) {
  return token ? `${path}?token=${encodeURIComponent(token)}` : path;
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
    const { sessions } = await response.json();
    this.names = new Set(sessions.map(({ name }) => name));
    $('saved').replaceChildren(...sessions.map((session) => this.#item(session)));
    $('saved-none').hidden = sessions.length > 0;
  }

  #item({ name, age }) {
    const item = document.createElement('li');
    const label = document.createElement('span');
    label.className = 'saved-name';
    label.textContent = name;
    const time = document.createElement('span');
    time.className = 'quiet';
    time.textContent = age == null ? '' : clock(age);
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'button small';
    button.textContent = 'Resume';
    button.setAttribute('aria-label', `Resume ${name}`);
    button.addEventListener('click', () => this.onResume(name));
    item.append(label, time, button);
    return item;
  }

  /** No second talk beside the first. */
  allow(allowed) {
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
