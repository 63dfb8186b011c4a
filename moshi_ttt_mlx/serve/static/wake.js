// Keeps a phone's screen on during a talk: a sleeping phone stops the microphone.

let lock = null;
let wanted = false;

async function ask() {
  try {
    lock = await navigator.wakeLock?.request('screen');
  } catch {
    lock = null; // a low battery refuses; the talk does not depend on it
  }
}

document.addEventListener('visibilitychange', () => {
  if (wanted && document.visibilityState === 'visible') ask();
});

/** @param {boolean} on */
export function keepAwake(on) {
  if (on === wanted) return;
  wanted = on;
  if (on) ask();
  else lock?.release();
}
