"""What `fedshelf edge serve --in-browser` sends to browsers, and what it allows them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedshelf.core.errors import ModelError, UsageError
from fedshelf.edge.serving.browser_model import RUNTIME_FILES, BrowserModel
from fedshelf.edge.serving.guard import OPEN_PATHS, Access
from fedshelf.edge.serving.http_api import make_app
from fedshelf.edge.serving.openapi import document
from fedshelf.edge.serving.session import Session
from tests.edge_models import info, write_color_model
from tests.unit.edge.test_http_api import Ask, asker

REMOTE = Access.of("192.0.2.1", token="t" * 20)


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """Stands for ONNX Runtime's files, which no browser runs here."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in RUNTIME_FILES:
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def in_browser(tmp_path: Path, runtime: Path) -> Iterator[BrowserModel]:
    opened = BrowserModel.open(write_color_model(tmp_path / "m.onnx"), runtime)
    yield opened
    opened.close()


@pytest.fixture
def ask(tmp_path: Path, in_browser: BrowserModel) -> Ask:
    app = make_app(Session.open(tmp_path / "m.onnx"), access=REMOTE, in_browser=in_browser)
    return asker(app, "http://192.0.2.1")


def with_token(ask: Ask, path: str) -> bytes:
    return ask("GET", path, headers={"authorization": f"Bearer {'t' * 20}"}).content


def test_the_model_needs_the_token_and_is_the_file_that_was_opened(ask: Ask, tmp_path: Path) -> None:
    content = (tmp_path / "m.onnx").read_bytes()
    write_color_model(tmp_path / "other.onnx", info(("X", "Y", "Z"))).replace(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() != content
    assert ask("GET", "/v1/model.onnx").status_code == 401
    assert with_token(ask, "/v1/model.onnx?digest") == content
    assert b'"in_browser":true' in with_token(ask, "/v1/model")


@pytest.mark.parametrize(("name", "kind"), RUNTIME_FILES.items())
def test_the_runtime_is_sent_with_types_that_browsers_run(ask: Ask, name: str, kind: str) -> None:
    answer = ask("GET", f"/runtime/{name}")
    assert answer.content == name.encode()
    assert answer.headers["content-type"].startswith(kind)


def test_webassembly_is_allowed_in_this_mode_alone(ask: Ask, tmp_path: Path) -> None:
    policy = ask("GET", "/").headers["content-security-policy"]
    assert "script-src 'self' 'wasm-unsafe-eval';" in policy
    assert "'unsafe-eval'" not in policy
    plain = asker(make_app(Session.open(tmp_path / "m.onnx"), access=REMOTE), "http://192.0.2.1")
    assert "wasm" not in plain("GET", "/").headers["content-security-policy"]
    for path in ("/in-browser.js", "/service-worker.js", *(f"/runtime/{name}" for name in RUNTIME_FILES)):
        assert plain("GET", path).status_code == 404


def test_every_route_of_the_mode_is_described_or_open(in_browser: BrowserModel) -> None:
    described = {path for path in document()["paths"] if path.endswith(".onnx")}
    assert {route.path for route in in_browser.routes()} == described | {
        path for path in OPEN_PATHS if path.startswith("/runtime/")
    }


def test_missing_files_are_named_with_the_command_that_gets_them(tmp_path: Path, runtime: Path) -> None:
    with pytest.raises(ModelError, match=r"missing\.onnx' cannot be read"):
        BrowserModel.open(tmp_path / "missing.onnx", runtime)
    (runtime / "ort.wasm.min.mjs").unlink()
    with pytest.raises(UsageError, match=r"--in-browser needs ort\.wasm\.min\.mjs in .*: run 'make browser-runtime'"):
        BrowserModel.open(tmp_path / "missing.onnx", runtime)
