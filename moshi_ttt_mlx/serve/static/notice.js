// The one place for messages: what happened and what to do. An alert, so screen readers say it.

import { message } from './messages.js';

const BRIEF_MS = 6000;
const $ = (id) => document.getElementById(id);

export class Notice {
  constructor() {
    this.key = null;
    $('notice-close').addEventListener('click', () => this.hide());
    $('notice-action').addEventListener('click', () => {
      this.hide();
      this.act();
    });
  }

  /** Show a message of messages.js. */
  show(key, options) {
    const { title, text } = message(key);
    this.say(title, text, { key, ...options });
  }

  /**
   * Show any words; `kind` is error, warning or info.
   * @param {{label: string, act: Function}=} action a button beside the message
   * @param {boolean=} brief it goes away by itself
   */
  say(title, text, { key = null, kind = 'error', action = null, brief = false } = {}) {
    clearTimeout(this.timer);
    if (brief) this.timer = setTimeout(() => this.hide(), BRIEF_MS);
    this.key = key;
    this.act = action?.act;
    $('notice').dataset.kind = kind;
    $('notice-title').textContent = title;
    $('notice-text').textContent = text;
    $('notice-action').hidden = !action;
    $('notice-action').textContent = action?.label ?? '';
    $('notice').hidden = false;
  }

  /** Take a message away: this one, or whichever is there. */
  hide(key = null) {
    if (key && key !== this.key) return;
    $('notice').hidden = true;
    this.key = null;
  }
}
