"""The model in a real browser: the same answers as the server's on equal pixels, also with the network cut."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedshelf.edge.serving.browser_model import RUNTIME, RUNTIME_FILES
from fedshelf.edge.serving.session import Session
from tests.e2e.browser.conftest import PATHS, OpenTab, StartTill, Tab
from tests.model_folders import write_model
from tests.unit.cli.screen import run

pytestmark = [
    pytest.mark.browser, pytest.mark.e2e, pytest.mark.slow,
    pytest.mark.skipif(
        not all((RUNTIME / name).exists() for name in RUNTIME_FILES),
        reason="ONNX Runtime for browsers is missing: make browser-runtime",
    ),
]  # fmt: skip
SIZE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional network, exported."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "model", paths=list(PATHS), image_size=SIZE)
    code, text = run("export", str(folder / "model"), "--format", "onnx", "--out", str(folder / "m.onnx"))
    assert code == 0, text
    return folder / "m.onnx"


def png(height: int, width: int, seed: int) -> bytes:
    """A photo whose pixels all decoders agree on."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


PROBABILITIES = """
async ([photo, url]) => {
  const { open, pixelsOf, probabilitiesOf } = await import("/in-browser.js");
  const session = await open(await (await fetch(url)).arrayBuffer());
  const bytes = Uint8Array.from(atob(photo), (letter) => letter.charCodeAt(0));
  const pixels = await pixelsOf(new Blob([bytes], { type: "image/png" }));
  return { ...pixels, data: Array.from(pixels.data), answer: Array.from(await probabilitiesOf(session, pixels)) };
}
"""


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (57, 91), (20, 200)])
def test_equal_pixels_have_equal_probabilities(
    start_till: StartTill, open_tab: OpenTab, model: Path, height: int, width: int
) -> None:
    tab = open_tab(start_till("--in-browser", model=model).url)
    photo = png(height, width, 1)
    found = tab.page.evaluate(PROBABILITIES, [base64.b64encode(photo).decode(), "v1/model.onnx"])
    pixels = np.asarray(Image.open(io.BytesIO(photo)))
    assert (found["height"], found["width"]) == (height, width)
    assert np.array_equal(np.reshape(found["data"], pixels.shape), pixels)
    expected = Session.open(model).predict(pixels)
    assert np.abs(np.array(found["answer"]) - expected).max() <= 1e-5
    assert tab.complaints == []


def shown(tab: Tab) -> list[tuple[str, str]]:
    tab.page.wait_for_selector("#guesses li")
    items = tab.page.locator("#guesses li").evaluate_all(
        "found => found.map((item) => [item.children[0].textContent, item.children[1].textContent])"
    )
    return [(product, probability) for product, probability in items]


def test_the_page_names_a_photo_itself_as_the_server_would(
    start_till: StartTill, open_tab: OpenTab, model: Path
) -> None:
    till = start_till("--in-browser", model=model)
    tab = open_tab(till.url)
    photo = png(SIZE, SIZE, 2)
    tab.choose(photo, "photo.png", "image/png")
    tab.shows("#status", "Named on this device.")
    in_browser = shown(tab), tab.page.inner_text("#verdict"), tab.page.inner_text("#folder")
    assert not [request for request in tab.requests if request.endswith("/v1/predict")]  # the photo was not sent
    assert tab.complaints == []
    (tab.page.context).clear_cookies()
    server = tab.page.evaluate(
        """async (photo) => {
          const form = new FormData();
          form.append("file", new Blob([Uint8Array.from(atob(photo), (letter) => letter.charCodeAt(0))]));
          prediction = await request("v1/predict", form);
          showPrediction();
        }""",
        base64.b64encode(photo).decode(),
    )
    assert server is None
    assert (shown(tab), tab.page.inner_text("#verdict"), tab.page.inner_text("#folder")) == in_browser


def test_with_the_network_cut_a_reloaded_page_still_names_photos(
    start_till: StartTill, open_tab: OpenTab, model: Path
) -> None:
    till = start_till("--in-browser", model=model)
    tab = open_tab(till.url)
    photo = png(40, 50, 3)
    tab.choose(photo, "photo.png", "image/png")
    before = shown(tab)
    tab.page.evaluate("navigator.serviceWorker.ready.then(() => {})")
    till.end()
    tab.page.reload()
    tab.choose(photo, "photo.png", "image/png")
    assert shown(tab) == before
    tab.page.click("#wrong-button")
    tab.page.fill("#product-input", "Red")
    tab.page.click("#send-button")
    tab.shows("#status", "The server does not answer. Is it running?")


def test_what_is_no_photo_is_refused_in_the_browser_too(start_till: StartTill, open_tab: OpenTab, model: Path) -> None:
    tab = open_tab(start_till("--in-browser", model=model).url)
    tab.choose(b"no photo")
    tab.shows("#status", "This file cannot be read as a photo.")


def test_a_till_without_the_mode_removes_what_the_browser_has_kept(
    start_till: StartTill, open_tab: OpenTab, model: Path, tmp_path: Path
) -> None:
    tab = open_tab(start_till(model=model).url)
    assert tab.page.evaluate("WebAssembly.compile(new Uint8Array([0,97,115,109,1,0,0,0])).then(() => 1, () => 0)") == 0
    tab.page.evaluate("caches.open('fedshelf-1').then((cache) => cache.put('x', new Response('x')))")
    tab.page.reload()
    tab.wait_until("caches.has('fedshelf-1').then((found) => !found)")
