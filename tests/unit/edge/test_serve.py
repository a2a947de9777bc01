"""`fedshelf edge serve` as a process: without torch, with a token and TLS, and its orderly end."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedshelf.cli.edge import serve
from fedshelf.core.errors import UsageError
from fedshelf.deploy.tls import ensure_server_tls
from fedshelf.edge.serving import connection, uploads
from fedshelf.edge.serving.guard import Access, is_loopback
from fedshelf.edge.serving.http_api import make_app
from fedshelf.edge.serving.recognizer import MOST_REQUESTS
from fedshelf.edge.serving.server import Address, Token
from fedshelf.edge.serving.session import Session
from tests.edge_models import photo, write_color_model

MIXED = photo((128, 128, 0))


@dataclass
class Served:
    """A running server.

    Attributes:
        process: the process.
        url: the address of its page.
        said: its output until it listened.
    """

    process: "subprocess.Popen[str]"
    url: str
    said: str

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextmanager
def serving(tmp_path: Path, *flags: str, lines: int = 1, **environment: str) -> Iterator[Served]:
    model = tmp_path / "m.onnx"
    if not model.exists():
        write_color_model(model)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedshelf", "edge", "serve", str(model), "--port", "0", *flags], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "FEDSHELF_HOME": str(tmp_path / "home"), "PYTHONUNBUFFERED": "1", **environment},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = "".join(process.stdout.readline() for _ in range(lines))
        found = re.search(r"at (https?://\S+)", said)
        assert found, said + process.stdout.read()
        yield Served(process, found[1], said)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_and_ends_by_itself_on_a_signal(tmp_path: Path, number: int) -> None:
    with serving(tmp_path) as server:
        answer = httpx.post(f"{server.url}v1/predict", files={"file": photo((250, 0, 0))})
        assert answer.json()["predictions"][0]["product"] == "Red"
        assert "<title>" in httpx.get(server.url).text
        assert server.stop(number) == 0


def test_a_request_that_is_being_sent_is_answered_before_the_end(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        statuses = []

        def slowly() -> Iterator[bytes]:
            body = (
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + MIXED + b"\r\n--x--\r\n"
            )
            yield body[:50]
            begun.set()
            time.sleep(0.5)
            yield body[50:]

        def send() -> None:
            form = {"content-type": "multipart/form-data; boundary=x"}
            statuses.append(httpx.post(f"{server.url}v1/predict", content=slowly(), headers=form).status_code)

        begun = threading.Event()
        thread = threading.Thread(target=send)
        thread.start()
        begun.wait(10)
        time.sleep(0.2)  # the head has arrived
        assert server.stop() == 0
        thread.join()
        assert statuses == [200]


def test_the_whole_command_loads_no_torch(tmp_path: Path) -> None:
    """The command line itself, a prediction and a correction, in one process that looks at its modules in the end."""
    code = """
import sys, threading, time, urllib.request
import fedshelf.cli.app
from fedshelf.edge.serving import server

def on_start(run):
    def started(app, address, listener, *, on_start):
        def use():
            url = address.url(listener)
            body = (b'--x\\r\\nContent-Disposition: form-data; name="file"; filename="a"\\r\\n\\r\\n' + photo
                + b'\\r\\n--x\\r\\nContent-Disposition: form-data; name="product"\\r\\n\\r\\nGreen\\r\\n--x--\\r\\n')
            for path in ("v1/predict", "v1/corrections"):
                request = urllib.request.Request(url + path, body, {"Content-Type": "multipart/form-data; boundary=x"})
                print(urllib.request.urlopen(request).read().decode())
            import os, signal
            os.kill(os.getpid(), signal.SIGTERM)
        run(app, address, listener, on_start=lambda: (on_start(), threading.Thread(target=use).start()))
    return started

photo = open(sys.argv.pop(), "rb").read()
server.run = on_start(server.run)
fedshelf.cli.app.main(sys.argv[1:])
fedshelf.cli.app.main(["edge", "corrections", "list", sys.argv[-1]])
loaded = {"torch", "timm", "torchvision", "flwr", "grpc", "ray", "sqlite3"} & set(sys.modules)
print("loaded:", sorted(loaded))
"""
    (tmp_path / "photo.jpg").write_bytes(MIXED)
    (tmp_path / "store" / "Red").mkdir(parents=True)
    done = subprocess.run(
        [
            sys.executable, "-c", code, "edge", "serve", str(write_color_model(tmp_path / "m.onnx")), "--port", "0",
            "--data-dir", str(tmp_path / "store"), str(tmp_path / "photo.jpg"),
        ],
        check=False, capture_output=True, text=True, env={**os.environ, "FEDSHELF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"status":"training"' in done.stdout
    assert "loaded: []" in done.stdout


def test_another_machine_is_given_a_token_by_a_link_that_is_shown_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--host", "0.0.0.0", lines=4) as server:
        token = re.search(r"#token=(\S+)", server.said)
        assert token is not None
        assert "unencrypted" in server.said
        port = httpx.URL(server.url).port
        local = f"http://127.0.0.1:{port}/v1/model"
        assert httpx.get(local).status_code == 401
        assert httpx.get(local, headers={"authorization": f"Bearer {token[1]}"}).status_code == 200
    kept = tmp_path / "home/edge/token"
    assert kept.read_text().strip() == token[1]
    assert kept.stat().st_mode & 0o077 == 0
    with serving(tmp_path, "--host", "0.0.0.0", lines=3) as server:
        assert token[1] not in server.said
        assert str(kept) in server.said.replace("\n", "")


def test_tls_with_a_given_certificate(tmp_path: Path) -> None:
    tls = ensure_server_tls(tmp_path / "tls", ["localhost"])
    flags = ("--tls-cert", str(tls.certificate), "--tls-key", str(tls.key))
    with serving(tmp_path, *flags) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(tls.ca))
        port = httpx.URL(server.url).port
        answer = httpx.post(
            f"https://localhost:{port}/v1/predict", files={"file": MIXED}, verify=context,
            headers={"origin": f"https://localhost:{port}"},
        )  # fmt: skip
        assert answer.status_code == 200


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """A server in this process; the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(app, http=connection.Connection, log_level="critical", lifespan="off", ws="none")
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_peer_that_sends_no_whole_head_loses_its_connection(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with listening(hello) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        peer.sendall(sent)
        assert read_to_the_end(peer) == b""


def test_a_head_that_is_too_large_ends_its_connection_and_one_that_is_not_is_answered() -> None:
    with listening(hello) as port:
        for size, is_answered in ((1000, True), (connection.MAX_HEAD_BYTES, False)):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
                peer.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"x" * size)
                if is_answered:
                    peer.sendall(b"\r\n\r\n")
                assert (b"hello" in read_to_the_end(peer)) is is_answered


def test_a_second_request_on_a_connection_has_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with listening(hello) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"hello" in peer.recv(4096)
        peer.sendall(b"GET / HT")
        assert read_to_the_end(peer) == b""


def read_to_the_end(peer: socket.socket) -> bytes:
    try:
        return b"".join(iter(lambda: peer.recv(4096), b""))
    except ConnectionResetError:
        return b""


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedshelf.edge.serving.serve.find_spec", lambda name: None if name == "starlette" else object())
    with pytest.raises(UsageError, match=r"needs starlette: pip install 'fedshelf\[edge\]'"):
        serve(Path("m.onnx"))


def run(tmp_path: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fedshelf", "edge", *arguments], check=False, capture_output=True, text=True,
        env={**os.environ, "FEDSHELF_HOME": str(tmp_path / "home"), **environment},
    )  # fmt: skip


def test_a_port_in_use_is_an_error_that_says_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another --port"):
            Address(host="127.0.0.1", port=taken.getsockname()[1]).listen()


def test_an_address_of_another_machine_and_half_a_certificate_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an address of this machine"):
        Address(host="192.0.2.1", port=0).listen()
    with pytest.raises(UsageError, match="belong together"):
        Address(host="127.0.0.1", port=0, certificate=tmp_path / "c.pem").listen()
    for name in ("c.pem", "k.pem"):
        (tmp_path / name).write_text("no certificate")
    with pytest.raises(UsageError, match="cannot be used"):
        Address(host="127.0.0.1", port=0, certificate=tmp_path / "c.pem", key=tmp_path / "k.pem").listen()


def test_a_missing_model_and_a_missing_folder_are_errors_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", str(tmp_path / "none.onnx"), "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no such file" in done.stderr
    model = str(write_color_model(tmp_path / "m.onnx"))
    done = run(tmp_path, "serve", model, "--port", "0", "--data-dir", str(tmp_path / "none"))
    assert (done.returncode, "no such folder" in done.stderr) == (2, True)


@pytest.mark.parametrize("text", ["", "short", "twenty characters but blanks", "ü" * 30])
def test_an_unsafe_token_is_refused_and_not_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "token").write_text(text)
    monkeypatch.setenv("FEDSHELF_EDGE_TOKEN", text)
    for file in (tmp_path / "token", None):
        with pytest.raises(UsageError, match="holds no safe token") as error:
            Token.find("0.0.0.0", file)
        assert not text or text not in str(error.value)


def test_the_token_comes_from_the_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_EDGE_TOKEN", "e" * 32)
    (tmp_path / "token").write_text("f" * 32 + "\n")
    assert Token.find("10.0.0.1", tmp_path / "token").text == "f" * 32
    assert Token.find("10.0.0.1", None).text == "e" * 32
    assert Token.find("127.0.0.1", None).text == ""


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False),
     ("till.local", False), ("127.0.0.1.example", False)],
)  # fmt: skip
def test_only_loopback_needs_no_token(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_corrections_are_listed_reviewed_and_undone_by_the_commands(tmp_path: Path) -> None:
    (tmp_path / "store" / "Red").mkdir(parents=True)
    store = str(tmp_path / "store")
    with serving(tmp_path, "--data-dir", store) as server:
        url = f"{server.url}v1/corrections"
        made = httpx.post(url, files={"file": MIXED}, data={"product": "Red"}).json()
        held = httpx.post(url, files={"file": photo((0, 250, 0))}, data={"product": "Red"}).json()
        httpx.post(url, files={"file": photo((9, 9, 9))}, data={"product": "Plum"})
    listed = json.loads(run(tmp_path, "corrections", "list", store, "--json").stdout)
    assert [(c["product"], c["status"]) for c in listed] == [
        ("Red", "training"), ("Red", "review"), ("Plum", "inbox")
    ]  # fmt: skip
    assert listed[0]["trained_since"] is None
    shown = run(tmp_path, "corrections", "list", store).stdout
    assert "1 photo of the unknown product 'Plum'" in shown
    waiting = run(tmp_path, "corrections", "review", store).stdout
    assert held["id"] in waiting
    assert "2 corrections to review" in waiting
    assert run(tmp_path, "corrections", "review", store, "--accept", held["id"]).returncode == 0
    assert run(tmp_path, "corrections", "undo", store, made["id"]).returncode == 0
    assert [path.name for path in Path(store, "Red").iterdir()] == [f"correction-{held['id']}.jpg"]
    again = run(tmp_path, "corrections", "undo", store, made["id"])
    assert (again.returncode, "it is undone" in again.stderr) == (2, True)
    assert json.loads(run(tmp_path, "corrections", "review", store, "--json").stdout)[0]["product"] == "Plum"


def test_a_folder_without_corrections_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert "has no corrections" in run(tmp_path, "corrections", "list", str(tmp_path / "store")).stdout
    assert not list((tmp_path / "store").iterdir())


def test_a_photo_that_stops_arriving_is_answered_and_its_place_is_free_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uploads, "BODY_SECONDS", 0.1)
    session = Session.open(write_color_model(tmp_path / "m.onnx"))
    app = make_app(session, access=Access.of("127.0.0.1", token=""))
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    request = (
        b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: 100000\r\n\r\n"
    )
    with listening(app) as port:
        for _ in range(MOST_REQUESTS + 1):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
                peer.sendall(request + head + MIXED[:100])
                assert b" 408 " in peer.recv(4096)
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/predict", files={"file": MIXED})
        assert answer.status_code == 200
