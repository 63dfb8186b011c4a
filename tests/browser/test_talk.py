"""The page and the real server with the small model: sound, words, files, saving, places, guests."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile
from open_memory import save_open_memory
from tiny import SMALL

from .chromium import NEEDS_CHROMIUM, RATE, played, resemblance

pytest.importorskip("aiohttp", reason="needs aiohttp: requirements/web.txt")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from .driving import CLEAN_UP, expect, expect_state, notice, start, wait_for

pytestmark = NEEDS_CHROMIUM

# Lets a test break the line as a network does.
CATCH_SOCKETS = """
window.sockets = [];
window.WebSocket = class extends WebSocket {
  constructor(...args) { super(...args); window.sockets.push(this); }
};
"""


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory):
    """A memory with open gates, untrained, for the small model."""
    return save_open_memory(tmp_path_factory.mktemp("adapter"))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class ModelServer:
    """`moshi-ttt-mlx serve` as its own process."""

    def __init__(self, adapter_path, sessions, *flags, port=None):
        self.port = port or free_port()
        self.url = f"http://localhost:{self.port}"
        command = [sys.executable, "-m", "moshi_ttt_mlx", "serve", "--hf-repo", SMALL]
        command += ["--adapter-path", adapter_path, "--sessions-dir", str(sessions)]
        command += ["--port", str(self.port), "--no-browser", *flags]
        self.process = subprocess.Popen(command)

    def wait(self):
        for _ in range(600):
            assert self.process.poll() is None
            try:
                return socket.create_connection(("localhost", self.port), 10).close()
            except ConnectionRefusedError:
                time.sleep(0.1)
        raise TimeoutError(self.url)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def serve(adapter_path, tmp_path):
    """Starts servers that share a folder of saved talks."""
    servers = []

    def serve(*flags, port=None):
        servers.append(ModelServer(adapter_path, tmp_path / "sessions", *flags, port=port))
        servers[-1].wait()
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def model_server(adapter_path, tmp_path_factory):
    server = ModelServer(adapter_path, tmp_path_factory.mktemp("sessions"))
    server.wait()
    yield server
    server.stop()


def age(page):
    minutes, seconds = page.inner_text("#age").split(":")
    return 60 * int(minutes) + int(seconds)


def shown_words(page):
    return " ".join(page.locator(".turn-words").all_inner_texts()).split()


def download(page, name, folder):
    with page.expect_download() as started:
        page.click(f"#downloads a[data-file='{name}']")
    path = folder / name
    started.value.save_as(path)
    return path


def talk_in_real_time(page, seconds):
    """Talk until every frame was heard; returns what the page played. A busy machine drops some."""
    for _ in range(3):
        page.evaluate("window.tapped.length = 0")
        start(page)
        expect(page.locator("#memory-mode")).to_have_text("learning")
        wait_for(page, lambda: age(page) > seconds)
        reply = played(page)
        page.click("#end")
        expect_state(page, "Ended")
        if page.inner_text("#dropped") == "0":
            return reply
    pytest.skip("this machine is too busy for real time")


def test_a_talk_and_its_files(open_page, model_server, microphone, tmp_path):
    spoken, _ = soundfile.read(microphone)
    page = open_page(model_server.url)
    for name in CLEAN_UP:  # they change the sound on purpose
        page.uncheck(f"[name={name}]")
    reply = talk_in_real_time(page, len(spoken) / RATE + 1)

    sound, rate = soundfile.read(download(page, "audio.wav", tmp_path))
    assert rate == RATE
    moshi, user = sound.T
    # As in test_page.py.
    assert resemblance(user, spoken) > 0.98
    # The small model never stops making noise of one level: that it is this noise shows in its
    # spectrum, that it was played in its length.
    assert len(reply) / RATE > 5
    reply = reply.clip(-1, 1)  # the file's range; a loudspeaker's, too
    assert spectrum(reply) @ spectrum(moshi) > 0.98
    assert spectrum(reply) @ spectrum(user) < 0.9

    words = json.loads(download(page, "transcript.json", tmp_path).read_text())["words"]
    assert {word["speaker"] for word in words} == {"moshi"}
    assert len(words) > 5
    assert shown_words(page) == [word["text"] for word in words]
    assert download(page, "transcript.vtt", tmp_path).read_text().startswith("WEBVTT")


def spectrum(sound):
    """Mean magnitude by frequency, of length 1."""
    whole = sound[: len(sound) - len(sound) % 960].reshape(-1, 960)
    mean = np.abs(np.fft.rfft(whole, axis=1)).mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_save_restart_resume(open_page, serve):
    first = serve()
    page = open_page(first.url)
    start(page)
    wait_for(page, lambda: age(page) >= 3)
    page.click("#start")
    expect_state(page, "Paused")
    page.click("#save")
    page.fill("#save-name", "over night")
    page.click("#save-dialog [type=submit]")
    expect(page.locator("#notice")).to_contain_text("over night")
    before, words, tokens = age(page), shown_words(page), page.inner_text("#tokens")
    page.click("#end")
    expect_state(page, "Ended")
    first.stop()

    page = open_page(serve().url)
    page.click("#saved button")
    expect_state(page, "Talking")
    wait_for(page, lambda: age(page) >= before + 1 and page.inner_text("#tokens").isdecimal())
    page.click("#start")
    expect_state(page, "Paused")
    # The last word may have grown.
    assert shown_words(page)[: len(words) - 1] == words[:-1]
    assert len(shown_words(page)) > len(words)
    # A new memory would have taken in nothing yet: its window is longer than what came since.
    assert int(page.inner_text("#tokens")) >= int(tokens) > 0


def test_the_talk_that_the_server_was_given_goes_on_with_start(open_page, serve):
    page = open_page(serve("--session", "over night").url)
    start(page)
    wait_for(page, lambda: age(page) >= 3)
    page.click("#end")
    expect_state(page, "Ended")
    words = shown_words(page)
    start(page)
    wait_for(page, lambda: age(page) >= 4)
    assert shown_words(page)[: len(words) - 1] == words[:-1]  # the last one may have grown


def test_a_second_tab_waits_for_the_first(open_page, model_server):
    first, second = open_page(model_server.url), open_page(model_server.url)
    start(first)
    second.click("#start")
    expect_state(second, "Waiting for a place")
    assert notice(second) == "All places are taken"
    first.click("#end")
    expect_state(first, "Ended")
    expect_state(second, "Talking")
    wait_for(second, lambda: shown_words(second))
    second.click("#end")
    expect_state(second, "Ended")


def test_a_dropped_connection_is_taken_up_again(open_page, model_server):
    page = open_page(model_server.url, script=CATCH_SOCKETS)
    start(page)
    wait_for(page, lambda: age(page) >= 2)
    page.evaluate("window.sockets[0].close()")
    wait_for(page, lambda: page.evaluate("window.sockets.length") == 2)
    expect_state(page, "Talking")
    before = age(page)
    wait_for(page, lambda: age(page) >= before + 1)
    assert before >= 2  # the same talk
    page.click("#end")
    expect_state(page, "Ended")
    href = page.get_attribute("#downloads a[data-file='transcript.json']", "href")
    words = [word["text"] for word in model_server.get(href)["words"]]
    assert shown_words(page) == words


def test_a_server_that_was_restarted_does_not_know_the_talk(open_page, serve):
    server = serve()
    page = open_page(server.url)
    start(page)
    server.process.kill()
    expect_state(page, "Reconnecting")
    assert notice(page) == "The connection is lost"
    server.process.wait(30)
    serve(port=server.port)
    expect_state(page, "Ended")
    assert notice(page) == "The talk has ended"
    start(page)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_another_device_talks_over_tls_with_the_token(open_page, serve, tmp_path):
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout key.pem -out cert.pem"
    subprocess.run([*make.split(), "-subj", "/CN=test"], cwd=tmp_path, check=True)
    server = serve("--host", "0.0.0.0", "--ssl", str(tmp_path), "--token", "let me in")
    address = f"https://127.0.0.1:{server.port}/"
    stranger = open_page(address, ignore_https_errors=True)
    assert notice(stranger) == "A token is needed"
    stranger.click("#start")
    expect_state(stranger, "Ended")
    assert notice(stranger) == "The talk could not begin"
    page = open_page(f"{address}#token=let%20me%20in", ignore_https_errors=True)
    start(page)
    wait_for(page, lambda: shown_words(page))
    page.click("#end")
    expect_state(page, "Ended")
    assert page.url == address


KNOCK = """(url) => new Promise((resolve) => {
  const socket = new WebSocket(url);
  socket.onopen = () => resolve('open');
  socket.onerror = () => resolve('refused');
})"""


def test_a_foreign_page_is_refused(open_page, model_server, server):
    url = f"ws://localhost:{model_server.port}/api/talk"
    own, foreign = open_page(model_server.url), open_page(server.url)
    assert own.evaluate(KNOCK, url) == "open"
    assert foreign.evaluate(KNOCK, url) == "refused"


def test_a_foreign_name_for_this_machine_is_refused(open_page, model_server):
    page = open_page(f"http://moshi.test:{model_server.port}", ready=False)
    assert "not known by that name" in page.inner_text("body")
