"""A server that attacks the stores: what it asks for is refused, by name of the limit, and the client lives on."""

import datetime
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.proto import fleet_pb2

from fedshelf.core.messages import PROTOCOL_VERSION
from fedshelf.identity import certificates
from fedshelf.identity.keys import KeyPair
from fedshelf.identity.roster import Roster
from tests.ports import listener
from tests.processes import PATIENCE, Process, Site, draw_photos, statuses
from tests.processes import reason as why

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

GROWTH_BYTES = 100_000_000  # of a client's memory, at most
REFUSALS = {
    "one-photo-a-step": "min-photos-per-step = 8",
    "one-photo-to-validate": "min-photos-per-step = 8",
    "vit-huge": "model 'vit_huge_patch14_224' is none of those allowed",
    "convnext-xxlarge": "max-parameters = 2,000,000",
    "wide": "max-parameters = 2,000,000",
    "large-photos": "image-size 2,048 is more than max-image-size = 512",
    "many-threads": "threads 200 is more than max-threads = 64",
    "many-epochs": "max-local-epochs = 100",
    "much-memory": "more than max-memory-mb = 100",
    "pretrained": "sets pretrained, which a server may not set",
    "init": "sets init, which a server may not set",
    "paths": "sets data-dir, run-dir, which a server may not set",
    "nested": "is not TOML",
    "long": "65,536 is the most",
    "long-id": "the run's id has 300 characters",
    "bad-catalogue": "not a catalogue's JSON text",
    "sparse-bomb": "an encoded model has 2,147,483,647 values",
    "zstd-bomb": "an encoded model has 800,000,000 values",
    "huge-model": "is larger than the",
    "short-model": "the model has",
    "nan-rate": "client_lr: Input should be a finite number",
    "negative-round": "round: Input should be greater than or equal to 0",
    "endless-steps": "num_steps: Input should be less than or equal to",
    "other-run": "was never set up at this client",
    "no-first-model": "the run's first model did not come",
    "odd-vector": "its vectors ['x'] do not have",
}
"""What the client says to each attack."""
TASKS = list(REFUSALS)[list(REFUSALS).index("sparse-bomb") :]


def start(site: Site, *orders: str, policy: str = "standard") -> tuple[Process, Callable[[], Process]]:
    """A hostile server, and what starts a real client of it."""
    server = site.start(sys.executable, "-m", "tests.hostile_server", site.address, *orders)
    server.wait_for("listening")
    return server, lambda: site.client(site.names[0], "--insecure", "--policy", policy)


def answers(server: Process) -> list[tuple[str, str]]:
    """Each order and the kind of the answer, once all have come."""
    server.wait_for("done")
    return [(event["order"], event["answer"]) for event in server.events if event["event"] == "answer"]


def reason(server: Process, order: str) -> str:
    return str(server.wait_for("answer", order=order)["reason"])


def test_what_no_honest_server_sends_is_refused_and_the_client_lives(pair: Site, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        "[limits]\nmax-parameters = 2_000_000\nmax-memory-mb = 100\n"
    )  # so many are made before a model is refused
    setups = [order for order in REFUSALS if order not in TASKS]
    server, client_of = start(pair, "honest", *setups, "honest", *TASKS, "train:1:0:0", policy=str(policy))
    client = client_of()
    server.wait_for("answer", order="wide")  # timm, which is large, is imported by then
    before = psutil.Process(client.pid).memory_info().rss
    found = answers(server)
    grown = psutil.Process(client.pid).memory_info().rss - before
    assert dict(found)["train:1:0:0"] == "Upload", "an honest task is done after all that"
    for order, expected in REFUSALS.items():
        assert (dict(found)[order], expected in reason(server, order)) == ("Failure", True), reason(server, order)
    assert client.running()
    assert "Traceback" not in client.text()
    assert psutil.Process(client.pid).num_threads() < 100
    assert grown < GROWTH_BYTES


def test_one_round_is_trained_from_one_model_whatever_the_attempt_or_the_process(pair: Site) -> None:
    """The reconstruction attack: crafted weights in many attempts at one round tell one photo from the other."""
    server, client_of = start(
        pair, "honest", "train:1:0:0", "train:1:1:0.5", "train:1:2:0", "restart", "honest", "train:1:3:0.5",
        "train:1:3:0", "train:2:0:0.5",
    )  # fmt: skip
    client = client_of()
    server.wait_for("answer", order="train:1:2:0")
    client.kill()
    again = client_of()
    assert answers(server) == [
        ("honest", "Ready"), ("train:1:0:0", "Upload"), ("train:1:1:0.5", "Failure"), ("train:1:2:0", "Upload"),
        ("honest", "Ready"), ("train:1:3:0.5", "Failure"), ("train:1:3:0", "Upload"), ("train:2:0:0.5", "Upload"),
    ]  # fmt: skip
    refused = [event for event in server.events if event.get("answer") == "Failure"]
    assert all("models-per-round = 1" in event["reason"] and event["refused"] for event in refused)
    assert "round 1 refused: this store's policy does not allow it" in again.text()


def test_evaluations_comparisons_and_rounds_are_counted(pair: Site, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[limits]\nrounds-per-day = 3\nmin-epochs-per-task = 0.5\n")
    server, client_of = start(
        pair, "honest", "evaluate:1:0:0", "evaluate:1:0:0", "evaluate:1:0:1", "evaluate:1:1:2", "compare:1:1:0",
        "compare:1:2:0", "train:1:0:0:1", "train:1:0:0:2", "train:2:0:0", "train:2:0:0", "train:3:0:0",
        policy=str(policy),
    )  # fmt: skip
    client_of()
    kinds = [kind for _, kind in answers(server)]
    assert kinds == [
        "Ready", "Evaluation", "Evaluation", "Evaluation", "Failure", "Comparison", "Failure", "Failure", "Upload",
        "Upload", "Upload", "Failure",
    ]  # fmt: skip
    limits = {
        "evaluate:1:1:2": "evaluations-per-round", "compare:1:2:0": "comparisons-per-run",
        "train:1:0:0:1": "min-epochs-per-task = 0.5", "train:3:0:0": "rounds-per-day",
    }  # fmt: skip
    assert all(limit in reason(server, order) for order, limit in limits.items())


def test_an_honest_server_records_what_a_store_refuses_and_goes_on(pair: Site, tmp_path: Path) -> None:
    policy, run = tmp_path / "policy.toml", pair.root / "run"
    policy.write_text("[limits]\nrounds-per-day = 1\n")
    server = pair.server("--rounds", "3", "--quorum", "1", "--run-dir", str(run))
    first, second = pair.names
    strict = pair.client(first, "--policy", str(policy))
    lenient = pair.client(second)
    assert (server.end(), lenient.end()) == (0, 0), server.text()
    summary = pair.show(run)
    assert [statuses(summary, number)[first] for number in (1, 2, 3)] == ["counted", "refused", "refused"]
    assert [statuses(summary, number)[second] for number in (1, 2, 3)] == ["counted"] * 3
    assert "rounds-per-day" in why(summary, 2, first)
    assert strict.end() == 0, "it took part to the end"


def test_a_store_whose_policy_refuses_a_run_waits_for_one_that_it_allows(pair: Site, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[limits]\nmax-image-size = 16\n")

    def server(name: str, *arguments: str) -> Process:
        return pair.server("--run-dir", str(pair.root / name), *arguments, min_clients=1)

    first = server("large", "--rounds", "100000", "--image-size", "24")
    clients = [pair.client(pair.names[1])]
    first.wait_for("round_finished", round=1)
    clients.append(pair.client(pair.names[0], "--policy", str(policy)))
    limit = "image-size 24 is more than max-image-size = 16"
    assert limit in first.wait_for("client_refused", client=pair.names[0])["reason"]
    clients[1].wait_for_text("joining again in 5 s (attempt 1 since")
    assert sum(event["event"] == "client_refused" for event in first.events) == 1
    first.interrupt()
    assert first.end() == 0
    second = server("small", "--rounds", "100000")
    second.wait_for("client_joined", client=pair.names[0])
    assert clients[1].running()
    assert f"the server does not let this store take part: this store's policy does not allow it: {limit}" in (
        clients[1].text()
    )
    for process in (second, *clients):
        process.interrupt()
        assert process.end() == 0


def test_a_catalogue_that_leaves_one_photo_is_refused(pair: Site) -> None:
    pair.stores = pair.root / "stores"
    draw_photos(pair.stores / "lyon" / "rare", 0, count=1, seed=1)
    draw_photos(pair.stores / "lyon" / "common", 1, count=30, seed=2)
    server, client_of = start(pair, "one-class-of-one-photo", "honest", "train:1:0:0")
    client_of()
    assert [kind for _, kind in answers(server)] == ["Failure", "Ready", "Upload"]
    assert "leave fewer photos to train on than min-photos-per-step = 8" in reason(server, "one-class-of-one-photo")


def test_a_message_that_flower_never_sends_costs_the_session_and_not_the_client(pair: Site) -> None:
    server, client_of = start(pair, "no-content", "honest", "train:1:0:0")
    client = client_of()
    assert [kind for _, kind in answers(server)] == ["Ready", "Upload"]
    assert "what the server sent cannot be used: ValueError" in client.text()
    assert "joining again" in client.text()
    assert "Traceback" not in client.text()


def test_an_open_policy_lets_a_trial_do_anything_and_says_so(pair: Site) -> None:
    server, client_of = start(pair, "one-photo-a-step", "train:1:0:0", "train:1:1:1", policy="open")
    client = client_of()
    assert [kind for _, kind in answers(server)] == ["Ready", "Upload", "Upload"]
    assert "WARNING: --policy open" in client.text()


def peak_bytes(process: Process) -> int:
    """The most memory that a process ever had."""
    (line,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line]
    return 1024 * int(line.split()[1])


OK = b"HTTP/1.1 200 OK\r\n"
HEALTH = b'{"protocol": %d, "version": "0"}' % PROTOCOL_VERSION
JUNK = os.urandom(1 << 16)
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "body": (OK + b"Content-Length: 99999999999\r\n\r\n", JUNK),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n" % (len(JUNK), JUNK)),
    "until it closes": (OK + b"\r\n", JUNK),
    "headers": (OK, b"X-A: " + b"a" * 60_000 + b"\r\n"),
    "status line": (b"HTTP/1.1 200 ", b"a" * 65_536),
    "interim responses": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "junk": (b"", JUNK),
}
"""What an attacker answers: a beginning, and what follows it without end."""


def granted(request: bytes, keys: KeyPair) -> tuple[bytes, bytes]:
    """What an honest server with the chain's `keys` answers to a store that enrolls, and its roster then."""
    now, asked = datetime.datetime.now(datetime.UTC), json.loads(request)
    year = datetime.timedelta(days=365)
    certificate = certificates.authority(keys, certificates.subject("x"), start=now - year, end=now + year)
    fields = {"name": asked["name"], "chain": keys.public.text, "authority": "",
              "certificate": certificates.pem(certificate).decode()}  # fmt: skip
    _, key = certificates.requested_key(asked["request"])
    return json.dumps(fields).encode(), Roster().with_key(asked["name"], key, "now").signed(keys).encode()


class RawServer:
    """Answers a client's requests by hand; from the one to `path` on, with something endless."""

    def __init__(self, path: str, start: bytes, more: bytes) -> None:
        self._listener = listener()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._path, self._start, self._more = path, start, more
        self.num_attacks = 0
        self._keys, self._roster = KeyPair.generate(), b""
        self.greeted, self.may_attack = threading.Event(), threading.Event()
        self.attacked = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def wait_for_attacks(self, count: int) -> None:
        with self.attacked:
            assert self.attacked.wait_for(lambda: self.num_attacks >= count, PATIENCE)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        node = fleet_pb2.ActivateNodeResponse(node_id=7).SerializeToString()
        answers = {"/fedshelf/health": HEALTH, "/v1/fleet/activate-node": node, "/fedshelf/wait": b'{"end": ""}'}
        with connection, connection.makefile("rb") as requests:
            try:
                while line := requests.readline():
                    path, length = line.split()[1].decode(), 0
                    while (header := requests.readline()) not in (b"\r\n", b""):
                        name, _, value = header.partition(b":")
                        length = int(value) if name.lower() == b"content-length" else length
                    content = requests.read(length)
                    self.greeted.set()
                    self.may_attack.wait(PATIENCE)
                    if path == self._path:
                        self._attack(connection)
                        return
                    if path == "/fedshelf/enroll":
                        body, self._roster = granted(content, self._keys)
                    else:
                        body = self._roster if path == "/fedshelf/roster" else answers.get(path, b"")
                    if path == "/fedshelf/wait":
                        threading.Event().wait(0.5)
                    connection.sendall(OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            except (OSError, ValueError, IndexError):
                return  # the client has hung up, or tries whether this server speaks TLS

    def _attack(self, connection: socket.socket) -> None:
        try:
            connection.sendall(self._start)
            for _ in range(1 << 14):  # a gigabyte
                connection.sendall(self._more)
        except OSError:
            pass  # the client has hung up
        with self.attacked:
            self.num_attacks += 1
            self.attacked.notify_all()


@pytest.fixture
def raw() -> Iterator[Callable[..., RawServer]]:
    servers: list[RawServer] = []

    def make(*arguments: Any) -> RawServer:
        servers.append(RawServer(*arguments))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("what", "path"),
    [*((what, "/fedshelf/pull") for what in ENDLESS), ("body", "/fedshelf/health"), ("body", "/fedshelf/roster")],
)
def test_an_endless_answer_costs_the_session_and_not_the_client(
    pair: Site, raw: Callable[..., RawServer], what: str, path: str
) -> None:
    server = raw(path, *ENDLESS[what])
    data = str(pair.stores / pair.names[0])
    client = pair.fedshelf("client", "--data-dir", data, "--server-address", server.address, "--insecure")
    assert server.greeted.wait(PATIENCE)
    before = psutil.Process(client.pid).memory_info().rss
    server.may_attack.set()
    server.wait_for_attacks(3)
    assert client.running(), "it tries again, for the server may be another by then"
    assert peak_bytes(client) - before < GROWTH_BYTES
    assert "Traceback" not in client.text()
