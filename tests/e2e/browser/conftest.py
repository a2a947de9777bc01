"""A headless Chromium, Debian's, and tills that serve a small model to it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.edge_models import info, write_color_model

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)  # fmt: skip
PATHS = ("Warm/Red", "Cold/Green", "Cold/Blue")


@dataclass
class Till:
    """A running `fedshelf-edge serve`.

    Attributes:
        process: the process.
        url: the address of its page.
        store: its photo folder.
    """

    process: "subprocess.Popen[str]"
    url: str
    store: Path

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0

    def photos(self) -> list[str]:
        """The corrected photos that lie in folders of products."""
        found = (path.relative_to(self.store) for path in self.store.rglob("correction-*.jpg"))
        return sorted(str(path) for path in found if path.parts[0] != ".fedshelf")


@dataclass
class Tab:
    """A page in the browser, and what it did.

    Attributes:
        page: Playwright's page.
        requests: the addresses of all requests.
        complaints: errors in the console, and violations of the content security policy.
        dialogs: texts of the dialogs that scripts have opened.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def choose(self, data: bytes, name: str = "photo.jpg", kind: str = "image/jpeg") -> None:
        self.page.set_input_files("#choose-input", {"name": name, "mimeType": kind, "buffer": data})

    def wait_until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; Playwright's own way to wait violates the page's policy."""
        for _ in range(600):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(condition)

    def shows(self, selector: str, text: "str | re.Pattern[str]") -> None:
        """Wait until an element has this text."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_text(text, timeout=20_000)


OpenTab = Callable[..., Tab]
StartTill = Callable[..., Till]


@contextmanager
def running_till(folder: Path, *flags: str, model: Path | None = None) -> Iterator[Till]:
    """Start a till with a photo folder of its own; by default, it tells three colors apart."""
    model = model or write_color_model(folder / "m.onnx", info(paths=PATHS))
    store = folder / "store"
    for path in PATHS:
        (store / path).mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedshelf.edge.till", "serve", str(model), "--port", "0", "--data-dir", str(store),
         *flags],
        text=True, stdout=subprocess.PIPE, env={**os.environ, "FEDSHELF_HOME": str(folder / "home")},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        found = re.search(r" at (http://\S+)", process.stdout.readline())
        assert found
        yield Till(process, found[1], store)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def start_till(tmp_path: Path) -> Iterator[StartTill]:
    with ExitStack() as stack:
        yield lambda *flags, model=None: stack.enter_context(running_till(tmp_path, *flags, model=model))


@pytest.fixture
def own_till(start_till: StartTill) -> Till:
    return start_till()


@pytest.fixture(scope="module")
def till(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Till]:
    """For tests that change nothing."""
    with running_till(tmp_path_factory.mktemp("till")) as shared:
        yield shared


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for a module: Playwright's event loop would be in the way of other tests."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    with playwright.sync_playwright() as running:
        flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else list(FLAGS)
        opened = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def open_tab(browser: Any) -> Iterator[OpenTab]:
    """Opens pages in fresh profiles; in the end, none may have sent a request to another address than its till's."""
    opened: list[tuple[Tab, str, Any]] = []

    def open_(url: str, *, width: int = 390, height: int = 780, language: str = "en-US", **options: Any) -> Tab:
        context = browser.new_context(viewport={"width": width, "height": height}, locale=language, **options)
        context.set_default_timeout(30_000)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (found) => console.error('CSP', found.violatedDirective));"
        )
        tab = Tab(context.new_page())
        context.on("request", lambda request: tab.requests.append(request.url))
        context.on("console", lambda said: tab.complaints.append(said.text) if said.type == "error" else None)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("dialog", lambda dialog: dismiss(tab, dialog))
        opened.append((tab, url, context))
        tab.page.goto(url)
        return tab

    yield open_
    for tab, url, context in opened:
        context.close()
        assert tab.requests
        assert foreign(tab.requests, url) == []


def dismiss(tab: Tab, dialog: Any) -> None:
    """Note a dialog and close it."""
    tab.dialogs.append(dialog.message)
    dialog.dismiss()


def foreign(requests: Sequence[str], url: str) -> list[str]:
    """The requests that left for another address."""
    return [request for request in requests if not request.startswith((url, f"blob:{url}", "data:"))]
