"""The page of `fedshelf edge serve` in a real browser."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser.conftest import OpenTab, StartTill, Till
from tests.edge_models import info, photo, write_color_model

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

RED, TEAL, GRAY = photo((250, 0, 0)), photo((0, 128, 128)), photo((120, 120, 120))
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "\u202egnp.exe",
    "a\u0000b\u001b[2J",
    "'\"`${x}",
)


def test_an_uploaded_photo_is_named(till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(till.url)
    tab.choose(RED)
    tab.shows("#verdict", "Red")
    assert tab.page.locator("#guesses .product").all_inner_texts()[0] == "Red"
    assert tab.page.evaluate("document.getElementById('preview').naturalWidth") == 40
    assert tab.complaints == []


def test_the_live_camera_names_what_it_shows(till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(till.url)
    tab.page.click("#camera-button")
    tab.wait_until("document.getElementById('camera-view').videoWidth > 0")
    tab.page.click("#shutter-button")
    tab.shows("#guesses .product >> nth=0", "Green")  # the fake camera shows a green picture
    tab.page.click("#stop-button")
    assert tab.page.locator("#camera").is_hidden()
    assert tab.complaints == []


def test_below_the_threshold_it_is_not_sure_but_names_the_folder(till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(till.url)
    tab.choose(TEAL)
    tab.shows("#verdict", "Not sure")
    tab.shows("#folder", re.compile(r"something from Cold \(100%\)"))


def test_what_is_no_photo_is_refused_with_a_sentence(till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(till.url)
    tab.choose(b"no photo")
    tab.shows("#status", "This file cannot be read as a photo.")
    assert tab.page.locator("#result").is_hidden()


def test_a_correction_is_filed_on_the_disk(own_till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(own_till.url)
    tab.choose(TEAL)
    tab.page.click("#wrong-button")
    tab.page.fill("#product-input", "blu")
    assert tab.page.locator("#products option").evaluate_all("found => found.map((o) => o.value)") == ["Blue"]
    tab.page.fill("#product-input", "Blue")
    tab.page.click("#send-button")
    tab.shows("#status", "Thank you. The store's next training round learns from this photo.")
    (filed,) = own_till.photos()
    assert filed.startswith("Cold/Blue/correction-")
    assert tab.complaints == []


def test_an_unknown_product_waits_in_the_inbox(own_till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(own_till.url)
    tab.choose(TEAL)
    tab.page.click("#wrong-button")
    tab.page.fill("#product-input", "Kiwi")
    tab.page.keyboard.press("Enter")
    tab.shows("#status", re.compile("This product is new"))
    assert own_till.photos() == []


def test_both_languages_and_the_choice_is_remembered(till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(till.url, language="zh-CN")
    tab.shows("h1", "这是什么商品？")
    tab.choose(TEAL)
    tab.shows("#verdict", "不确定")
    tab.page.click("#language-button")
    tab.shows("#verdict", "Not sure")
    assert tab.page.evaluate("document.documentElement.lang") == "en"
    tab.page.reload()
    tab.shows("h1", "What is this product?")


def test_with_the_network_cut_it_says_that_the_server_does_not_answer(own_till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(own_till.url)
    tab.choose(RED)
    tab.shows("#verdict", "Red")
    own_till.end()
    tab.choose(TEAL)
    tab.shows("#status", "The server does not answer. Is it running?")
    assert tab.page.locator("#result").is_hidden()  # the old answer is not shown for the new photo


def test_it_is_used_with_the_keyboard_alone(own_till: Till, open_tab: OpenTab) -> None:
    tab = open_tab(own_till.url)
    choosers: list[Any] = []
    # Listen long before it is needed: Playwright does not wait until the browser has been told.
    tab.page.on("filechooser", lambda chooser: choosers.append(chooser))  # noqa: PLW0108  it marks what it is given
    keyboard = tab.page.keyboard

    def go_to(id: str) -> None:
        for _ in range(12):
            if tab.page.evaluate("document.activeElement.id") == id:
                assert tab.page.locator(f"#{id}").evaluate("found => getComputedStyle(found).outlineStyle") == "solid"
                return
            keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {id}")

    go_to("choose-button")
    keyboard.press("Enter")
    for _ in range(300):
        if choosers:
            break
        tab.page.wait_for_timeout(100)
    choosers[0].set_files({"name": "a.jpg", "mimeType": "image/jpeg", "buffer": TEAL})
    tab.shows("#verdict", "Not sure")
    go_to("wrong-button")
    keyboard.press("Space")
    assert tab.page.evaluate("document.activeElement.id") == "product-input"
    keyboard.type("Green")
    keyboard.press("Escape")  # closes the browser's list of products, if it is open by now: Enter would choose from it
    keyboard.press("Enter")
    tab.shows("#status", re.compile("next training round"))
    assert len(own_till.photos()) == 1


def test_a_narrow_phone_scrolls_in_one_direction_and_has_large_buttons(
    start_till: StartTill, open_tab: OpenTab, tmp_path: Path
) -> None:
    long = "Extraordinarily-long-product-name-without-any-space-" * 3
    till = start_till(model=write_color_model(tmp_path / "long.onnx", info((long, "B", "C"))))
    tab = open_tab(till.url, width=320, height=560)
    tab.choose(GRAY)
    tab.page.click("#wrong-button")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 320
    for button in tab.page.locator("button:visible").all():
        box = button.bounding_box()
        assert box is not None
        assert box["height"] >= 44
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 320


@contextmanager
def another_site(page: str) -> Iterator[str]:
    """A web site on another port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


ATTACK = """
async (url) => {
  const form = new FormData();
  const canvas = new OffscreenCanvas(8, 8);
  canvas.getContext("2d").fillRect(0, 0, 8, 8);
  form.append("file", await canvas.convertToBlob());
  form.append("product", "Green");
  const answers = [];
  for (const mode of ["no-cors", "cors"]) {
    const sent = fetch(url + "v1/corrections", { method: "POST", body: form, mode });
    answers.push(await sent.then(() => "sent", () => "refused"));
  }
  for (const path of ["v1/model", ""]) {
    answers.push(await fetch(url + path).then(() => "read", () => "refused"));
  }
  return answers;
}
"""


FORM = """
(url) => {
  const form = document.createElement("form");
  Object.assign(form, { method: "post", enctype: "multipart/form-data", action: url + "v1/corrections" });
  document.body.append(form);
  form.submit();
}
"""


@pytest.mark.parametrize("origin", ["foreign", "null"])
def test_another_web_site_can_neither_write_nor_read(till: Till, browser: Any, origin: str) -> None:
    sandbox = '<iframe sandbox="allow-scripts allow-forms" srcdoc="<p>x</p>"></iframe>'
    with another_site(sandbox if origin == "null" else "<p>x</p>") as site:
        page = browser.new_page()
        page.goto(site)
        frame = page.frames[-1]
        expected = "null" if origin == "null" else site.rstrip("/")
        assert frame.evaluate("self.origin") == expected
        assert frame.evaluate(ATTACK, till.url) == ["refused"] * 4  # a script learns nothing at all
        with page.expect_response(f"{till.url}v1/corrections") as answer:
            frame.evaluate(FORM, till.url)
        assert answer.value.status == 403
        assert answer.value.request.all_headers()["origin"] == expected
        page.close()
    assert till.photos() == []


def test_no_other_site_can_frame_the_page(till: Till, browser: Any) -> None:
    with another_site(f'<iframe src="{till.url}"></iframe>') as site:
        page = browser.new_page()
        page.goto(site)
        assert page.frames[-1].url == "chrome-error://chromewebdata/"
        page.goto(till.url)
        assert page.frames[-1].locator("#take-button").count() == 1
        page.close()


def test_a_thousand_hostile_labels_are_shown_as_text_and_filed_inside_the_store(
    start_till: StartTill, open_tab: OpenTab, tmp_path: Path
) -> None:
    labels = [f"{HOSTILE[n % len(HOSTILE)]}{n}" for n in range(1000)]
    till = start_till(model=write_color_model(tmp_path / "hostile.onnx", info(labels)))
    tab = open_tab(till.url)
    tab.choose(GRAY)
    tab.page.wait_for_selector("#guesses li")
    shown = tab.page.locator("#guesses .product").evaluate_all("found => found.map((item) => item.textContent)")
    assert set(shown) <= set(labels)
    assert "<img src=x onerror=alert(1)>0" in shown
    assert tab.page.locator("main img:not(#preview), #guesses script").count() == 0
    tab.page.click("#wrong-button")
    for label in labels[: len(HOSTILE)]:
        tab.page.fill("#product-input", label)
        with tab.page.expect_response("**/v1/corrections") as answer:
            tab.page.evaluate("document.getElementById('correction-form').requestSubmit()")
        assert answer.value.status in (200, 422)
        tab.page.evaluate("document.getElementById('correction-form').hidden = false")
    assert all(path.resolve().is_relative_to(till.store) and path.name.isprintable() for path in till.store.rglob("*"))
    assert tab.dialogs == []
    assert not [said for said in tab.complaints if "422" not in said]
