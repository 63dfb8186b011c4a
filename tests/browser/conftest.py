"""Browsers, pages and a server for faults."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import soundfile

import moshi_ttt_mlx

from .chromium import RATE, TAP, WATCH_POLICY, launched, write_microphone

SPEECH = Path(moshi_ttt_mlx.__file__).parent / "assets" / "demo_clip.flac"


@pytest.fixture(scope="module")
def microphone(tmp_path_factory):
    """A wav: four seconds of speech between two of silence."""
    speech, rate = soundfile.read(SPEECH, frames=4 * RATE)
    assert rate == RATE
    return write_microphone(tmp_path_factory.mktemp("browser") / "mic.wav", speech)


@pytest.fixture(scope="module")
def playwright():
    from playwright.sync_api import sync_playwright

    manager = sync_playwright()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LD_PRELOAD", raising=False)  # OpenBLAS is for MLX, not for a browser
        running = manager.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser(playwright, microphone):
    # moshi.test is this machine, by a name that makes the page no secure context.
    with launched(playwright, microphone, "--host-resolver-rules=MAP moshi.test 127.0.0.1") as it:
        yield it


@pytest.fixture
def launch(playwright):
    """Starts more browsers, with other microphones."""
    with ExitStack() as browsers:
        yield lambda *args: browsers.enter_context(launched(playwright, *args))


@pytest.fixture
def open_page(browser, launch):
    """Opens pages; afterwards none may have thrown, or broken the server's policy."""
    from playwright.sync_api import expect

    pages, errors = [], []

    def open_page(url, *, of=browser, script="", allow=True, ready=True, **options):
        context = of.new_context(permissions=["microphone"] if allow else [], **options)
        context.set_default_timeout(60_000)
        context.add_init_script(WATCH_POLICY + TAP + script)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        if ready:
            expect(page.locator("#start")).to_be_enabled(timeout=60_000)
        pages.append(page)
        return page

    yield open_page
    violations = [page.evaluate("window.violations") for page in pages]
    for page in pages:
        page.context.close()
    assert errors == []
    assert violations == [[]] * len(pages)


@pytest.fixture
def server():
    from .fake_server import FakeServer

    with FakeServer() as server:
        yield server


@pytest.fixture
def page(open_page, server):
    return open_page(server.url)
