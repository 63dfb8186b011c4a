"""What a user does on the page and waits for, in one place; needs playwright."""

import pytest
from playwright.sync_api import expect

CLEAN_UP = ("echoCancellation", "noiseSuppression", "autoGainControl")
PATIENCE_MS = 60_000

__all__ = ["CLEAN_UP", "expect", "expect_state", "notice", "start", "wait_for"]


def expect_state(page, state):
    expect(page.locator("#state")).to_have_text(state, timeout=PATIENCE_MS)


def start(page):
    page.click("#start")
    expect_state(page, "Talking")


def notice(page):
    """The title of the message that is shown, as soon as there is one."""
    expect(page.locator("#notice")).to_be_visible(timeout=PATIENCE_MS)
    return page.inner_text("#notice-title")


def wait_for(page, condition):
    """Until a condition of ours holds, while the browser goes on."""
    for _ in range(PATIENCE_MS // 50):
        if condition():
            return
        page.wait_for_timeout(50)
    pytest.fail(f"waited {PATIENCE_MS} ms in vain")
