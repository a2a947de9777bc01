"""Downloading from a server on loopback."""

import hashlib
import http.server
import io
import os
import stat
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedshelf.core.errors import DataError, TransportError, UsageError
from fedshelf.data.fetch import Fetched, PublicSet, fetch


@dataclass
class Mirror:
    """What the server serves and how badly it behaves; `requests` are the Range headers it was asked for."""

    archive: bytes = b""
    with_range: bool = True
    break_off_after: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    requests: list[str | None] = field(default_factory=list)
    url: str = ""

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.archive).hexdigest()[:16]}"'


def handler(mirror: Mirror) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

        def do_GET(self) -> None:
            mirror.requests.append(self.headers.get("Range"))
            if mirror.failures:
                self.send_error(mirror.failures.pop(0))
                return
            start = 0
            if mirror.with_range and self.headers.get("Range") and self.headers.get("If-Range") == mirror.etag:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(mirror.archive):
                self.send_error(416)
                return
            body = mirror.archive[start:]
            self.send_response(206 if start else 200)
            if mirror.with_range:
                self.send_header("ETag", mirror.etag)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: mirror.break_off_after.pop(0)] if mirror.break_off_after else body)

    return Handler


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(mirror))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    mirror.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield mirror
    server.shutdown()
    thread.join()
    server.server_close()


FILES = {"set-1/dataset/train/A/1.jpg": os.urandom(50_000), "set-1/LICENSE": b"MIT"}
LISTED = "".join(
    f"{hashlib.sha256(FILES[f'set-1/{name}']).hexdigest()}  {name}\n" for name in ("LICENSE", "dataset/train/A/1.jpg")
)  # as `sha256sum` prints it
SOURCE = PublicSet(
    repository="somebody/photos", commit="0" * 40, files_sha256=hashlib.sha256(LISTED.encode()).hexdigest(),
    photos="dataset", citation="",
)  # fmt: skip


def zip_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def get(mirror: Mirror, out: Path, *, sha256: str | None = None) -> Fetched:
    checksum = sha256 or hashlib.sha256(mirror.archive).hexdigest()
    return fetch(SOURCE, out, sha256=checksum, base_url=mirror.url, retry_seconds=0)


def check_files(out: Path) -> None:
    for name, content in FILES.items():
        assert (out / name.removeprefix("set-1/")).read_bytes() == content
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


def test_an_archive_is_downloaded_checked_and_unpacked_without_its_top_folder(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of(FILES)
    fetched = get(mirror, tmp_path / "out")
    check_files(tmp_path / "out")
    assert fetched.photos == tmp_path / "out" / "dataset"
    assert fetched.sha256 == hashlib.sha256(mirror.archive).hexdigest()


def test_a_download_that_breaks_off_goes_on_where_it_stopped(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of(FILES)
    mirror.break_off_after = [10_000, 5_000]
    get(mirror, tmp_path / "out")
    assert mirror.requests == [None, "bytes=10000-", "bytes=15000-"]
    check_files(tmp_path / "out")


def test_the_next_call_goes_on_where_the_last_one_gave_up(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of(FILES)
    mirror.break_off_after = [1_000] * 5
    with pytest.raises(TransportError, match="continues from there"):
        get(mirror, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mirror.requests.clear()
    get(mirror, tmp_path / "out")
    assert mirror.requests == ["bytes=5000-"]
    check_files(tmp_path / "out")


def test_a_server_without_ranges_is_asked_for_the_whole_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of(FILES)
    mirror.with_range = False
    mirror.break_off_after = [10_000]
    get(mirror, tmp_path / "out")
    assert mirror.requests == [None, None]
    check_files(tmp_path / "out")


def test_a_file_that_has_changed_on_the_server_is_not_mixed_with_the_old_part(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of({"set-1/old": os.urandom(30_000)})
    mirror.break_off_after = [1_000] * 5
    with pytest.raises(TransportError):
        get(mirror, tmp_path / "out")
    mirror.archive = zip_of(FILES)
    get(mirror, tmp_path / "out")
    check_files(tmp_path / "out")


def test_a_passing_server_error_is_tried_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of(FILES)
    mirror.failures = [503, 500]
    get(mirror, tmp_path / "out")
    check_files(tmp_path / "out")


def test_what_the_server_does_not_have_is_a_clear_error_at_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.failures = [404]
    with pytest.raises(TransportError, match="the server answers 404"):
        get(mirror, tmp_path / "out")
    assert len(mirror.requests) == 1
    assert not list(tmp_path.iterdir())


def test_without_a_server_the_error_asks_for_internet(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="Is there internet"):
        fetch(SOURCE, tmp_path / "out", sha256="0" * 64, base_url="http://127.0.0.1:1", retry_seconds=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("base_url", "said"),
    [
        ("http://127.0.0.1:1", r"\(connection refused\)"),
        ("http://a..b", "could not be downloaded"),
        (f"http://{'a' * 70}.example", "could not be downloaded"),
    ],
)
def test_what_the_network_says_is_told_in_words(tmp_path: Path, base_url: str, said: str) -> None:
    with pytest.raises(TransportError, match=said) as caught:
        fetch(SOURCE, tmp_path / "out", sha256="0" * 64, base_url=base_url, retry_seconds=0)
    assert "Errno" not in str(caught.value)


def test_a_proxy_whose_url_is_none_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:port/")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(TransportError, match="could not be downloaded"):
        fetch(SOURCE, tmp_path / "out", sha256="0" * 64, base_url="http://shop.invalid", retry_seconds=0)


@pytest.mark.parametrize("base_url", ["http://[::1", "http://", "http://host:port", "ftp://host"])
def test_a_mirror_that_is_no_web_address_is_refused(tmp_path: Path, base_url: str) -> None:
    with pytest.raises(UsageError, match="is not a web address"):
        fetch(SOURCE, tmp_path / "out", sha256="0" * 64, base_url=base_url)


def test_a_wrong_checksum_keeps_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of(FILES)
    with pytest.raises(DataError, match="has SHA-256"):
        get(mirror, tmp_path / "out", sha256="0" * 64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["set-1/../../evil", "/etc/evil", "set-1/./x", "set-1//x", "evil", "set-1/a\\..\\b"])
def test_a_path_that_leads_out_is_refused(mirror: Mirror, tmp_path: Path, name: str) -> None:
    mirror.archive = zip_of({name: b"evil"})
    with pytest.raises(DataError, match="leads out"):
        get(mirror, tmp_path / "deep" / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_link_in_the_archive_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("set-1/link")
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    mirror.archive = data.getvalue()
    with pytest.raises(DataError, match="not an ordinary file"):
        get(mirror, tmp_path / "out")


def test_a_damaged_archive_is_a_clear_error(mirror: Mirror, tmp_path: Path) -> None:
    data = bytearray(zip_of(FILES))
    data[5_000] ^= 255
    mirror.archive = bytes(data)
    with pytest.raises(DataError, match="damaged"):
        get(mirror, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched_and_nothing_is_asked(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="exists already"):
        get(mirror, tmp_path / "out")
    assert mirror.requests == []


@pytest.mark.parametrize(("sha256", "base_url"), [("abc", "http://127.0.0.1:1"), ("g" * 64, "http://127.0.0.1:1"),
                                                  ("0" * 64, "file:///etc")])  # fmt: skip
def test_senseless_arguments_are_refused(tmp_path: Path, sha256: str, base_url: str) -> None:
    with pytest.raises(UsageError):
        fetch(SOURCE, tmp_path / "out", sha256=sha256, base_url=base_url)


def test_without_a_checksum_the_files_are_verified_however_they_are_packed(mirror: Mirror, tmp_path: Path) -> None:
    mirror.archive = zip_of(dict(reversed(FILES.items())))
    fetched = fetch(SOURCE, tmp_path / "out", base_url=mirror.url, retry_seconds=0)
    assert fetched.proof == f"git commit {SOURCE.commit}"
    check_files(tmp_path / "out")


@pytest.mark.parametrize("change", ["content", "name", "missing", "extra"])
def test_files_that_are_not_those_of_the_commit_are_refused(mirror: Mirror, tmp_path: Path, change: str) -> None:
    files = dict(FILES)
    name, content = files.popitem()
    if change == "content":
        files[name] = content[:-1] + b"?"
    elif change == "name":
        files[name + "g"] = content
    elif change == "extra":
        files |= {name: content, name + ".more": b""}
    mirror.archive = zip_of(files)
    with pytest.raises(DataError, match="refused"):
        fetch(SOURCE, tmp_path / "out", base_url=mirror.url, retry_seconds=0)
    assert not list(tmp_path.iterdir())
