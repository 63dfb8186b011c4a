// Saved talks: the list, the dialog that names one, and the downloads of this talk.

import { ask, talkFile, withToken } from './api.js';
import { clock } from './transcript.js';

const $ = (id) => document.getElementById(id);

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
    const talks = await ask('/api/sessions', token);
    if (!talks) return;
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

/** A name nobody has yet: the local time, without the colon that file systems refuse. */
function suggestion() {
  const now = new Date();
  const local = new Date(now - now.getTimezoneOffset() * 60_000).toISOString();
  return `talk ${local.slice(0, 10)} ${local.slice(11, 16).replace(':', '')}`;
}

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
    link.href = withToken(talkFile(key, link.dataset.file), token);
  }
  $('downloads').hidden = false;
}
