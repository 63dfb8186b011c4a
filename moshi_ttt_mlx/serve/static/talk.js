// One talk with the server: its WebSocket, its state, and taking it up again when the line breaks.
// No DOM and no sound in here. docs/server.md has the messages.
//
//   idle -> connecting -> (waiting) -> talking <-> paused -> ended
//                             talking, paused -> lost -> talking, paused, ended

export const TAKE_UP_SECONDS = 60; // the server keeps a dropped talk for this long
const RETRY_MS = [250, 500, 1000, 2000];
const QUEUE_LIMIT = 24000 * 4; // bytes: a second of sound that the network has not taken

const socketUrl = () => `${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}/api/talk`;

export class Talk extends EventTarget {
  // Events: 'state' (this.state changed), 'audio' (Float32Array), and one for each message type.
  state = 'idle';
  key = null;
  dropped = 0; // frames that the network was too slow for
  asked = false; // whether the user ended it

  /** @param {object} start the first message: {settings, token}, {session, token} or {resume, token} */
  begin(start) {
    this.start = { ...start, type: 'start' };
    this.key = start.resume ?? null;
    this.paused = false;
    this.#set('connecting');
    this.#connect();
  }

  sendFrame(frame) {
    if (this.state !== 'talking') return;
    if (this.socket.bufferedAmount > QUEUE_LIMIT) {
      this.dropped += 1;
      return;
    }
    this.socket.send(frame);
  }

  pause() {
    if (this.state !== 'talking') return;
    this.paused = true;
    this.#send({ type: 'pause' });
    this.#set('paused');
  }

  goOn() {
    if (this.state !== 'paused') return;
    this.paused = false;
    this.#send({ type: 'resume' });
    this.#set('talking');
  }

  save(session, replace) {
    this.#send({ type: 'save', session, replace });
  }

  setMemory(mode) {
    this.#send({ type: 'memory', mode });
  }

  /** End it for good: the server answers `ended`, unless there is nobody to answer. */
  end() {
    this.asked = true;
    if (this.isOn) this.#send({ type: 'end' });
    else this.#finish({ key: null });
  }

  get isOn() {
    return this.state === 'talking' || this.state === 'paused';
  }

  get secondsLeft() {
    return Math.max(0, Math.ceil((this.deadline - Date.now()) / 1000));
  }

  #send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  #connect() {
    const socket = new WebSocket(socketUrl());
    this.socket = socket;
    socket.binaryType = 'arraybuffer';
    socket.onopen = () => this.#send(this.#first());
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = () => {
      if (socket === this.socket) this.#closed();
    };
  }

  #first() {
    const { token } = this.start;
    return this.key ? { type: 'start', resume: this.key, token } : this.start;
  }

  #receive(data) {
    if (data instanceof ArrayBuffer) {
      this.#emit('audio', new Float32Array(data));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === 'ready') this.#ready(message);
    if (message.type === 'wait') this.#set('waiting');
    this.#emit(message.type, message);
    if (message.type === 'ended') this.#finish({ text: message.reason, again: message.again });
  }

  #ready(message) {
    this.key = message.key;
    this.attempt = 0;
    if (this.paused) this.#send({ type: 'pause' });
    this.#set(this.paused ? 'paused' : 'talking');
  }

  #closed() {
    if (this.state === 'ended') return;
    if (!this.key) {
      this.#finish({ key: 'refused' });
      return;
    }
    if (this.state !== 'lost') {
      this.deadline = Date.now() + 1000 * TAKE_UP_SECONDS;
      this.attempt = 0;
      this.#set('lost');
    }
    if (this.secondsLeft === 0) {
      this.#finish({ key: 'lost' });
      return;
    }
    const wait = RETRY_MS[Math.min(this.attempt++, RETRY_MS.length - 1)];
    this.timer = setTimeout(() => this.#connect(), wait);
  }

  /** @param {object} reason {text: the server's words}, or {key: of messages.js}; both may lack */
  #finish(reason) {
    clearTimeout(this.timer);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    this.reason = reason;
    this.#set('ended');
  }

  #set(state) {
    if (state === this.state) return;
    this.state = state;
    this.#emit('state', state);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
