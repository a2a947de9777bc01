"""No secret of a masked round is in any file or log of a deployed run, whose clients tell the test what they made."""

import base64
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.processes import Process, Site, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def client(site: Site, name: str, *orders: str) -> Process:
    told = [part for order in orders for part in ("--do", order)]
    return site.start(
        sys.executable, "-m", "tests.telling_client", "--data-dir", str(site.stores / name), "--server-address",
        site.address, *told, "--until", str(site.root),
    )  # fmt: skip


def forms_of(secret: bytes) -> Iterable[bytes]:
    """How a secret may stand in a file: its bytes, hexadecimal digits, and base64 at any place of a longer text."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(shift) + secret)[4 * bool(shift) :]


def finds(prefixes: NDArray[np.uint64], content: bytes) -> bool:
    """Whether any 8 bytes of `content`, wherever they begin, are one of `prefixes`."""
    starts = (np.frombuffer(content[start:], "<u8", max(0, len(content) - start) // 8) for start in range(8))
    return any(bool(np.isin(windows, prefixes).any()) for windows in starts)


def test_no_secret_of_a_deployed_run_is_in_its_files_and_logs(site: Site, drawn_stores: Path) -> None:
    first, *others = site.names
    server = site.server(
        "--rounds", "3", "--no-compare", "--norm", "group", "--secagg", "--run-dir", str(site.root / "run"),
        "--round-timeout", "60",
    )  # fmt: skip
    clients = [client(site, first, "hold-answer@1"), *(client(site, name, "hold-keys@2") for name in others)]
    clients[0].wait_for("held", round=1)
    clients[0].kill()  # it has dealt shares, masked an upload, and sends nothing: its mask key is restored
    killed, back = clients[0], client(site, first, "hold-unmasking-answer@3")
    site.release(1)
    clients[1].wait_for("held", round=2)
    back.wait_for_text("connected to")
    site.release(2)
    server.wait_for("round_finished", round=2)
    back.wait_for("held", round=3)
    live = [path.read_bytes() for path in sorted(site.root.rglob("*")) if path.is_file()]  # in the middle of stage E
    site.release(3)
    assert server.end() == 0, server.text()
    processes = [killed, back, *clients[1:]]
    assert [process.end() for process in processes[1:]] == [0] * len(site.names)
    assert statuses(site.show(site.root / "run"), 1)[first] != "counted"
    assert statuses(site.show(site.root / "run"), 3)[first] == "counted"

    told = [event for process in processes for event in process.events if event["event"] == "secret"]
    makers = Counter(event["made_by"] for event in told)
    assert makers.keys() == {"advertise", "deal", "derive", "agree"}
    assert makers["advertise"] >= 3 * 11  # three secrets of each member in each round
    secrets = {bytes.fromhex(event["value"]) for event in told}
    prefixes = np.frombuffer(b"".join(form[:8] for secret in secrets for form in forms_of(secret)), "<u8")
    for planted in (b"text " + base64.b64encode(b"12" + next(iter(secrets))), b"x" + next(iter(secrets))):
        assert finds(prefixes, planted), "the search finds what is there"

    files = {path: path.read_bytes() for path in sorted(site.root.rglob("*")) if path.is_file()}
    assert {site.root / "run", site.root / "home"} <= {parent for path in files for parent in path.parents}
    assert len(files) > 40
    assert [str(path) for path, content in files.items() if finds(prefixes, content)] == []
    assert not any(finds(prefixes, content) for content in live)
    assert not any(finds(prefixes, bytes(process._log)) for process in (server, *processes))
