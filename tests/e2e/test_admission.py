"""Who may take part: real servers and clients, and strangers who try."""

import contextlib
import hashlib
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from fedshelf.core.errors import IdentityError, TransportError
from fedshelf.core.ports import Left
from fedshelf.deploy import http_server
from fedshelf.deploy.connection_errors import ServerUnavailableError, SessionLostError
from fedshelf.deploy.credentials import Credentials, Signer
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.tls import ServerTls, certificate_fingerprint, client_context, ensure_server_tls
from fedshelf.identity.chain import Chain
from fedshelf.identity.keys import PublicKey
from fedshelf.identity.roster import Roster, StoreState
from fedshelf.identity.signatures import SIGNATURE
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.identity.tokens import Token
from tests.ports import free_port
from tests.processes import Event, Process, Site, statuses
from tests.unit.deploy.echo import PATIENCE, ThreadClient, expect, join, joined, pulled, reply

pytestmark = pytest.mark.e2e


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    return ensure_server_tls(tmp_path / "tls")


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "identity")


@pytest.fixture
def server(tls: ServerTls, chain: Chain) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls, chain=chain) as running:
        yield running


def credentials(server: EmbeddedServer, tls: ServerTls, chain: Chain, folder: Path, name: str = "lyon") -> Credentials:
    """Of a store that has a token and nothing else."""
    token = chain.add(name, authority=certificate_fingerprint(tls.ca), addresses=(str(server.address),))
    return Credentials(server.address, StoreKeys(folder / name), name=name, token=token)


def events(chain: Chain) -> list[str]:
    chain.audit.flush()
    return [str(event["event"]) for event in chain.audit.events()]


def test_a_token_is_all_that_a_store_needs(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    transport = server.transport()
    token = chain.add("lyon", authority=certificate_fingerprint(tls.ca), addresses=(str(server.address),))
    keys = StoreKeys(tmp_path / "lyon")
    with ThreadClient(server.address, "lyon", insecure=False, keys=keys, token=token):
        assert set(joined(transport)) == {"lyon"}
    expect(transport, Left)
    with ThreadClient(server.address, "lyon", insecure=False, keys=keys):  # never again
        assert set(joined(transport)) == {"lyon"}
    assert events(chain)[:2] == ["token made", "enrolled"]


def test_the_name_is_that_of_the_key_whatever_the_client_says(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    transport = server.transport()
    session = FleetSession(credentials(server, tls, chain, tmp_path, "lyon"))
    assert transport.receive(0) is None
    reply(session, pulled(session), join("paris"))
    assert set(joined(transport)) == {"lyon"}
    session.leave()


def test_a_token_of_another_server_is_not_used(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    """Whoever stands in between shows another authority: the secret is not sent."""
    token = chain.add("lyon", authority="0" * 64, addresses=(str(server.address),))
    access = Credentials(server.address, StoreKeys(tmp_path / "lyon"), name="lyon", token=token)
    with pytest.raises(TransportError, match="another certificate authority than the token says"):
        access.prepare()
    assert "enrolled" not in events(chain)


def test_a_revoked_store_is_out_in_mid_session_and_says_why(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    transport = server.transport()
    token = chain.add("lyon", authority=certificate_fingerprint(tls.ca), addresses=(str(server.address),))
    with ThreadClient(
        server.address, "lyon", insecure=False, keys=StoreKeys(tmp_path / "lyon"), token=token
    ) as client:  # fmt: skip
        joined(transport)
        chain.revoke("lyon")
        with pytest.raises(IdentityError, match="was revoked"):
            client.result.result(PATIENCE)


def test_a_revoked_store_that_says_nothing_is_out_at_once(tls: ServerTls, chain: Chain, tmp_path: Path) -> None:
    """A stolen machine that was unplugged, or that waits: no request of it tells the server."""
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls, chain=chain, silence=10 * PATIENCE) as server:
        transport = server.transport()
        session = FleetSession(credentials(server, tls, chain, tmp_path))
        assert transport.receive(0) is None
        reply(session, pulled(session), join("lyon"))
        joined(transport)
        Chain(tmp_path / "identity").revoke("lyon")  # as `fedshelf enroll revoke` does, in another process
        expect(transport, Left)
        assert set(transport.revoked()) == {"lyon"}
        session.leave()
        assert list(server._engine.state.get_nodes(server._engine.run.run_id)) == []
        again = credentials(server, tls, chain, tmp_path / "new")
        FleetSession(again).leave()
        assert not transport.revoked(), "it is back, with another key"


def test_a_certificate_that_ends_soon_is_renewed_when_the_store_connects(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = credentials(server, tls, chain, tmp_path)
    FleetSession(access).leave()
    before = access.keys.certificate_file.read_bytes()
    FleetSession(access).leave()
    assert access.keys.certificate_file.read_bytes() == before
    monkeypatch.setattr(StoreKeys, "must_renew", lambda self, now: True)
    FleetSession(access).leave()
    assert access.keys.certificate_file.read_bytes() != before
    monkeypatch.undo()
    FleetSession(access).leave()
    assert "renewed" in events(chain)


def test_a_store_whose_certificate_has_expired_gets_the_next_one_by_its_key(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was closed for months; it has no certificate to show, and its key is still enrolled."""
    access = credentials(server, tls, chain, tmp_path)
    FleetSession(access).leave()
    before = access.keys.certificate_file.read_bytes()
    monkeypatch.setattr(Credentials, "_is_expired", lambda self: access.keys.certificate_file.read_bytes() == before)
    monkeypatch.setattr(StoreKeys, "must_renew", lambda self, now: self.certificate_file.read_bytes() == before)
    FleetSession(access).leave()
    assert access.keys.certificate_file.read_bytes() != before


def test_the_servers_certificate_is_renewed_while_it_runs(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    transport = server.transport()
    token = chain.add("lyon", authority=certificate_fingerprint(tls.ca), addresses=(str(server.address),))
    keys = StoreKeys(tmp_path / "lyon")
    with ThreadClient(server.address, "lyon", insecure=False, keys=keys, token=token):
        joined(transport)
        ensure_server_tls(tmp_path / "tls", ["another.name"])
        server._renew_certificate()
        session = FleetSession(credentials(server, tls, chain, tmp_path, "paris"))  # with the new one
        session.leave()
    assert len(set(server._fingerprints)) == 2


def test_a_token_of_rotate_gives_a_store_a_new_key_and_is_used_once(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    """The same command line may be started again and again, as a service does."""
    FleetSession(credentials(server, tls, chain, tmp_path)).leave()
    keys = StoreKeys(tmp_path / "lyon")
    old = keys.pair().public
    token = chain.add("lyon", authority=certificate_fingerprint(tls.ca), addresses=("x:1",), replaces=True)
    for _ in range(2):
        FleetSession(Credentials(server.address, keys, name="lyon", token=token)).leave()
        assert keys.pair().public != old
    entry = chain.find(old)
    assert entry is not None
    assert entry.state is StoreState.REVOKED
    assert events(chain).count("enrolled") == 2


def test_a_token_that_is_no_longer_valid_does_not_lock_out_a_store_that_is_enrolled(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FleetSession(credentials(server, tls, chain, tmp_path)).leave()
    used = chain.add("paris", authority=certificate_fingerprint(tls.ca), addresses=("x:1",))
    chain.revoke("paris")
    access = Credentials(server.address, StoreKeys(tmp_path / "lyon"), name="lyon", token=used)
    FleetSession(access).leave()
    assert "the token is unknown, used, or expired" in caplog.text


def test_a_token_is_not_spent_at_a_server_that_the_given_authority_does_not_vouch_for(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    token = chain.add("lyon", authority=certificate_fingerprint(tls.ca), addresses=(str(server.address),))
    other = ensure_server_tls(tmp_path / "other")
    keys = StoreKeys(tmp_path / "lyon")
    with pytest.raises(TransportError, match="is not to be trusted"):
        FleetSession(Credentials(server.address, keys, name="lyon", token=token, ca=other.ca))
    assert chain.roster() == Roster()
    FleetSession(Credentials(server.address, keys, name="lyon", token=token, ca=tls.ca)).leave()


@pytest.mark.parametrize("lost", ["tls", "identity"])
def test_a_store_gets_into_a_server_that_was_set_up_anew_with_a_token(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path, lost: str
) -> None:
    """With another authority, or another chain's key, which with TLS 1.3 only shows as a connection that ends."""
    access = credentials(server, tls, chain, tmp_path)
    FleetSession(access).leave()
    server.close()
    (tmp_path / lost).rename(tmp_path / f"{lost}.old")
    again, anew = Chain(tmp_path / "identity"), ensure_server_tls(tmp_path / "tls")
    with EmbeddedServer(host="127.0.0.1", port=server.address.port, tls=anew, chain=again) as second:
        keys = StoreKeys(tmp_path / "lyon")
        with pytest.raises(TransportError) as caught:
            FleetSession(Credentials(second.address, keys, name="lyon"))
        assert not isinstance(caught.value, ServerUnavailableError), "waiting does not help"
        token = again.add(
            "lyon", authority=certificate_fingerprint(anew.ca), addresses=("x:1",), replaces=lost == "tls"
        )
        FleetSession(Credentials(second.address, keys, name="lyon", token=token)).leave()


def test_a_damaged_roster_admits_nobody_until_it_is_mended(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    access = credentials(server, tls, chain, tmp_path)
    FleetSession(access).leave()
    roster = tmp_path / "identity" / "roster.json"
    whole = roster.read_text()
    roster.write_text("x")
    with pytest.raises(ServerUnavailableError):
        FleetSession(access)
    roster.write_text(whole)
    FleetSession(access).leave()


@pytest.mark.parametrize("name", ["roster.json", "tokens.json"])
def test_a_damaged_file_of_the_server_is_not_blamed_on_the_store_that_enrolls(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    access = credentials(server, tls, chain, tmp_path)
    path = tmp_path / "identity" / name
    whole = path.read_text() if path.exists() else None
    path.write_text("x")
    with pytest.raises(ServerUnavailableError, match="answers 503 to the request to enroll"):
        FleetSession(access)
    assert "a store cannot enroll: " in caplog.text
    assert "damaged" in caplog.text
    path.write_text(whole) if whole else path.unlink()
    FleetSession(access).leave()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/fedshelf/pull"), ("POST", "/fedshelf/push"), ("POST", "/fedshelf/wait"),
        ("POST", "/v1/fleet/register-node"), ("GET", f"/fedshelf/blobs/{'0' * 64}"), ("POST", "/fedshelf/renew"),
        ("GET", "/docs"), ("GET", "/"),
    ],
)  # fmt: skip
def test_a_stranger_reaches_nothing(server: EmbeddedServer, tls: ServerTls, method: str, path: str) -> None:
    with httpx.Client(verify=client_context(tls.ca)) as stranger:
        assert stranger.request(method, f"https://{server.address}{path}").status_code == 401
        assert stranger.get(f"https://{server.address}/healthz").status_code == 200


def test_a_signature_without_the_keys_certificate_is_not_enough(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    access = credentials(server, tls, chain, tmp_path)
    access.prepare()
    signer = Signer(access.keys, server=certificate_fingerprint(tls.certificate), server_time=None)
    with httpx.Client(verify=client_context(tls.ca)) as stranger:
        headers = dict(signer.headers("POST", "/fedshelf/wait"))
        answer = stranger.post(f"https://{server.address}/fedshelf/wait", headers=headers)
    assert answer.status_code == 401
    assert "no certificate for the key" in answer.json()["detail"]


def test_a_request_cannot_be_repeated_altered_or_sent_to_another_server(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    access = credentials(server, tls, chain, tmp_path)
    context = access.prepare()
    assert context is not None
    own = certificate_fingerprint(tls.certificate)
    signer = Signer(access.keys, server=own, server_time=None)
    url = f"https://{server.address}/fedshelf/pull"
    with httpx.Client(verify=context) as store:

        def detail(headers: dict[str, str], body: bytes = b"") -> str:
            answer = store.post(url, headers=headers, content=body)
            assert answer.status_code == 401
            return str(answer.json()["detail"])

        headers = dict(signer.headers("POST", "/fedshelf/pull"))
        assert "not of the session" in detail(headers)  # it is authenticated: only it has no session
        assert detail(headers) == "the request was sent before"
        altered = {**headers, "fedshelf-nonce": "another"}
        assert "the signature is wrong" in detail(altered)
        assert "not the one that was signed" in detail(dict(signer.headers("POST", "/fedshelf/pull")), b"x")
        elsewhere = Signer(access.keys, server="0" * 64, server_time=None)
        assert "for another server" in detail(dict(elsewhere.headers("POST", "/fedshelf/pull")))
        late = Signer(access.keys, server=own, server_time=time.time() - 120)
        assert "more than 60 s from the server's" in detail(dict(late.headers("POST", "/fedshelf/pull")))
        forged = {**signer.headers("POST", "/fedshelf/pull"), SIGNATURE: "AAAA"}
        assert "the signature is wrong" in detail(forged)


def test_enrolling_is_limited_in_size_and_number(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://{server.address}/fedshelf/enroll"
    with httpx.Client(verify=client_context(tls.ca)) as stranger:
        assert stranger.post(url, content=b"x" * 5000).status_code == 413
        for body in (b"", b"[]", b"[" * 4000, b'{"token": 1, "name": 2, "request": 3}'):
            assert stranger.post(url, content=body).status_code == 400
        request = {"token": "guessed", "name": "\x1b[31m", "request": "x"}
        found = {stranger.post(url, json=request).status_code for _ in range(130)}
    assert found == {403, 429}
    assert "enrolling too often" in events(chain)
    assert any(event.startswith("enrollment refused: ") for event in events(chain))


def test_slow_and_greedy_strangers_are_cut_off(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.5)
    context = client_context(tls.ca)

    def ended(content: bytes) -> bool:
        """Whether the server ends the connection after that."""
        with (
            socket.create_connection(("127.0.0.1", server.address.port), timeout=PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as stranger,
        ):
            with contextlib.suppress(OSError):
                stranger.sendall(content)
                while stranger.recv(1000):
                    pass
            return True

    assert ended(b"")
    assert ended(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
    assert ended(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")  # and then nothing
    assert ended(b"GET /" + b"a" * 100_000)
    assert ended(b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 20_000 + b"\r\n\r\n")
    assert ended(b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % number for number in range(1000)))
    with socket.create_connection(("127.0.0.1", server.address.port), timeout=PATIENCE) as raw:
        assert raw.recv(1) == b""  # no handshake
    reasons, deadline = (
        {"too slow", "head too large", "too many headers", "handshake failed"},
        time.monotonic() + PATIENCE,
    )
    while not reasons <= set(events(chain)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reasons <= set(events(chain))
    FleetSession(credentials(server, tls, chain, tmp_path)).leave()


def test_a_flood_of_idle_connections_leaves_room_for_stores(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    before = psutil.Process().num_fds()
    with contextlib.ExitStack() as flood:
        for _ in range(600):
            flood.enter_context(socket.create_connection(("127.0.0.1", server.address.port)))
        deadline = time.monotonic() + PATIENCE
        while "too many connections" not in events(chain) and time.monotonic() < deadline:
            time.sleep(0.05)
        # Most are closed already; what is left is a number that does not grow.
        assert psutil.Process().num_fds() - before < 600 + 2 * http_server.MAX_STRANGERS_PER_ADDRESS
    session = None
    while session is None and time.monotonic() < deadline:
        with contextlib.suppress(TransportError):
            session = FleetSession(credentials(server, tls, chain, tmp_path))
    assert session is not None
    session.leave()


def test_a_second_session_of_a_key_ends_the_first(
    server: EmbeddedServer, tls: ServerTls, chain: Chain, tmp_path: Path
) -> None:
    """A client that was killed and has come back is one client."""
    access = credentials(server, tls, chain, tmp_path)
    first = FleetSession(access)
    second = FleetSession(access)
    with pytest.raises(SessionLostError):
        first.pull()
    assert len(list(server._engine.state.get_nodes(server._engine.run.run_id))) == 1
    second.leave()
    first.leave()


@pytest.mark.slow
def test_from_enroll_add_to_a_store_in_the_run_it_takes_two_commands(pair: Site) -> None:
    port = pair.address.rpartition(":")[2]
    run = pair.root / "run"
    server = pair.server("--rounds", "100000", "--run-dir", str(run), "--advertise", f"localhost:{port}")
    server.wait_for_text("need no --token)")
    added = pair.fedshelf("enroll", "add", "lyon-03")
    assert added.end() == 0, added.text()
    token = printed(added)
    assert token.startswith("fedshelf1.")

    here = pair.environment
    pair.environment = {**here, "FEDSHELF_HOME": str(pair.root / "another machine")}
    lyon = pair.start(*client_line(pair, "store-1"), "--token", token)
    pair.environment = here
    local = pair.client("store-2")
    server.wait_for("round_finished", round=1)
    assert set(statuses(pair.show(run), 1)) == {"lyon-03", "store-2"}

    pair.environment = {**here, "FEDSHELF_HOME": str(pair.root / "a third machine")}
    thief = pair.start(*client_line(pair, "store-1"), "--token", token)
    assert thief.end() == 1
    assert "the token is unknown, used, or expired" in thief.text()
    stranger = pair.start(*client_line(pair, "store-1"), "--insecure")
    stranger.wait_for_text("encrypts: run this client without --insecure; trying again")
    stranger.interrupt()
    assert stranger.end() == 0
    pair.environment = here

    assert pair.fedshelf("enroll", "revoke", "lyon-03").end() == 0
    assert lyon.end() == 1
    assert "was revoked" in lyon.text()
    assert server.wait_for("client_left", client="lyon-03")["reason"] == "store lyon-03 was revoked"
    listed = pair.fedshelf("enroll", "list", "--json")
    assert listed.end() == 0
    states = {entry["name"]: entry["state"] for entry in json.loads(printed(listed))}
    assert states == {"lyon-03": "revoked", "store-2": "active"}
    shown = pair.fedshelf("enroll", "tokens", "--json")
    assert shown.end() == 0
    (invitation,) = json.loads(printed(shown))
    assert (invitation["name"], invitation["uses"]) == (None, 2)
    assert pair.fedshelf("enroll", "cancel").end() == 2
    assert pair.fedshelf("enroll", "cancel", invitation["id"]).end() == 0
    key = pair.fedshelf("enroll", "key")
    assert key.end() == 0
    assert PublicKey(printed(key)).is_valid
    server.interrupt()
    server.end()
    local.interrupt()
    local.end()
    assert "norm bound auto" in " ".join(event["text"] for event in text_of(pair, "runs", "show", str(run)))
    verified = text_of(pair, "audit-log", "--verify")
    newest = text_of(pair, "audit-log", "--prune-before", "2020-01-01")
    assert newest[-1]["text"].strip() == "Deleted 0 files of the audit log."
    assert re.fullmatch(r"Hash of the newest line: [0-9a-f]{64}", verified[-1]["text"].strip())

    log = pair.fedshelf("audit-log")
    assert log.end() == 0
    found = [event["event"] for event in log.events]
    assert any(event.startswith("enrollment refused: ") for event in found)
    for event in ("token made", "token ended", "enrolled", "revoked", "server started", "run started", "joined",
                  "upload", "round finished", "run ended", "released"):  # fmt: skip
        assert event in found
    started = next(event for event in log.events if event["event"] == "server started")
    assert (started["norm_bound"], started["confirm_catalogue"]) == ("auto", False)
    assert "user" in started["operator"]
    weights = run / "model" / "best" / "model.safetensors"
    released = next(event for event in log.events if event["event"] == "released")
    assert released["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    upload = next(event for event in log.events if event["event"] == "upload" and event["verdict"] == "counted")
    assert upload["bytes"] > 1000
    assert len(upload["digest"]) == 64
    assert 0 < upload["norm"] < 1000
    assert Token.parse(token).secret not in json.dumps(log.events)
    path = next((pair.root / "home" / "identity").glob("audit-*.jsonl"))
    path.write_text(path.read_text().replace("lyon-03", "nice-03"))
    checked = pair.fedshelf("audit-log", "--verify")
    assert checked.end() == 1
    assert "does not continue the log" in checked.text()
    path.unlink()
    gone = pair.fedshelf("audit-log", "--verify")
    assert gone.end() == 1
    assert "no audit log" in gone.text()
    nowhere = pair.fedshelf("enroll", "list", "--home", str(pair.root / "nowhere"))
    assert nowhere.end() == 2
    assert not (pair.root / "nowhere").exists()
    again = pair.fedshelf("enroll", "revoke", "lyon-03")
    assert again.end() == 1
    assert "was revoked on" in again.text()


def text_of(pair: Site, *command: str) -> list[Event]:
    """What a command prints, line by line."""
    process = pair.fedshelf(*command)
    assert process.end() == 0, process.text()
    return process.events


@pytest.mark.slow
def test_a_server_that_is_started_again_does_not_wait_for_a_store_that_was_revoked(pair: Site) -> None:
    run = pair.root / "run"

    def server() -> Process:
        return pair.server("--rounds", "100000", "--run-dir", str(run))

    first = server()
    lyon, other = pair.held_client("store-1", "hold@2"), pair.client("store-2")
    lyon.wait_for("held", round=2)
    first.kill()
    lyon.pause()
    assert pair.fedshelf("enroll", "revoke", "store-1").end() == 0
    again = server()
    again.wait_for("round_finished", round=3)
    assert not [event for event in again.events if event["event"] == "waiting" and event["returning"]]
    (void,) = pair.show(run)["void_attempts"]
    found = {client["client"]: (client["status"], client["reason"]) for client in void["clients"]}
    assert found["store-1"] == ("offline", "store store-1 was revoked")
    assert statuses(pair.show(run), 2) == {"store-2": "counted"}
    again.interrupt()
    again.end()
    other.interrupt()
    other.end()


def printed(process: Process) -> str:
    """The last line that a process printed."""
    text: str = process.events[-1]["text"]
    return text.strip()


def client_line(pair: Site, store: str) -> tuple[str, ...]:
    port = pair.address.rpartition(":")[2]
    data = str(pair.stores / store)
    return (sys.executable, "-m", "fedshelf", "client", "--data-dir", data, "--server-address", f"localhost:{port}")
