// Microphone and loudspeaker. What lives here: permission, devices, the two worklets, mute, levels.
// What does not: the connection (talk.js) and anything on the screen.
//
//   const sound = new Sound({ onFrame, onHeard, onPlayed, onProblem });
//   await sound.open({ microphone: '', speaker: '', echoCancellation: true, ... });
//   sound.play(frame);

const RATE = 24000;
const ZERO_SECONDS = 2.5; // exact zeros for this long are no pause in speech
const MUTED = 1e-6; // sent while muted here: exact zeros would make the server warn of a fault
const FRAME_SECONDS = 0.08;

/** Why this browser cannot talk, as a key of messages.js, or null when it can. */
export function missing() {
  if (!window.isSecureContext) return 'insecure';
  if (!navigator.mediaDevices?.getUserMedia) return 'no-media';
  if (!window.AudioWorkletNode) return 'no-worklet';
  return null;
}

/** An error whose message is a key of messages.js. */
export class SoundError extends Error {}

const DENIALS = {
  NotAllowedError: 'denied',
  SecurityError: 'denied',
  NotReadableError: 'busy-microphone',
};

async function askMicrophone(choice) {
  const { microphone, echoCancellation, noiseSuppression, autoGainControl } = choice;
  const audio = { echoCancellation, noiseSuppression, autoGainControl, channelCount: 1 };
  if (microphone) audio.deviceId = { exact: microphone }; // Chrome takes a wish for no wish
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    // The chosen one is not here today; another one may be.
    if (audio.deviceId && !DENIALS[error.name]) return askMicrophone({ ...choice, microphone: '' });
    throw new SoundError(DENIALS[error.name] ?? 'no-microphone', { cause: error });
  }
}

async function openWorklet(context, name, options) {
  try {
    await context.audioWorklet.addModule(`/static/${name}-worklet.js`);
  } catch (error) {
    throw new SoundError('server-gone', { cause: error }); // the module comes from there
  }
  return new AudioWorkletNode(context, name, options);
}

/** Microphones and speakers as [{id, label}]; labels are empty before the permission is given. */
export async function listDevices() {
  const all = (await navigator.mediaDevices?.enumerateDevices?.()) ?? [];
  const ofKind = (kind) =>
    all
      .filter((device) => device.kind === kind && device.deviceId !== 'default' && device.deviceId)
      .map(({ deviceId, label }, index) => ({ id: deviceId, label: label || `Device ${index + 1}` }));
  return { microphones: ofKind('audioinput'), speakers: ofKind('audiooutput') };
}

export const canChooseSpeaker = () => 'setSinkId' in (window.AudioContext?.prototype ?? {});

export class Sound {
  /**
   * @param {object} on callbacks:
   *   onFrame(Float32Array [1920]), onHeard(level), onPlayed({level, buffered, played, skipped, gaps}),
   *   onProblem(key of messages.js, or null when the last problem has passed)
   */
  constructor(on) {
    this.on = on;
    this.muted = false;
    this.zeros = 0;
  }

  /** Ask for the microphone and start both directions. Throws SoundError. */
  async open(choice) {
    this.choice = choice;
    this.context = new AudioContext({ sampleRate: RATE, latencyHint: 'interactive' });
    this.context.onstatechange = () => this.#contextChanged();
    try {
      await this.#openSpeaker();
      await this.useMicrophone(choice);
      await this.context.resume();
    } catch (error) {
      this.close();
      throw error instanceof SoundError ? error : new SoundError('no-worklet', { cause: error });
    }
  }

  async #openSpeaker() {
    this.player = await openWorklet(this.context, 'playback', {
      numberOfInputs: 0,
      outputChannelCount: [1],
    });
    this.player.port.onmessage = ({ data }) => this.on.onPlayed(data);
    this.player.connect(this.context.destination);
    if (this.choice.speaker) await this.useSpeaker(this.choice.speaker);
  }

  /** Change the microphone, in the middle of a talk too. Throws SoundError. */
  async useMicrophone(choice) {
    const stream = await askMicrophone(choice);
    this.#closeMicrophone();
    this.choice = { ...this.choice, ...choice };
    this.stream = stream;
    const source = this.#sourceOf(stream);
    this.capture = await openWorklet(source.context, 'capture', { numberOfOutputs: 0 });
    this.capture.port.onmessage = ({ data }) => this.#heard(data);
    source.connect(this.capture);
    stream.getAudioTracks()[0].onended = () => this.on.onProblem('unplugged');
    this.mute(this.muted);
  }

  /** The stream in the 24 kHz graph or, where the browser refuses that, in one at its own rate. */
  #sourceOf(stream) {
    try {
      return this.context.createMediaStreamSource(stream);
    } catch {
      this.captureContext = new AudioContext();
      return this.captureContext.createMediaStreamSource(stream);
    }
  }

  async useSpeaker(id) {
    if (!canChooseSpeaker()) return;
    try {
      await this.context.setSinkId(id);
    } catch {
      this.on.onProblem('no-speaker');
    }
  }

  #heard({ frame, level }) {
    this.#watchZeros(level);
    this.on.onHeard(level);
    this.on.onFrame(this.muted ? frame.fill(MUTED) : frame);
  }

  #watchZeros(level) {
    const before = this.zeros;
    this.zeros = level === 0 && !this.muted ? before + FRAME_SECONDS : 0;
    if (before < ZERO_SECONDS && this.zeros >= ZERO_SECONDS) this.on.onProblem('zeros');
    if (before >= ZERO_SECONDS && this.zeros === 0) this.on.onProblem(null);
  }

  #contextChanged() {
    // A phone call interrupts the graph; a browser without a click never starts it.
    const stopped = ['suspended', 'interrupted'].includes(this.context?.state);
    this.on.onProblem(stopped ? 'suspended' : null);
  }

  wake() {
    return this.context?.resume();
  }

  /** @param {Float32Array} samples [1920] at 24 kHz; the memory is handed over */
  play(samples) {
    this.player?.port.postMessage(samples, [samples.buffer]);
  }

  /** Drop what waits to be played. */
  hush() {
    this.player?.port.postMessage('clear');
  }

  mute(muted) {
    this.muted = muted;
    this.stream?.getAudioTracks().forEach((track) => (track.enabled = !muted));
  }

  #closeMicrophone() {
    this.capture?.disconnect();
    if (this.capture) this.capture.port.onmessage = null;
    this.stream?.getTracks().forEach((track) => track.stop());
    this.captureContext?.close();
    this.stream = this.capture = this.captureContext = null;
  }

  close() {
    this.#closeMicrophone();
    if (this.context) this.context.onstatechange = null;
    this.context?.close();
    this.context = this.player = null;
  }
}
