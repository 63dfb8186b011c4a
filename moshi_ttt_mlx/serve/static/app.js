// Joins the parts: buttons and keys act on the talk and the sound, their events go to the view.
//
//   sound.js  -> frames ->  talk.js  -> WebSocket          (you)
//   sound.js <-  frames <-  talk.js <-  WebSocket          (Moshi)
//   notice, panels, transcript, levels <- events            (the screen)

import { ask, talkFile } from './api.js';
import { LevelStrip } from './charts.js';
import { listenForKeys } from './keys.js';
import { Notice } from './notice.js';
import { MemoryPanel, TimingPanel } from './panels.js';
import { SaveDialog, SavedTalks, offerDownloads } from './saved.js';
import { Settings } from './settings.js';
import { Sound, SoundError, missing } from './sound.js';
import { keep, load, thisTab } from './store.js';
import { TAKE_UP_SECONDS, Talk } from './talk.js';
import { TranscriptView } from './transcript.js';
import { keepAwake } from './wake.js';

const $ = (id) => document.getElementById(id);
const INFO_RETRY_MS = 3000;

// What each state is called, and what the first button does in it.
const STATES = {
  idle: { says: 'Ready', label: 'Start', icon: 'mic' },
  asking: { says: 'Asking for the microphone', label: 'Start', icon: 'mic' },
  connecting: { says: 'Connecting', label: 'Cancel', icon: 'close' },
  waiting: { says: 'Waiting for a place', label: 'Cancel', icon: 'close' },
  talking: { says: 'Talking', label: 'Pause', icon: 'pause' },
  paused: { says: 'Paused', label: 'Go on', icon: 'play' },
  lost: { says: 'Reconnecting', label: 'Pause', icon: 'pause' },
  ended: { says: 'Ended', label: 'New talk', icon: 'mic' },
};
const OVER = new Set(['idle', 'ended']);

const notice = new Notice();
const transcript = new TranscriptView($('turns'), $('transcript'));
const timing = new TimingPanel();
const memory = new MemoryPanel((mode) => talk.setMemory(mode));
const levels = { moshi: new LevelStrip($('level-moshi')), user: new LevelStrip($('level-user')) };
const settings = new Settings($('settings'), changeDevice);
const saved = new SavedTalks((name) => begin({ session: name }));
const saveDialog = new SaveDialog(saved, (name, replace) => talk.save(name, replace));
const sound = new Sound({
  onFrame: (frame) => talk.sendFrame(frame),
  onHeard: (level) => levels.user.push(talk.state === 'paused' ? 0 : level),
  onPlayed: showPlayed,
  onProblem: showProblem,
});

let talk = new Talk();
let info = null;
let token = takeToken();
let session = null; // the name under which this talk is saved
let state = 'idle';

// -- the server -------------------------------------------------------------------------------------

/** The token from the address: kept for this tab, taken out of what one might copy. */
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get('token');
  if (given) {
    keep(thisTab, 'moshi-token', given);
    history.replaceState(null, '', location.pathname);
  }
  return given ?? load(thisTab, 'moshi-token');
}

async function readInfo() {
  info = await ask('/api/info');
  if (!info) {
    notice.show('server-gone');
    setTimeout(readInfo, INFO_RETRY_MS);
    return;
  }
  notice.hide('server-gone');
  useInfo();
}

function useInfo() {
  $('model').textContent = info.model;
  $('version').textContent = `${info.name} ${info.version}`;
  $('voice-moshi').hidden = !info.speaks;
  $('welcome-words').hidden = !info.speaks || Boolean(info.user_stt);
  if (!info.speaks) $('welcome-text').textContent = 'This model writes down what you say.';
  $('welcome-session').hidden = !info.session;
  $('welcome-session').textContent =
    `This talk is “${info.session}”: it goes on where it stopped, with the settings it was begun with, ` +
    'and is saved when it ends.';
  settings.useInfo(info);
  memory.useInfo(info);
  setState(state);
  if (missing()) notice.show(missing());
  else if (info.needs_token && !token) notice.show('token');
  else offerLastTalk();
  if (token || !info.needs_token) saved.refresh(token);
}

/** After a reload the talk is still there for a minute. */
function offerLastTalk() {
  const last = load(thisTab, 'moshi-talk');
  if (!last || Date.now() - last.at > 1000 * TAKE_UP_SECONDS) return;
  const action = { label: 'Take it up again', act: () => begin({ resume: last.key }) };
  notice.say('Your talk is still there', 'The page was left in the middle of it.', {
    kind: 'info',
    action,
  });
}

// -- starting and stopping --------------------------------------------------------------------------

/** @param {object} what {settings}, {session} or {resume}, as `start` takes them */
async function begin(what) {
  if (!OVER.has(state) || !info) return;
  notice.hide();
  if (missing()) return notice.show(missing());
  setState('asking');
  try {
    await sound.open(settings.sound);
  } catch (error) {
    if (!(error instanceof SoundError)) throw error;
    setState('idle');
    return notice.show(error.message);
  }
  settings.refreshDevices();
  clearView();
  talk = newTalk();
  talk.begin({ ...what, token });
}

function newTalk() {
  const made = new Talk();
  const on = (type, act) =>
    made.addEventListener(type, ({ detail }) => {
      if (made === talk) act(detail);
    });
  on('state', talkState);
  on('audio', playFrame);
  on('wait', ({ message }) => notice.say('All places are taken', message, { kind: 'info' }));
  on('ready', ready);
  on('word', showWord);
  on('meter', showMeter);
  on('memory', ({ mode }) => memory.setMode(mode));
  on('saved', ({ session: name }) => showSaved(name));
  on('warning', showWarning);
  on('error', ({ message }) => notice.say('That did not work', message));
  return made;
}

function ready(message) {
  notice.hide();
  session = message.session ?? null;
  context = message.settings.context ?? info.context;
  remember();
  offerDownloads(talk.key, token);
  memory.allow(info.memory && message.settings.memory !== 'off');
  if (message.resumed || message.age > 0) fetchWords();
}

function clearView() {
  levels.moshi.clear();
  levels.user.clear();
  transcript.clear();
  fetched = {};
  timing.clear();
  memory.clear();
}

function talkState(now) {
  if (now === 'paused' || now === 'lost') sound.hush();
  if (now === 'lost') {
    notice.show('reconnecting', { kind: 'warning' });
    countDown();
  }
  if (now === 'ended') ended();
  setState(now);
}

function ended() {
  sound.close();
  sound.mute(false);
  keep(thisTab, 'moshi-talk', null);
  saved.refresh(token);
  if (talk.asked) return; // what is shown now is how the last save went
  const { key, text, again } = talk.reason;
  const last = talk.key;
  const action = again ? { label: 'Take it up again', act: () => begin({ resume: last }) } : null;
  if (key) notice.show(key);
  else notice.say(last ? 'The talk has ended' : 'The talk could not begin', text, { action });
}

function countDown() {
  $('countdown').textContent = `${talk.secondsLeft} s`;
  if (talk.state === 'lost') setTimeout(countDown, 500);
  else $('countdown').textContent = '';
}

// -- what the buttons do ----------------------------------------------------------------------------

function pressStart() {
  if (OVER.has(state)) begin({ settings: settings.talk });
  else if (state === 'talking') talk.pause();
  else if (state === 'paused') talk.goOn();
  else if (state === 'connecting' || state === 'waiting') end();
}

function pressMute() {
  if ($('mute').disabled) return;
  sound.mute(!sound.muted);
  showMute();
}

function pressSave() {
  if ($('save').disabled) return;
  if (session) talk.save(session, false);
  else saveDialog.open(session);
}

function pressEnd() {
  if (!$('end').disabled) end();
}

function end() {
  notice.hide();
  talk.end();
}

async function changeDevice(name) {
  if (OVER.has(state) || state === 'asking') return;
  const choice = settings.sound;
  if (name === 'speaker') return sound.useSpeaker(choice.speaker);
  try {
    await sound.useMicrophone(choice);
  } catch (error) {
    notice.show(error.message);
  }
}

/** The microphone was unplugged: take whichever there is now. */
async function replaceMicrophone() {
  if (notice.key !== 'unplugged') return;
  try {
    await sound.useMicrophone({ ...settings.sound, microphone: '' });
    notice.hide('unplugged');
  } catch {
    // None yet: the message stays, the next device brings us here again.
  }
}

// -- what the screen shows --------------------------------------------------------------------------

let context = 1; // of this talk, in frames
let fetching = false;
let early = []; // words that came while the earlier ones were fetched
let fetched = {}; // each speaker's words up to this second came that way

function setState(now) {
  state = now;
  const { says, label, icon } = STATES[now];
  const isOn = now === 'talking' || now === 'paused';
  $('state-pill').dataset.state = now;
  if ($('state').textContent !== says) $('state').textContent = says;
  $('start-label').textContent = now === 'ended' && info?.session ? 'Go on' : label;
  $('start-icon').setAttribute('href', `#i-${icon}`);
  $('start').disabled = now === 'asking' || now === 'lost' || !info;
  $('mute').disabled = $('save').disabled = !isOn;
  $('end').disabled = !isOn && now !== 'lost';
  $('settings-note').hidden = OVER.has(now);
  if (!isOn) memory.allow(false);
  saved.allow(OVER.has(now));
  keepAwake(isOn);
  showMute();
}

function showMute() {
  $('mute').setAttribute('aria-pressed', String(sound.muted));
  $('mute-icon').setAttribute('href', sound.muted ? '#i-mic-off' : '#i-mic');
}

function showSaved(name) {
  session = name;
  saved.refresh(token);
  notice.say('Saved', `as “${name}”`, { kind: 'info', brief: true });
}

function showProblem(key) {
  if (key) notice.show(key, { kind: 'warning' });
  else for (const passed of ['zeros', 'suspended']) notice.hide(passed);
}

/** The server notices a mute microphone too; the page's own message goes away by itself. */
function showWarning({ message }) {
  if (notice.key !== 'zeros') notice.say('Warning', message, { kind: 'warning' });
}

function playFrame(frame) {
  if (talk.state === 'talking') sound.play(frame);
}

function showPlayed(report) {
  levels.moshi.push(report.level);
  timing.played(report);
}

function showMeter(meter) {
  timing.meter(meter, talk.dropped);
  memory.meter(meter, context);
  remember();
}

function remember() {
  keep(thisTab, 'moshi-talk', { key: talk.key, at: Date.now() });
}

function showWord(piece) {
  $('welcome').hidden = true;
  if (fetching) early.push(piece);
  // The two ways race: a word may come by itself after it came with the others.
  else if (!(piece.end <= fetched[piece.speaker])) transcript.add(piece);
}

/** All words so far, from the server: after a reload or a broken line the page lacks some. */
async function fetchWords() {
  fetching = true;
  early = [];
  const answer = await ask(talkFile(talk.key, 'transcript.json'), token);
  fetching = false;
  if (answer) showWords(answer.words);
  early.forEach(showWord);
}

function showWords(words) {
  $('welcome').hidden = words.length > 0;
  transcript.replace(words);
  fetched = Object.fromEntries(words.map(({ speaker, end }) => [speaker, end]));
}

// -- wiring -----------------------------------------------------------------------------------------

$('start').addEventListener('click', pressStart);
$('mute').addEventListener('click', pressMute);
$('save').addEventListener('click', pressSave);
$('end').addEventListener('click', pressEnd);
listenForKeys(
  {
    ' ': pressStart,
    m: pressMute,
    s: pressSave,
    e: pressEnd,
    '?': () => {
      $('keys-panel').open = true;
      $('keys-panel').querySelector('summary').focus();
    },
  },
  $('use-keys'),
);
for (const type of ['keydown', 'pointerdown']) {
  document.addEventListener(type, () => notice.key === 'suspended' && sound.wake());
}
navigator.mediaDevices?.addEventListener?.('devicechange', replaceMicrophone);
if (matchMedia('(max-width: 56rem)').matches) $('settings-panel').open = false;
if (missing()) notice.show(missing());
readInfo();
