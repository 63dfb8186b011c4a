// What can go wrong, in words for people: what happened, and what to do about it.

const HTTPS = `https://${location.hostname}:${location.port}`;

export const MESSAGES = {
  insecure: [
    'No microphone over plain http',
    `Browsers give the microphone only to https pages or to the machine itself. Start the server with
     --ssl and open ${HTTPS}/ here, or open this page on the machine it runs on, as http://localhost.`,
  ],
  'no-media': [
    'This browser has no microphone access',
    'Use a current Chrome, Edge, Firefox or Safari.',
  ],
  'no-worklet': [
    'This browser cannot process sound',
    'The page needs AudioWorklet at 24 kHz: use a current Chrome, Edge, Firefox or Safari.',
  ],
  denied: [
    'The microphone is not allowed',
    `Allow it for this page (the icon beside the address), then start again. On macOS also see System
     Settings > Privacy & Security > Microphone.`,
  ],
  'no-microphone': [
    'No microphone found',
    'Plug one in, or choose another one under Settings, then start again.',
  ],
  'busy-microphone': [
    'The microphone is in use',
    'Another program holds it. Close that program, then start again.',
  ],
  zeros: [
    'The microphone is silent',
    `It delivers exact zeros: it is muted by a switch, or the system keeps it from the browser (on macOS
     see System Settings > Privacy & Security > Microphone).`,
  ],
  unplugged: [
    'The microphone is gone',
    'It was unplugged. The talk goes on with the next microphone that appears.',
  ],
  'no-speaker': ['This loudspeaker cannot be used', 'The sound stays where it was.'],
  suspended: ['The browser stopped the sound', 'Press any key or click anywhere to go on.'],
  'server-gone': [
    'The server does not answer',
    'Is moshi-ttt-mlx serve still running? Start it again where it was started.',
  ],
  refused: [
    'The server refused the talk',
    `It closed the connection before the talk began. Was the page opened at the address that the server
     printed?`,
  ],
  reconnecting: [
    'The connection is lost',
    'The talk stands still for a minute. It goes on as soon as the server answers.',
  ],
  lost: [
    'The talk is gone',
    'The connection did not come back within a minute. Start a new talk, or resume a saved one.',
  ],
  token: [
    'A token is needed',
    'Open the address that the server printed when it started: it ends with #token=...',
  ],
};

/** Title and text for a key, white space as on the screen. */
export function message(key) {
  const [title, text] = MESSAGES[key];
  return { title, text: text.replace(/\s+/g, ' ') };
}
