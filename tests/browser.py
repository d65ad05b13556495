"""Fixtures for pages in a real browser: `browser`, and `visitor` in a desktop and a phone window."""

import pytest
from needs import lacks, leave_out, module, program


class Visitor:
    """A page in a real browser that records every error."""

    def __init__(self, page):
        self.page, self.errors = page, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("requestfailed", lambda request: self.errors.append(f"{request.url}: {request.failure}"))

    def pictures(self, which=".picture img"):
        """How many of the visible pictures are loaded, and how many there are."""
        self.page.wait_for_load_state("networkidle")
        widths = self.page.eval_on_selector_all(
            which, "all => all.filter((i) => i.offsetParent).map((i) => i.naturalWidth)"
        )
        return sum(width > 20 for width in widths), len(widths)

    def sticks_out(self):
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.fixture(scope="session")
def browser():
    leave_out(lacks("chromium"))
    with module("playwright.sync_api", "playwright").sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=program("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(params=[1280, 400])
def visitor(request, browser):
    """A visitor with a desktop window, then with a phone window."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    yield Visitor(page)
    page.close()
