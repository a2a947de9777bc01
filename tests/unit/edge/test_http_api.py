"""The HTTP API: what it answers, and whom it refuses."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from fedshelf.edge.model_info import ModelInfo
from fedshelf.edge.serving import http_api, uploads
from fedshelf.edge.serving.corrections import JOURNAL, Corrections
from fedshelf.edge.serving.guard import Access, Guard
from fedshelf.edge.serving.http_api import make_app
from fedshelf.edge.serving.openapi import document
from fedshelf.edge.serving.recognizer import MOST_REQUESTS
from fedshelf.edge.serving.session import Session
from tests.edge_models import info, photo, write_color_model

STATIC = Path(http_api.__file__).with_name("static")
RED, MIXED = photo((250, 5, 5)), photo((128, 128, 0))
LOCAL = Access.of("127.0.0.1", token="")
Ask = Callable[..., httpx.Response]


def app_of(tmp_path: Path, about: ModelInfo | None = None, *, access: Access = LOCAL, corrects: bool = True) -> Guard:
    about = about or info(["Gala", "Fuji", "Milk"], ["Fruit/Apple/Gala", "Fruit/Apple/Fuji", "Dairy/Milk"])
    session = Session.open(write_color_model(tmp_path / "m.onnx", about))
    (tmp_path / "store" / "Milk").mkdir(parents=True, exist_ok=True)
    filed = Corrections(tmp_path / "store", labels=about.labels, paths=about.paths) if corrects else None
    return make_app(session, access=access, corrections=filed)


def asker(app: Guard, base: str = "http://localhost:8765") -> Ask:
    def ask(method: str, path: str, **request: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())

    return ask


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    return asker(app_of(tmp_path))


def predict(ask: Ask, data: bytes = RED, **request: Any) -> httpx.Response:
    return ask("POST", "/v1/predict", files={"file": ("x.jpg", data, "image/jpeg")}, **request)


def correct(ask: Ask, data: bytes = RED, product: str = "Milk", **request: Any) -> httpx.Response:
    return ask("POST", "/v1/corrections", files={"file": data}, data={"product": product}, **request)


def test_a_photo_is_answered_with_its_products_and_the_models_digest(ask: Ask) -> None:
    answer = predict(ask)
    assert answer.status_code == 200
    found = answer.json()
    assert [guess["product"] for guess in found["predictions"]] == ["Gala", "Fuji", "Milk"]
    assert found["predictions"][0]["probability"] > 0.99
    assert found["sure"] is True
    assert re.fullmatch("[0-9a-f]{64}", found["model"])
    assert "folder" not in found


def test_an_unsure_answer_has_the_deepest_folder_that_is_sure(ask: Ask) -> None:
    found = predict(ask, MIXED).json()
    assert found["sure"] is False
    assert found["folder"]["path"] == "Fruit/Apple"
    assert found["folder"]["probability"] == pytest.approx(
        sum(guess["probability"] for guess in found["predictions"] if guess["product"] != "Milk"), abs=1e-6
    )


def test_no_folder_is_guessed_where_none_is_sure(ask: Ask) -> None:
    assert predict(ask, photo((90, 90, 90))).json()["folder"] is None


def test_at_most_five_products_are_named(tmp_path: Path) -> None:
    ask = asker(app_of(tmp_path, info([f"p{n}" for n in range(40)])))
    assert len(predict(ask).json()["predictions"]) == 5


def test_a_corrected_photo_is_filed_and_the_second_time_it_is_the_same(ask: Ask, tmp_path: Path) -> None:
    first, second = correct(ask, MIXED).json(), correct(ask, MIXED).json()
    assert first == second
    assert first["status"] == "training"
    assert len(list((tmp_path / "store/Dairy/Milk").iterdir())) == 1


def test_a_correction_against_a_sure_model_is_held(ask: Ask, tmp_path: Path) -> None:
    answer = correct(ask, RED).json()
    assert answer["status"] == "review"
    assert "sure that it is Gala" in answer["reason"]
    assert not (tmp_path / "store/Dairy").exists()


def test_a_correction_may_name_a_recent_prediction_instead_of_the_photo(tmp_path: Path) -> None:
    async def both() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app=app_of(tmp_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            made = (await client.post("/v1/predict", files={"file": MIXED})).json()
            fields = {"prediction": (None, made["id"]), "product": (None, "Milk")}
            forgotten = {"prediction": (None, "unknown"), "product": (None, "Milk")}
            return (await client.post("/v1/corrections", files=fields),
                    await client.post("/v1/corrections", files=forgotten))  # fmt: skip

    filed, refused = asyncio.run(both())
    assert filed.json()["status"] == "training"
    assert refused.status_code == 404
    assert "not remembered" in refused.json()["error"]


def test_an_unknown_product_goes_to_the_inbox(ask: Ask) -> None:
    assert correct(ask, MIXED, "火龙果").json()["status"] == "inbox"


def test_without_a_photo_folder_no_corrections_are_taken(tmp_path: Path) -> None:
    ask = asker(app_of(tmp_path, corrects=False))
    answer = correct(ask)
    assert answer.status_code == 404
    assert "--data-dir" in answer.json()["error"]
    assert ask("GET", "/v1/model").json()["corrections"] is False


def test_a_nameless_product_is_refused(ask: Ask, tmp_path: Path) -> None:
    for product in ("", "\u202e"):
        assert correct(ask, MIXED, product).status_code == 422
    assert not (tmp_path / "store" / JOURNAL).exists()


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff" + bytes(50), b"GIF89a" + bytes(9)])
def test_what_is_not_a_photo_is_refused_without_a_fault(ask: Ask, data: bytes) -> None:
    answer = predict(ask, data)
    assert answer.status_code == 422
    assert "cannot be decoded" in answer.json()["error"]


def test_a_form_without_a_photo_is_refused(ask: Ask) -> None:
    answer = ask("POST", "/v1/predict", files={"product": (None, "Milk")})
    assert (answer.status_code, "field 'file'" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 415), ("", 415), ("multipart/form-data", 400), ("multipart/form-data; boundary=", 400),
        ("multipart/form-data; boundary=x; charset=nonsense", 400), ("multipart/form-data; boundary=" + "x" * 400, 400),
    ],
)  # fmt: skip
def test_a_malformed_form_is_refused(ask: Ask, content_type: str, status: int) -> None:
    answer = ask("POST", "/v1/predict", content=b"--x\r\nnonsense", headers={"content-type": content_type})
    assert answer.status_code == status
    assert answer.json()["error"]


def test_too_many_fields_and_too_long_ones_are_refused(ask: Ask) -> None:
    many = {f"f{n}": (None, "x") for n in range(9)}
    assert ask("POST", "/v1/predict", files=many).status_code == 400
    assert ask("POST", "/v1/predict", files={"product": (None, "x" * 5000)}).status_code == 400
    assert ask("POST", "/v1/predict", files=[("file", RED), ("file", RED)]).status_code == 400


def test_a_body_that_is_too_large_is_refused_before_it_is_read(ask: Ask) -> None:
    sent = []

    async def endless() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while True:
            sent.append(1 << 20)
            yield bytes(1 << 20)

    form = {"content-type": "multipart/form-data; boundary=x"}
    announced = ask(
        "POST", "/v1/predict", content=b"", headers={**form, "content-length": str(uploads.MAX_BODY_BYTES + 1)}
    )
    assert announced.status_code == 413
    streamed = ask("POST", "/v1/predict", content=endless(), headers=form)
    assert streamed.status_code == 413
    assert sum(sent) <= uploads.MAX_BODY_BYTES + (2 << 20)


def test_a_bomb_is_refused(ask: Ask) -> None:
    header = photo((0, 0, 0), (8, 8), format="PNG")
    bomb = header[:16] + (100_000).to_bytes(4, "big") * 2 + header[24:]
    assert predict(ask, bomb).status_code == 422


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True), ("localhost:8765", True), ("127.0.0.1:8765", True), ("[::1]:8765", True),
        ("LOCALHOST", True), ("evil.example", False), ("localhost.evil.example", False), ("192.168.1.9:8765", False),
        ("", False), ("127.0.0.1.evil.example", False), ("localhost@evil.example", False),
    ],
)  # fmt: skip
def test_a_local_server_answers_only_to_its_own_names(ask: Ask, host: str, is_allowed: bool) -> None:
    assert ask("GET", "/healthz", headers={"host": host}).status_code == (200 if is_allowed else 403)


def test_a_second_host_header_is_refused(ask: Ask) -> None:
    assert ask("GET", "/healthz", headers=[("host", "localhost"), ("host", "evil.example")]).status_code == 403


@pytest.mark.parametrize(
    "origin",
    ["null", "https://evil.example", "http://localhost:1", "http://localhost:8765.evil.example", "", "localhost:8765"],
)
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/corrections"])
def test_a_foreign_origin_may_not_post(ask: Ask, tmp_path: Path, origin: str, path: str) -> None:
    answer = ask("POST", path, files={"file": MIXED}, data={"product": "Milk"}, headers={"origin": origin})
    assert answer.status_code == 403
    assert not (tmp_path / "store" / JOURNAL).exists()


def test_a_cross_site_request_without_an_origin_may_not_post(ask: Ask) -> None:
    assert predict(ask, headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_the_own_origin_may_post(ask: Ask) -> None:
    assert predict(ask, headers={"origin": "http://localhost:8765"}).status_code == 200


def test_no_answer_allows_another_origin_to_read(ask: Ask) -> None:
    answer = ask("OPTIONS", "/v1/predict", headers={"origin": "https://evil.example"})
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


TOKEN = "a-token-of-more-than-twenty-characters"


@pytest.fixture
def ask_remote(tmp_path: Path) -> Ask:
    return asker(app_of(tmp_path, access=Access.of("0.0.0.0", token=TOKEN, names=["till.example"])), "http://10.0.0.7")


def test_another_machine_needs_the_token_for_all_that_tells_of_the_store(ask_remote: Ask) -> None:
    for path in ("/v1/model", "/openapi.json", "/v1/predict", "/unknown"):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": "Bearer "}):
            assert ask_remote("GET", path, headers=header).status_code == 401
    assert predict(ask_remote, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz"):
        assert ask_remote("GET", path).status_code == 200


def test_another_machine_may_use_an_address_or_an_allowed_name(ask_remote: Ask) -> None:
    for host, status in (("10.0.0.7:80", 200), ("[fe80::1]", 200), ("till.example", 200), ("evil.example", 403)):
        assert ask_remote("GET", "/healthz", headers={"host": host}).status_code == status


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/model", "/nowhere", "/v1/predict"])
def test_every_answer_has_the_security_headers(ask: Ask, path: str) -> None:
    for answer in (ask("GET", path), ask("GET", path, headers={"host": "evil.example"})):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


class SlowSession(Session):
    """A session that waits for `go` before it names a photo."""

    go = threading.Event()

    def predict(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.go.wait(10)
        return super().predict(pixels_HW3)


def test_one_photo_too_many_at_once_is_answered_with_503(tmp_path: Path) -> None:
    plain = Session.open(write_color_model(tmp_path / "m.onnx"))
    slow = SlowSession(info=plain.info, tree=plain.tree, runtime=plain.runtime)
    app = make_app(slow, access=LOCAL)

    async def send_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            first = [
                asyncio.ensure_future(client.post("/v1/predict", files={"file": RED})) for _ in range(MOST_REQUESTS)
            ]
            await asyncio.sleep(0.05)
            refused = await client.post("/v1/predict", files={"file": RED})
            alive = await client.get("/healthz")
            slow.go.set()
            return [refused, alive, *await asyncio.gather(*first)]

    refused, alive, *answered = asyncio.run(send_all())
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert {answer.status_code for answer in (alive, *answered)} == {200}
    assert predict(asker(app)).status_code == 200  # all places are free again


def test_a_fault_tells_nothing_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of(tmp_path)

    def broken(*args: object) -> object:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Session, "predict", broken)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/predict", files={"file": RED})

    answer = asyncio.run(send())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_full_disk_is_answered_with_507(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = asker(app_of(tmp_path))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    answer = correct(ask, MIXED)
    assert answer.status_code == 507
    assert "Free some space" in answer.json()["error"]
    monkeypatch.undo()
    assert correct(ask, MIXED).json()["status"] == "training"


def routes(app: Guard) -> Iterator[tuple[str, str]]:
    for route in app.app.routes:  # type: ignore[attr-defined]
        for method in route.methods - {"HEAD"}:
            yield method.lower(), route.path


def test_the_openapi_document_describes_every_route_of_the_api(tmp_path: Path) -> None:
    described = {(method, path) for path, methods in document()["paths"].items() for method in methods}
    pages = {("get", path) for path in ("/", "/page.css", "/page.js", "/favicon.ico", "/openapi.json")}
    in_browser = {("get", "/v1/model.onnx")}  # tests/unit/edge/test_browser_model.py
    assert described - in_browser == set(routes(app_of(tmp_path))) - pages
    assert asker(app_of(tmp_path))("GET", "/openapi.json").json() == json.loads(json.dumps(document()))


@pytest.mark.parametrize(
    ("call", "schema"),
    [
        (predict, "Prediction"), (lambda ask: predict(ask, MIXED), "Prediction"),
        (lambda ask: correct(ask, MIXED), "Correction"), (lambda ask: ask("GET", "/v1/model"), "Model"),
        (lambda ask: ask("GET", "/nowhere"), "Error"), (lambda ask: ask("GET", "/readyz"), "Status"),
    ],
)  # fmt: skip
def test_answers_have_the_fields_of_the_openapi_document(
    ask: Ask, call: Callable[[Ask], httpx.Response], schema: str
) -> None:
    found, described = call(ask).json(), document()["components"]["schemas"][schema]
    assert set(described["required"]) <= set(found)
    if schema != "Status":
        assert set(found) <= set(described["properties"])


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title>", "{{7*7}}", "javascript:alert(1)",
    "\u202egpj.exe", "\x00\x1b[2J", "';--", "&lt;b&gt;", "\u2028", "a/b", "__proto__", "constructor",
]  # fmt: skip


def test_a_thousand_hostile_labels_come_back_as_they_are_and_only_as_json(tmp_path: Path) -> None:
    labels = [f"{HOSTILE[n % len(HOSTILE)]} {n}" for n in range(1000)]
    ask = asker(app_of(tmp_path, info(labels, [f"p{n}" for n in range(1000)])))
    assert ask("GET", "/v1/model").json()["products"] == labels
    answer = predict(ask)
    assert answer.headers["content-type"] == "application/json"
    assert {guess["product"] for guess in answer.json()["predictions"]} <= set(labels)
    for page in ("/", "/page.js", "/page.css"):
        assert "alert(1)" not in ask("GET", page).text
    for label in labels[: len(HOSTILE)]:
        assert correct(ask, photo((90, 90, 90)), label).status_code in (200, 422)
    inside = (tmp_path / "store").rglob("*")
    assert all(path.resolve().is_relative_to((tmp_path / "store").resolve()) for path in inside)


def test_the_page_loads_nothing_from_elsewhere_and_inserts_no_markup() -> None:
    for file in STATIC.iterdir():
        content = file.read_text(encoding="utf-8")
        assert not re.search(r"https?:|//\w+\.\w|@import|url\(", content), file
    script = (STATIC / "page.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|\.style\b", script)
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|\son\w+=|<script(?! src=\"page\.js\" defer>)", page)


def test_both_languages_have_the_same_texts_and_the_page_uses_them_all() -> None:
    script = (STATIC / "page.js").read_text(encoding="utf-8")
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    blocks = re.findall(r"^  (en|zh): \{\n(.*?)^  \},", script, re.MULTILINE | re.DOTALL)
    keys = {name: dict(re.findall(r"^    (\w+): \"(.*)\",$", block, re.MULTILINE)) for name, block in blocks}
    assert keys["en"].keys() == keys["zh"].keys()
    for key in keys["en"]:
        assert set(re.findall(r"\{\w+\}", keys["en"][key])) == set(re.findall(r"\{\w+\}", keys["zh"][key]))
        is_status = key in ("training", "inbox", "review")  # as the server says it
        known = f'"{key}"' in script + page
        assert is_status or known, key
    for used in re.findall(r'data-(?:text|label)="(\w+)"', page):
        assert used in keys["en"]
    assert all(re.search("[\u4e00-\u9fff]", text) for key, text in keys["zh"].items() if "anguage" not in key)


def test_the_page_and_its_script_agree_on_ids() -> None:
    script = (STATIC / "page.js").read_text(encoding="utf-8")
    ids = set(re.findall(r'\sid="([\w-]+)"', (STATIC / "index.html").read_text(encoding="utf-8")))
    used = set(re.findall(r'element\("([\w-]+)"\)', script))
    used |= {f"{kind}-{part}" for kind in ("take", "choose") for part in ("button", "input")}
    assert used <= ids
