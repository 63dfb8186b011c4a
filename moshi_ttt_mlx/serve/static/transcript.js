// The words of both speakers, as turns: a new one after a pause.
// Server text only ever becomes text nodes.

const PAUSE_SECONDS = 1.2;
const TURN_SECONDS = 20; // so that a monologue still has time stamps
const MAX_TURNS = 600; // an endless talk must not grow the page without end; downloads have it all

const NAMES = { moshi: 'Moshi', user: 'You' };

export function clock(seconds) {
  const whole = Math.floor(seconds);
  const two = (number) => String(number).padStart(2, '0');
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(whole % 60)}`;
}

function element(tag, className, text = '') {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export class TranscriptView {
  /** @param {HTMLOListElement} list @param {HTMLElement} scroller the element that scrolls */
  constructor(list, scroller) {
    this.list = list;
    this.scroller = scroller;
    this.clear();
  }

  clear() {
    this.list.replaceChildren();
    this.open = {}; // the last turn of each speaker
  }

  /**
   * Append a word or a part of one.
   * @param {{text: string, speaker: string, start: number, end: number}} piece a leading space begins
   *   a new word; times are seconds
   */
  add(piece) {
    const follow = this.#atEnd();
    const turn = this.#turnFor(piece);
    turn.words.append(piece.text);
    turn.end = piece.end;
    if (follow) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** Show exactly these words: after a reconnection the server knows them all. */
  replace(words) {
    this.clear();
    for (const word of words) this.add({ ...word, text: ` ${word.text}` });
  }

  #turnFor(piece) {
    const last = this.open[piece.speaker];
    // Both may speak at once: a turn goes on beside the other's.
    const goesOn =
      last && piece.start - last.end < PAUSE_SECONDS && piece.start - last.start < TURN_SECONDS;
    return goesOn || this.#inWord(last, piece) ? last : this.#begin(piece);
  }

  /** Whether a piece ends a word that has begun: a turn never splits one. */
  #inWord(last, piece) {
    return last && !/^\s/.test(piece.text);
  }

  #begin({ speaker, start, end }) {
    const item = element('li', `turn ${speaker === 'user' ? 'user' : 'moshi'}`);
    const head = element('div', 'turn-head');
    head.append(
      element('span', 'turn-speaker', NAMES[speaker] ?? speaker),
      element('time', 'turn-time', clock(start)),
    );
    const words = element('p', 'turn-words');
    item.append(head, words);
    item.dataset.start = start;
    this.#insert(item, start);
    if (this.list.children.length > MAX_TURNS) this.list.firstElementChild.remove();
    this.open[speaker] = { words, start, end };
    return this.open[speaker];
  }

  /** By start: a speech-to-text model's words come seconds late. */
  #insert(item, start) {
    let before = this.list.lastElementChild;
    while (before && Number(before.dataset.start) > start) before = before.previousElementSibling;
    if (before) before.after(item);
    else this.list.prepend(item);
  }

  #atEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < 60;
  }
}
