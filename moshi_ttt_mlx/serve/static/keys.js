// Single keys, outside fields and buttons, and only while the user wants them.

import { forever, keep, load } from './store.js';

const STORE = 'moshi-keys';

const isTyping = ({ target }) =>
  target.closest('input:not([type=checkbox]):not([type=radio]), select, textarea, dialog');

/** Space presses a focused button or opens a focused summary by itself. */
const isPressing = ({ key, target }) =>
  key === ' ' && target.closest('button, summary, a, input, label');

/** @param {Object<string, Function>} actions by key, lower case @param {HTMLInputElement} toggle */
export function listenForKeys(actions, toggle) {
  toggle.checked = load(forever, STORE) ?? true;
  toggle.addEventListener('change', () => keep(forever, STORE, toggle.checked));
  document.addEventListener('keydown', (event) => {
    if (!toggle.checked || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = actions[event.key.toLowerCase()];
    if (!action || isTyping(event) || isPressing(event)) return;
    event.preventDefault();
    action();
  });
}
