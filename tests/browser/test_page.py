"""The page in a real browser with a microphone from a wav, against a server that makes faults to order.

What only the real server shows is in test_talk.py. Pictures go to a temporary folder, or to the folder
that MOSHI_TTT_SCREENSHOTS names.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from .chromium import FRAME, NEEDS_CHROMIUM, RATE, played, resemblance, write_microphone

pytest.importorskip("aiohttp", reason="needs aiohttp: requirements/web.txt")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from .driving import CLEAN_UP, expect, expect_state, notice, start, wait_for
from .fake_server import FakeServer

pytestmark = NEEDS_CHROMIUM


def wait_for_frames(page, server, count):
    before = server.talk.frame
    wait_for(page, lambda: server.talk.frame >= before + count)


# -- sound and words --------------------------------------------------------------------------------


def test_sound_flows_both_ways(page, server, microphone):
    spoken, _ = soundfile.read(microphone)
    for name in CLEAN_UP:  # they change the sound on purpose
        page.uncheck(f"[name={name}]")
    heard, reply = talk_back_and_forth(page, server, len(spoken) + RATE)
    if resemblance(reply, heard) < 0.95:  # the machine was too busy to play it in time: once more
        page.click("#end")
        expect_state(page, "Ended")
        page.evaluate("window.tapped.length = 0")
        heard, reply = talk_back_and_forth(page, server, len(spoken) + RATE)

    assert all(len(frame) == FRAME for frame in server.talk.heard)
    # The same sound gives 0.999 here; backwards, shortened by 3 s or at another speed 0.63 to 0.91.
    assert resemblance(heard, spoken) > 0.98
    assert np.abs(heard).max() == pytest.approx(np.abs(spoken).max(), rel=0.05)
    # The page may leave out silence to catch up, and a busy machine makes gaps: 0.985 and more here.
    assert resemblance(reply, heard) > 0.95
    assert np.abs(reply).max() == pytest.approx(np.abs(heard).max() / 2, rel=0.05)


def talk_back_and_forth(page, server, samples):
    """What the server heard in a talk of so many samples, and what the page played."""
    start(page)
    wait_for(page, lambda: server.talk.frame * FRAME > samples)
    page.wait_for_timeout(500)
    return np.concatenate(server.talk.heard), played(page)


def test_a_browser_that_refuses_the_rate_is_resampled_for(open_page, server, microphone):
    """Firefox: no microphone in a graph of another rate than its own."""
    refuse = """
    const make = AudioContext.prototype.createMediaStreamSource;
    AudioContext.prototype.createMediaStreamSource = function (stream) {
      if (this.sampleRate === 24000) throw new DOMException('', 'NotSupportedError');
      window.otherRate = this.sampleRate;
      return make.call(this, stream);
    };
    """
    page = open_page(server.url, script=refuse)
    for name in CLEAN_UP:
        page.uncheck(f"[name={name}]")
    start(page)
    spoken, _ = soundfile.read(microphone)
    wait_for(page, lambda: server.talk.frame * FRAME > len(spoken) + RATE)
    assert page.evaluate("window.otherRate") != RATE
    heard = np.concatenate(server.talk.heard)
    assert resemblance(heard, spoken) > 0.98
    assert np.abs(heard).max() == pytest.approx(np.abs(spoken).max(), rel=0.05)


def test_words_of_both_are_shown_as_text(page, server):
    start(page)
    expect(page.locator(".turn.moshi .turn-words")).to_contain_text("m4<b> m8<b>")
    expect(page.locator(".turn.user .turn-words")).to_contain_text("u2<b> u6<b>")
    assert page.locator(".turns b").count() == 0
    assert page.inner_text(".turn.moshi .turn-time") == "0:00"
    expect(page.locator("#welcome")).to_be_hidden()


def test_what_the_model_cannot_do_is_said(open_page, server):
    server.info |= {"user_stt": None, "memory": None}
    page = open_page(server.url)
    expect(page.locator("#welcome-words")).to_be_visible()
    expect(page.locator("#memory-none")).to_be_visible()
    expect(page.locator("#memory-field")).to_be_hidden()
    server.info |= {"speaks": False}
    page.reload()
    expect(page.locator("#welcome-text")).to_have_text("This model writes down what you say.")
    expect(page.locator("#voice-moshi")).to_be_hidden()
    start(page)
    assert "memory" not in server.first_messages[0]["settings"]


def test_a_turn_ends_with_a_pause_and_never_within_a_word(page, server):
    server.quiet = True
    start(page)
    pieces = [(" Hel", 0.0), ("lo,", 5.0), (" you", 5.1), (" there", 9.0)]
    for text, at in pieces:
        word = {"type": "word", "text": text, "speaker": "moshi", "start": at, "end": at + 0.08}
        server.send(word)
    expect(page.locator(".turn")).to_have_count(2)
    assert page.locator(".turn-words").all_inner_texts() == ["Hello, you", "there"]


def test_late_words_go_where_they_were_said(page, server):
    server.quiet = True
    start(page)
    late = [("user", 0.5), ("user", 3.0), ("user", 3.4)]
    for speaker, at in [("moshi", 1.0), ("moshi", 6.0), *late]:
        piece = {"text": f" {at}", "speaker": speaker, "start": at, "end": at + 0.08}
        server.send({"type": "word", **piece})
    expect(page.locator(".turn")).to_have_count(4)
    assert page.locator(".turn-words").all_inner_texts() == ["0.5", "1.0", "3.0 3.4", "6.0"]


def test_meters_and_memory_show_the_servers_numbers(page, server):
    start(page)
    expect(page.locator("#lag")).to_have_text("80 ms")
    expect(page.locator("#frame")).to_have_text("31 of 80 ms")
    expect(page.locator("#dropped")).to_have_text("3")
    expect(page.locator("#updates")).to_have_text("4")
    expect(page.locator("#step")).to_have_text("0.002")
    expect(page.locator("#drift")).to_have_text(re.compile(r"0\.0\d+"))
    assert page.evaluate("document.getElementById('window-fill').value") > 0
    expect(page.locator("#memory-mode")).to_have_text("learning")
    expect(page.locator("#window-value")).to_contain_text("of 3,000 frames")
    page.check("[name=mode][value=frozen]", force=True)  # the radio lies under its label
    wait_for(page, lambda: server.talk.mode == "frozen")
    expect(page.locator("#memory-mode")).to_have_text("frozen")


def test_settings_are_sent_and_kept(page, server):
    page.fill("#seed", "7")
    page.fill("#temp", "0.55")
    page.fill("#context", "1500")
    page.select_option("#memory", "frozen")
    assert page.inner_text("#context-value") == "1500 frames, 2.0 min"
    page.reload()
    start(page)
    sent = server.first_messages[0]["settings"]
    expected = {"temp": 0.55, "text_temp": 0.7, "top_k": 250, "seed": 7, "context": 1500}
    assert sent == expected | {"memory": "frozen"}


# -- start, pause, end, save, resume ----------------------------------------------------------------


def test_pause_go_on_and_end(page, server):
    start(page)
    wait_for_frames(page, server, 5)
    page.click("#start")
    expect_state(page, "Paused")
    wait_for(page, lambda: server.talk.paused)
    frames = server.talk.frame
    page.wait_for_timeout(400)
    assert server.talk.frame == frames
    page.click("#start")
    expect_state(page, "Talking")
    wait_for_frames(page, server, 5)
    page.click("#end")
    expect_state(page, "Ended")
    expect(page.locator("#notice")).to_be_hidden()
    path = f"/api/talks/{server.talk.key}"
    links = [link.get_attribute("href") for link in page.locator("#downloads a").all()]
    kinds = ("txt", "json", "srt", "vtt")
    assert links == [f"{path}/transcript.{kind}" for kind in kinds] + [f"{path}/audio.wav"]


def test_save_and_resume(page, server):
    start(page)
    wait_for_frames(page, server, 8)
    page.click("#save")
    for name in ("../no", ".no", "no.", "a/b"):
        page.fill("#save-name", name)
        page.click("#save-dialog [type=submit]")
        expect(page.locator("#save-dialog")).to_be_visible()
    page.fill("#save-name", "Été 1. ü")
    page.click("#save-dialog [type=submit]")
    expect(page.locator("#notice")).to_contain_text("Été 1. ü")
    assert page.locator("#saved button").is_disabled()  # not beside this talk
    page.click("#end")
    expect_state(page, "Ended")
    words = server.talk.words[0]["text"].strip()

    page.click("#saved button")
    expect_state(page, "Talking")
    assert server.first_messages[-1] == {"type": "start", "session": "Été 1. ü", "token": None}
    expect(page.locator(".turn-words").first).to_contain_text(words)
    page.click("#save")  # under the same name, without a question
    expect(page.locator("#notice")).to_contain_text("Été 1. ü")


def test_a_server_that_was_given_a_talk_says_so(open_page, server):
    page = open_page(server.url)
    expect(page.locator("#welcome-session")).to_be_hidden()
    server.info["session"] = "<b>monday</b>"
    page = open_page(server.url)
    expect(page.locator("#welcome-session")).to_contain_text("This talk is “<b>monday</b>”")
    start(page)
    page.click("#end")
    expect_state(page, "Ended")
    expect(page.locator("#start")).to_have_text("Go on")


@pytest.mark.parametrize(
    ("farewell", "title"),
    [
        ({"type": "saved", "session": "monday"}, "Saved"),
        ({"type": "error", "message": "the disk is full"}, "That did not work"),
    ],
)
def test_how_the_last_save_went_is_shown_after_the_end(page, server, farewell, title):
    server.farewell = farewell
    start(page)
    page.click("#end")
    expect_state(page, "Ended")
    assert notice(page) == title
    page.click("#start")  # the next talk is not to blame
    expect_state(page, "Talking")
    expect(page.locator("#notice")).to_be_hidden()


def test_another_talks_name_needs_a_second_thought(page, server):
    start(page)
    server.saved["taken"] = server.talk
    page.reload()
    page.click("#notice-action")
    expect_state(page, "Talking")
    page.click("#save")
    page.fill("#save-name", "taken")
    page.click("#save-dialog [type=submit]")
    expect(page.locator("#save-dialog")).to_be_visible()
    page.check("#save-replace")
    page.click("#save-dialog [type=submit]")
    expect(page.locator("#notice")).to_contain_text("taken")


KEEP_STREAM = """
const ask = MediaDevices.prototype.getUserMedia;
MediaDevices.prototype.getUserMedia = async function (wish) {
  return (window.stream = await ask.call(this, wish));
};
"""


def test_mute_sends_no_voice(open_page, server):
    page = open_page(server.url, script=KEEP_STREAM)
    start(page)
    page.click("#mute")
    assert not page.evaluate("window.stream.getAudioTracks()[0].enabled")  # the browser knows, too
    wait_for_frames(page, server, 25)
    late = np.concatenate(server.talk.heard[-10:])
    assert 0 < np.abs(late).max() < 1e-5  # no exact zeros: those mean a fault
    assert page.get_attribute("#mute", "aria-pressed") == "true"


def test_devices_are_remembered_and_changed_in_a_talk(open_page, server):
    page = open_page(server.url, script=KEEP_STREAM)
    used = "window.stream.getAudioTracks()[0].getSettings()"
    start(page)
    other = page.locator("#microphone option").nth(2).get_attribute("value")
    assert page.evaluate(used)["deviceId"] != other
    page.select_option("#microphone", other)
    wait_for(page, lambda: page.evaluate(used)["deviceId"] == other)
    assert page.evaluate(used)["echoCancellation"]
    page.uncheck("[name=echoCancellation]")
    wait_for(page, lambda: not page.evaluate(used)["echoCancellation"])
    wait_for_frames(page, server, 5)
    page.reload()
    page.click("#start")
    expect_state(page, "Talking")
    assert page.evaluate(used)["deviceId"] == other
    assert page.input_value("#microphone") == other


def test_a_remembered_microphone_that_is_not_there(open_page, server):
    page = open_page(server.url)
    gone = {"devices": {"microphone": "0" * 64, "speaker": ""}}
    page.evaluate("(gone) => localStorage.setItem('moshi-settings', JSON.stringify(gone))", gone)
    page.reload()
    start(page)
    wait_for_frames(page, server, 5)


# -- what goes wrong --------------------------------------------------------------------------------


def test_a_dropped_connection_is_taken_up_again(page, server):
    start(page)
    wait_for_frames(page, server, 8)
    server.deaf = True
    server.cut()
    expect_state(page, "Reconnecting")
    expect(page.locator("#countdown")).to_contain_text(" s")
    server.deaf = False
    expect_state(page, "Talking")
    wait_for_frames(page, server, 8)
    assert len(server.talks) == 1
    assert server.first_messages[-1]["resume"] == server.talk.key
    words = " ".join(page.locator(".turn-words").all_inner_texts()).split()
    assert len(words) == len(set(words))  # none twice
    assert {"u2<b>", "m4<b>"} <= set(words)


def test_a_word_that_was_fetched_and_comes_once_more_is_shown_once(page, server):
    server.quiet = True
    start(page)
    wait_for_frames(page, server, 8)
    server.cut()
    expect(page.locator(".turn.moshi .turn-words")).to_contain_text("m4<b>")
    said = page.locator(".turn-words").all_inner_texts()
    late = {"type": "word", "text": " now", "speaker": "moshi", "start": 99.0, "end": 99.1}
    for word in (*server.talk.words[:2], late):
        server.send({"type": "word", **word})
    expect(page.locator(".turn.moshi .turn-words").last).to_have_text("now")
    assert page.locator(".turn-words").all_inner_texts() == [*said, "now"]


def test_a_paused_talk_is_taken_up_paused(page, server):
    start(page)
    page.click("#start")
    expect_state(page, "Paused")
    server.talk.paused = False  # as if the server had forgotten
    server.cut()
    expect_state(page, "Paused")
    wait_for(page, lambda: server.talk.paused)


def test_a_talk_that_stays_lost_is_given_up_after_a_minute(open_page, server):
    page = open_page(server.url)
    page.clock.install()
    start(page)
    server.deaf = True
    server.cut()
    expect_state(page, "Reconnecting")
    page.clock.fast_forward(61_000)
    expect_state(page, "Ended")
    assert notice(page) == "The talk is gone"
    expect(page.locator("#start")).to_be_enabled()


def test_a_reloaded_page_offers_the_talk(page, server):
    start(page)
    wait_for_frames(page, server, 8)
    page.reload()
    assert notice(page) == "Your talk is still there"
    page.click("#notice-action")
    expect_state(page, "Talking")
    assert len(server.talks) == 1
    expect(page.locator(".turn.user")).to_contain_text("u2<b>")


def test_waiting_for_a_place(page, server):
    server.places = 0
    page.click("#start")
    expect_state(page, "Waiting for a place")
    assert notice(page) == "All places are taken"
    page.click("#start")  # Cancel
    expect_state(page, "Ended")
    page.click("#start")
    expect_state(page, "Waiting for a place")
    server.places = 1
    expect_state(page, "Talking")
    expect(page.locator("#notice")).to_be_hidden()


def test_the_servers_words_about_trouble(page, server):
    start(page)
    server.send({"type": "warning", "message": "the machine is too slow"})
    expect(page.locator("#notice")).to_contain_text("the machine is too slow")
    server.send({"type": "error", "message": "no saved talk <i>x</i>"})
    expect(page.locator("#notice")).to_contain_text("no saved talk <i>x</i>")
    server.send({"type": "ended", "reason": "the server was stopped", "again": False})
    expect_state(page, "Ended")
    expect(page.locator("#notice")).to_contain_text("the server was stopped")


def test_a_talk_that_may_be_taken_up_again_offers_it(page, server):
    start(page)
    server.send({"type": "ended", "reason": "sound came too fast", "again": True})
    expect_state(page, "Ended")
    page.click("text=Take it up again")
    expect_state(page, "Talking")
    assert server.first_messages[-1]["resume"] == server.talk.key


def test_a_refused_start_says_why(page, server):
    server.refusal = "17 clients wait already: come back later"
    page.click("#start")
    assert notice(page) == "The talk could not begin"
    expect(page.locator("#notice")).to_contain_text("17 clients wait already")


def test_permission_denied(open_page, server):
    page = open_page(server.url, allow=False)
    page.click("#start")
    assert notice(page) == "The microphone is not allowed"
    expect_state(page, "Ready")


def test_no_microphone(open_page, server, launch):
    page = open_page(server.url, of=launch(None))
    page.click("#start")
    assert notice(page) == "No microphone found"


def test_a_microphone_of_exact_zeros(open_page, server, launch, tmp_path):
    zeros = write_microphone(tmp_path / "zeros.wav", np.zeros(8 * RATE))
    page = open_page(server.url, of=launch(zeros))
    start(page)
    assert notice(page) == "The microphone is silent"
    server.send({"type": "warning", "message": "your side has been exact silence"})
    page.wait_for_timeout(200)
    assert notice(page) == "The microphone is silent"  # once is enough


def test_an_unplugged_microphone_is_replaced(open_page, server):
    page = open_page(server.url, script=KEEP_STREAM)
    start(page)
    # What the browser does then: the track ends, without an end to the talk.
    page.evaluate("""const [track] = window.stream.getAudioTracks();
        track.stop(); track.dispatchEvent(new Event('ended')); """)
    assert notice(page) == "The microphone is gone"
    page.evaluate("navigator.mediaDevices.dispatchEvent(new Event('devicechange'))")
    expect(page.locator("#notice")).to_be_hidden()
    wait_for_frames(page, server, 5)


KEEP_CONTEXT = """
window.AudioContext = class extends AudioContext {
  constructor(...args) { super(...args); window.context = this; }
};
"""


def test_sound_that_the_browser_stopped_goes_on_with_any_key(open_page, server):
    page = open_page(server.url, script=KEEP_CONTEXT)
    start(page)
    page.evaluate("window.context.suspend()")
    assert notice(page) == "The browser stopped the sound"
    page.keyboard.press("Shift")
    expect(page.locator("#notice")).to_be_hidden()
    wait_for_frames(page, server, 5)


def test_plain_http_from_another_device(open_page, server):
    page = open_page(f"http://moshi.test:{server.port}", allow=False)
    assert notice(page) == "No microphone over plain http"
    assert "--ssl" in page.inner_text("#notice-text")


def test_a_browser_without_worklets(open_page, server):
    page = open_page(server.url, script="delete window.AudioWorkletNode;")
    page.click("#start")
    assert notice(page) == "This browser cannot process sound"


def test_a_server_that_is_gone_before_the_talk(open_page):
    with FakeServer() as server:
        page = open_page(server.url)
    page.click("#start")
    assert notice(page) == "The server does not answer"


def test_a_server_that_takes_no_talk(page, server):
    server.deaf = True
    page.click("#start")
    assert notice(page) == "The server refused the talk"
    expect_state(page, "Ended")


def test_a_server_that_comes_late(open_page, server):
    fail = "const real = fetch; window.fetch = (...a) => window.up ? real(...a) : Promise.reject();"
    page = open_page(server.url, script=fail, ready=False)
    assert notice(page) == "The server does not answer"
    assert page.locator("#start").is_disabled()
    page.evaluate("window.up = true")
    expect(page.locator("#start")).to_be_enabled()
    expect(page.locator("#notice")).to_be_hidden()


def test_the_token_is_taken_from_the_address(open_page, server):
    server.info["needs_token"] = True
    page = open_page(server.url)
    assert notice(page) == "A token is needed"
    page.goto(f"{server.url}/#token=s3cret&x")
    page.reload()
    start(page)
    assert server.first_messages[0]["token"] == "s3cret"
    assert "s3cret" not in page.url
    assert page.get_attribute("#downloads a", "href").endswith("?token=s3cret")


# -- people -----------------------------------------------------------------------------------------

FOCUSED = """() => {
  const at = document.activeElement;
  const shown = at.matches('.segments input') ? at.nextElementSibling : at;
  const { outlineStyle, outlineWidth } = getComputedStyle(shown);
  return [at.id || at.name || at.tagName, outlineStyle, parseFloat(outlineWidth)];
}"""


def test_keyboard_only(page, server):
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skip to the controls
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED)[0] == "start"
    page.keyboard.press("Enter")
    expect_state(page, "Talking")
    page.keyboard.press("Space")
    expect_state(page, "Paused")
    page.keyboard.press("Space")
    expect_state(page, "Talking")
    page.keyboard.press("m")
    expect(page.locator("#mute")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("s")
    page.keyboard.type("mse")  # in a field, keys are letters
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("“mse”")
    page.keyboard.press("e")
    expect_state(page, "Ended")
    page.keyboard.press("Shift+?")
    expect(page.locator("#use-keys")).to_be_visible()
    page.uncheck("#use-keys")
    page.locator("#transcript").focus()
    page.keyboard.press("Space")
    expect_state(page, "Ended")


def test_every_tab_stop_shows_its_focus(page, server):
    start(page)
    stops = []
    for _ in range(45):
        page.keyboard.press("Tab")
        stops.append(tuple(page.evaluate(FOCUSED)))
    names = {name for name, _, _ in stops}
    needed = {"mute", "save", "end", "transcript", "temp", "seed", "microphone", "mode"}
    assert needed <= names
    assert {
        stop for stop in stops if stop[0] != "BODY" and (stop[1] == "none" or stop[2] < 2)
    } == set()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_small_screens(open_page, server, width):
    page = open_page(server.url, viewport={"width": width, "height": 740}, has_touch=True)
    for step in (lambda: None, lambda: start(page), lambda: page.click("#save")):
        step()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("Escape")
    server.send({"type": "warning", "message": "x" * 300})
    server.send({"type": "word", "text": " " + "y" * 300, "speaker": "moshi", "start": 0, "end": 1})
    expect(page.locator(".turn.moshi")).to_contain_text("y" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("start", "mute", "save", "end"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["height"] >= 44 and box["width"] >= 44  # a finger's size, WCAG 2.5.5
        assert box["y"] + box["height"] <= 740


# Contrast of all text with what lies behind it, WCAG 1.4.3; translucent colours do not occur there.
CONTRAST = """() => {
  const channels = (colour) => {
    const scale = colour.startsWith('color(') ? 255 : 1;  // as color-mix gives it
    return colour.match(/[\\d.]+/g).map((part, i) => (i < 3 ? scale : 1) * part);
  };
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return channels(colour)[3] === 0 ? behind(element.parentElement) : colour;
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(':disabled')) continue;
    const pair = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) low.push(`${element.textContent.trim()} ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page, server, scheme):
    page = open_page(server.url, color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    start(page)
    expect(page.locator(".turn")).to_have_count(2)
    server.send({"type": "warning", "message": "the machine is too slow"})
    expect(page.locator("#notice")).to_be_visible()
    assert page.evaluate(CONTRAST) == []


def test_reduced_motion_stops_animations(open_page, server):
    page = open_page(server.url, reduced_motion="reduce")
    start(page)
    assert page.evaluate("document.getAnimations().length") == 0


DIALOGUE = [
    ("moshi", 0.6, "Hey, how is it going?"),
    ("user", 2.4, "Good, thanks. I am planning a trip to the coast and could use a hand."),
    ("moshi", 7.1, "Oh nice! Which coast did you have in mind?"),
    ("user", 9.8, "Brittany, by train from Paris, for a long weekend."),
    ("moshi", 13.4, "Then I would start in Saint-Malo. The walls at high tide are quite a sight."),
]


def say(server, speaker, at, text):
    for number, word in enumerate(text.split()):
        begin = at + 0.25 * number
        piece = {"text": f" {word}", "speaker": speaker, "start": begin, "end": begin + 0.2}
        server.send({"type": "word", **piece})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "size"), [("desktop", (1280, 860)), ("phone", (390, 844))])
def test_pictures(open_page, server, scheme, device, size, tmp_path):
    folder = Path(os.environ.get("MOSHI_TTT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    server.quiet = True
    server.info["model"] = "scripted, no model"  # nothing in the pictures was measured
    viewport = {"width": size[0], "height": size[1]}
    page = open_page(server.url, viewport=viewport, color_scheme=scheme)
    start(page)
    for line in DIALOGUE:
        say(server, *line)
    for frame in range(120):
        meter = server.talk.meter() | {"age": 0.15 * frame, "window_fill": frame / 160}
        meter |= {"lag_ms": 80 * (frame % 13 == 0), "frame_ms": 44 + 6 * np.sin(frame / 5)}
        meter["memory"] |= {
            "drift": 0.02 * np.sqrt(frame),
            "updates": 6 * frame,
            "tokens": 300 * frame,
        }
        server.send(meter | {"dropped": 0})
    expect(page.locator("#age")).to_have_text("0:17")
    page.wait_for_timeout(2000)  # for the voices' levels
    path = folder / f"page-{device}-{scheme}.png"
    page.screenshot(path=path)
    assert path.stat().st_size > 10_000
