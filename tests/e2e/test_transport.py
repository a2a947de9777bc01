"""The real transport over loopback sockets: real server, real clients."""

import http.server
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from fedshelf.core.errors import TransportError
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    Evaluation,
    Failure,
    Join,
    Purpose,
    Ready,
    ServerMessage,
    Upload,
)
from fedshelf.core.ports import Joined, Left, Reply
from fedshelf.deploy import patience
from fedshelf.deploy.client_part import EndKind
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.records import Parcel
from fedshelf.deploy.tls import ServerTls, ensure_server_tls
from fedshelf.identity.chain import Chain
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.ledger import Ledger
from fedshelf.privacy.ledger_content import read
from tests.ports import free_port
from tests.recording_proxy import RecordingProxy, recording_proxy
from tests.unit.deploy.echo import (
    FAIL,
    PATIENCE,
    SETUP,
    ThreadClient,
    content,
    echo,
    expect,
    join,
    joined,
    process_client,
    pulled,
    read_records,
    reply,
    session_of,
    task,
)

pytestmark = pytest.mark.e2e


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as running:
        yield running


@pytest.fixture
def transport(server: EmbeddedServer) -> GridTransport:
    return server.transport()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ServerTls:
    return ensure_server_tls(tmp_path_factory.mktemp("tls"))


def stored(server: EmbeddedServer) -> int:
    """Messages and objects that the engine keeps."""
    state = server._engine.state
    return int(len(state.object_store) + state.num_message_ins() + state.num_message_res())


def test_two_clients_join_set_up_train_and_evaluate(server: EmbeddedServer, transport: GridTransport) -> None:
    with ThreadClient(server.address, "lyon"), ThreadClient(server.address, "nice"):
        addresses = joined(transport, 2)
        assert sorted(addresses) == ["lyon", "nice"]
        for address in addresses.values():
            transport.send(address, SETUP)
        assert {type(expect(transport, Reply).message) for _ in addresses} == {Ready}
        params = torch.randn(2_500_000)  # 10 MB: several of Flower's objects
        for address in addresses.values():
            transport.send(address, task(params))
        replies = [expect(transport, Reply) for _ in addresses]
        assert {reply.address for reply in replies} == set(addresses.values())
        for reply in replies:
            assert isinstance(reply.message, Upload)
            assert torch.equal(reply.message.delta, params + 1)
            assert reply.task == reply.message.key == task(params).key
            assert 10_000_000 < reply.num_bytes < 10_001_000
        transport.send(addresses["nice"], task(params, purpose=Purpose.EVALUATE))
        assert isinstance(expect(transport, Reply).message, Evaluation)
        assert stored(server) == 0


def test_a_model_that_the_client_holds_is_not_sent_again(server: EmbeddedServer, transport: GridTransport) -> None:
    params = torch.randn(250_000)
    with recording_proxy(str(server.address)) as proxy, ThreadClient(proxy.address, "lyon"):
        address = joined(transport)["lyon"]
        first = transport.send(address, task(params))
        expect(transport, Reply)
        second = transport.send(address, task(params, purpose=Purpose.EVALUATE))
        expect(transport, Reply)
        assert first > 1_000_000 > 1000 > second
        assert num_fetches(proxy) == 1
        third = transport.send(address, task(params + 1, round=2))
        answer = expect(transport, Reply).message
        assert num_fetches(proxy) == 2
        assert third > 1_000_000
        assert isinstance(answer, Upload)
        assert torch.equal(answer.delta, params + 1 + 1)


def num_fetches(proxy: RecordingProxy) -> int:
    return sum(bytes(stream).count(b"GET /fedshelf/blobs/") for stream in proxy.streams)


def test_what_a_handler_raises_is_told_and_the_client_goes_on(server: EmbeddedServer, transport: GridTransport) -> None:
    with ThreadClient(server.address, "lyon"):
        address = joined(transport)["lyon"]
        broken = task(torch.ones(3), lr=FAIL)
        transport.send(address, broken)
        assert expect(transport, Reply).message == Failure(reason="ValueError: cannot read …", key=broken.key)
        transport.send(address, task(torch.ones(3)))
        assert isinstance(expect(transport, Reply).message, Upload)


def test_everything_that_leaves_a_client_passes_the_hook(server: EmbeddedServer, transport: GridTransport) -> None:
    seen: list[Parcel] = []
    taken: list[tuple[type, int]] = []

    def take(answer: object, num_bytes: int) -> None:
        taken.append((type(answer), num_bytes))

    with ThreadClient(server.address, "lyon", on_send=seen.append, on_answer=take) as client:
        address = joined(transport)["lyon"]
        transport.send(address, SETUP)
        expect(transport, Reply)
        transport.send(address, task(torch.ones(3)))
        expect(transport, Reply)
        transport.send(address, task(torch.ones(3), lr=FAIL))
        expect(transport, Reply)
        sent = [type(read_records(parcel.inline())) for parcel in seen]
        assert sent == [Join, Ready, Upload, Failure]
        transport.close("run finished")
        client.result.result(PATIENCE)
        sizes = [parcel.num_header_bytes + parcel.blob.size for parcel in seen]
        assert taken[:4] == list(zip(sent, sizes, strict=False)), "each is told of once the server has it"


def test_a_refused_client_learns_why_and_the_others_stay(server: EmbeddedServer, transport: GridTransport) -> None:
    with ThreadClient(server.address, "lyon") as client, ThreadClient(server.address, "nice"):
        addresses = joined(transport, 2)
        transport.refuse(addresses["lyon"], "the name 'lyon' is taken", is_final=True)
        ended = client.result.result(PATIENCE)
        assert (ended.kind, ended.reason) == (EndKind.REFUSED, "the name 'lyon' is taken")
        assert transport.send(addresses["lyon"], SETUP) == 0
        transport.send(addresses["nice"], SETUP)
        assert expect(transport, Reply).address == addresses["nice"]  # and no `Left` of the refused one


def test_a_refused_client_learns_why_though_the_end_of_the_run_overtakes_it(
    server: EmbeddedServer, transport: GridTransport
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def work(message: ServerMessage) -> ClientMessage:
        started.set()
        go_on.wait(PATIENCE)
        return echo(message)

    with ThreadClient(server.address, "lyon", handle=work) as client:
        address = joined(transport)["lyon"]
        transport.send(address, task(torch.ones(3)))
        assert started.wait(PATIENCE)
        transport.refuse(address, "your photos are out of the model", is_final=True)
        threading.Timer(1.0, go_on.set).start()
        transport.close("run finished")
        ended = client.result.result(PATIENCE)
        assert (ended.kind, ended.reason) == (EndKind.REFUSED, "your photos are out of the model")


def test_a_client_that_cannot_write_its_ledger_sends_nothing_until_it_can(
    server: EmbeddedServer, transport: GridTransport, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.mkdir()  # in the way
    with ThreadClient(server.address, "lyon", ledger=ledger) as client:
        while not any("nothing is sent" in status for status in client.statuses):
            assert transport.receive(0.1) is None  # it was asked to introduce itself
        assert "it cannot be written to this store's ledger" in client.says("nothing is sent")
        ledger.path.rmdir()
        transport.send(joined(transport)["lyon"], task(torch.ones(3)))
        assert isinstance(expect(transport, Reply).message, Upload)
        assert [release.kind for release in read(tmp_path).releases] == ["join", "upload"]


def test_a_server_that_signs_with_another_key_is_not_believed(
    server: EmbeddedServer, transport: GridTransport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server._chain.ledgers._keys = KeyPair.generate()
    with ThreadClient(server.address, "lyon", ledger=Ledger(tmp_path)):
        joined(transport)
        transport.close("run finished")
    assert "the server did not countersign entry 1 of this store's ledger" in caplog.text
    assert not read(tmp_path).countersigned


def test_a_client_that_is_refused_for_now_says_why_at_growing_intervals_and_joins_again(
    server: EmbeddedServer, transport: GridTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "REFUSED_PAUSES", (0.05,))
    with ThreadClient(server.address, "lyon") as client:
        for _ in range(5):
            transport.refuse(joined(transport)["lyon"], "its policy allows no such model")
        transport.send(joined(transport)["lyon"], SETUP)
        expect(transport, Reply)
        transport.close("run finished")
        assert client.result.result(PATIENCE).kind is EndKind.CLOSED
        told = [line for line in client.statuses if "does not let this store take part" in line]
        assert len(told) < 5
        assert "its policy allows no such model; joining again in 0.05 s (attempt 1 since 20" in told[0]


def test_all_clients_learn_that_the_run_has_finished_busy_ones_too(
    server: EmbeddedServer, transport: GridTransport
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def work(message: ServerMessage) -> ClientMessage:
        started.set()
        go_on.wait(PATIENCE)
        return echo(message)

    with ThreadClient(server.address, "lyon") as idle, ThreadClient(server.address, "nice", handle=work) as busy:
        transport.send(joined(transport, 2)["nice"], task(torch.ones(3)))
        assert started.wait(PATIENCE)
        transport.close("run finished")
        server.close()
        go_on.set()
        for client in (idle, busy):
            ended = client.result.result(PATIENCE)
            assert (ended.kind, ended.reason) == (EndKind.CLOSED, "run finished")


def test_a_client_that_stops_signs_off(server: EmbeddedServer, transport: GridTransport) -> None:
    with ThreadClient(server.address, "lyon") as client:
        address = joined(transport)["lyon"]
        client.stop.set()
        assert client.result.result(PATIENCE).kind is EndKind.STOPPED
        assert expect(transport, Left) == Left(address=address, signed_off=True)
        assert transport.send(address, SETUP) == 0
        assert stored(server) == 0


def test_work_delivered_before_a_client_leaves_counts(server: EmbeddedServer, transport: GridTransport) -> None:
    """The server looks at its mail only now and then: here, not before the client has gone."""
    session = session_of(server, "lyon")
    assert transport.receive(0) is None
    reply(session, pulled(session), join("lyon"))
    address = joined(transport)["lyon"]
    transport.send(address, task(torch.zeros(1000)))
    message = pulled(session)
    asked = content(session, message)
    assert isinstance(asked, Broadcast)
    reply(session, message, echo(asked))
    session.leave()
    upload = expect(transport, Reply).message
    assert isinstance(upload, Upload)
    assert torch.equal(upload.delta, torch.ones(1000))
    assert expect(transport, Left) == Left(address=address, signed_off=True)
    assert stored(server) == 0


@pytest.mark.slow
def test_a_killed_client_is_noticed_and_its_work_forgotten(server: EmbeddedServer, transport: GridTransport) -> None:
    with process_client(server.address, "lyon") as process, process_client(server.address, "nice"):
        addresses = joined(transport, 2)
        transport.send(addresses["lyon"], task(torch.ones(1000), lr=3600.0))
        while not server._engine._taken:
            time.sleep(0.01)  # until it has the task: it dies at work
        process.kill()
        assert expect(transport, Left) == Left(address=addresses["lyon"])
        assert stored(server) == 0
        transport.send(addresses["nice"], task(torch.ones(3)))
        assert expect(transport, Reply).address == addresses["nice"]


@pytest.mark.slow
def test_a_silent_client_counts_as_gone_until_it_speaks_again() -> None:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None, silence=2.0) as server:
        transport = server.transport()
        with process_client(server.address, "lyon") as process:
            first = joined(transport)["lyon"]
            process.pause()
            assert expect(transport, Left).address == first
            process.resume()
            second = joined(transport)["lyon"]
            assert second != first
            transport.send(second, task(torch.ones(3)))
            assert expect(transport, Reply).address == second


def test_a_client_busy_for_longer_than_the_silence_limit_is_not_gone() -> None:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None, silence=1.0) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon"):
            transport.send(joined(transport)["lyon"], task(torch.ones(3), lr=4.0))
            assert isinstance(expect(transport, Reply).message, Upload)


def test_clients_join_a_restarted_server_by_themselves(tmp_path: Path) -> None:
    chain = Chain(tmp_path, is_open=True)
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None, chain=chain) as first:
        with_client = ThreadClient(first.address, "lyon")
        joined(first.transport())
        port = first.address.port
    with with_client, EmbeddedServer(host="127.0.0.1", port=port, tls=None, chain=chain) as second:
        transport = second.transport()
        transport.send(joined(transport)["lyon"], task(torch.ones(3)))
        assert isinstance(expect(transport, Reply).message, Upload)


def test_an_answer_worked_out_while_the_server_restarted_does_no_harm(tmp_path: Path) -> None:
    started, go_on, chain = threading.Event(), threading.Event(), Chain(tmp_path, is_open=True)

    def slow(message: ServerMessage) -> ClientMessage:
        if not started.is_set():
            started.set()
            go_on.wait(PATIENCE)
        return echo(message)

    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None, chain=chain) as first:
        client = ThreadClient(first.address, "lyon", handle=slow)
        transport = first.transport()
        transport.send(joined(transport)["lyon"], task(torch.ones(3)))
        assert started.wait(PATIENCE)
        port = first.address.port
    with client, EmbeddedServer(host="127.0.0.1", port=port, tls=None, chain=chain) as second:
        go_on.set()
        transport = second.transport()
        transport.send(joined(transport)["lyon"], task(torch.zeros(3), round=2))
        reply = expect(transport, Reply).message
        assert isinstance(reply, Upload)
        assert reply.key.round == 2
        assert torch.equal(reply.delta, torch.ones(3))


def test_messages_travel_encrypted(tls: ServerTls) -> None:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls) as server:
        transport, params = server.transport(), torch.randn(10_000)
        with ThreadClient(f"localhost:{server.address.port}", "lyon", insecure=False, ca=tls.ca):
            transport.send(joined(transport)["lyon"], task(params))
            reply = expect(transport, Reply).message
            assert isinstance(reply, Upload)
            assert torch.equal(reply.delta, params + 1)


def test_a_client_that_hangs_is_no_error_of_a_server_that_stops(
    tls: ServerTls, caplog: pytest.LogCaptureFixture
) -> None:
    server = EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls)
    context = ssl.create_default_context(cafile=tls.ca)
    with (
        socket.create_connection(("127.0.0.1", server.address.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(b"GET /fedshelf/health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
        server.close()  # which asks to close the connection, and gets no answer
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_on_the_same_machine_needs_no_ca(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path))
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=ensure_server_tls(tmp_path / "tls")) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon", insecure=False):
            assert "lyon" in joined(transport)


def test_a_server_of_another_authority_is_not_trusted(tls: ServerTls, tmp_path: Path) -> None:
    other = ensure_server_tls(tmp_path)
    with (
        EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls) as server,
        ThreadClient(server.address, "lyon", insecure=False, ca=other.ca) as client,
    ):
        client.says("(--ca); trying again")


def test_a_name_that_the_certificate_lacks_is_one_clear_sentence(tls: ServerTls) -> None:
    # "127.1" is the loopback address to the network, and no name in the certificate
    with (
        EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls) as server,
        ThreadClient(f"127.1:{server.address.port}", "lyon", insecure=False, ca=tls.ca) as client,
    ):
        client.says("not made out to 127.1")


def test_clear_text_to_an_encrypting_server_is_one_clear_sentence(tls: ServerTls) -> None:
    with (
        EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls) as server,
        ThreadClient(server.address, "lyon") as client,
    ):
        client.says("without --insecure")


def test_encryption_to_a_clear_text_server_is_one_clear_sentence(server: EmbeddedServer, tls: ServerTls) -> None:
    with ThreadClient(server.address, "lyon", insecure=False, ca=tls.ca) as client:
        assert "--insecure" in client.says("does not encrypt")


def test_an_address_in_use_is_one_clear_error(server: EmbeddedServer) -> None:
    with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{server.address.port}.*another program"):
        EmbeddedServer(host="127.0.0.1", port=server.address.port, tls=None)


def test_a_server_that_stays_away_is_given_up_after_the_time_allowed() -> None:
    with (
        ThreadClient(f"127.0.0.1:{free_port()}", "lyon", max_wait=1.0) as client,
        pytest.raises(TransportError, match="did not answer for 1 s"),
    ):
        client.result.result(PATIENCE)
    assert any("cannot connect" in status for status in client.statuses)


def test_another_program_on_the_port_is_one_clear_sentence() -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", free_port()), Quiet) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with ThreadClient(f"127.0.0.1:{other.server_port}", "lyon") as client:
            client.says("not a FedShelf server")
        other.shutdown()


def test_nothing_piles_up_over_rounds(server: EmbeddedServer, transport: GridTransport) -> None:
    with ThreadClient(server.address, "lyon"), ThreadClient(server.address, "nice"):
        addresses = joined(transport, 2)
        for number in range(1, 6):
            for address in addresses.values():
                transport.send(address, task(torch.full((1000,), float(number)), round=number))
            for _ in addresses:
                expect(transport, Reply)
            assert stored(server) == 0


def test_messages_that_share_a_model_do_not_take_it_from_each_other(
    server: EmbeddedServer, transport: GridTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may take and confirm its message while the same model is being given to the next one."""
    sessions = {}
    for name in ("lyon", "nice"):
        session = session_of(server, name)
        assert transport.receive(0) is None
        reply(session, pulled(session), join(name))
        sessions[joined(transport)[name]] = session
    (first, one), (second, two) = sessions.items()
    params = torch.randn(1000)
    transport.send(first, task(params))
    state = server._engine.state
    register = state.preregister_object_tree
    taking = threading.Thread(target=one.pull)

    def register_while_taken(*arguments: object) -> object:
        taking.start()
        taking.join(0.5)
        assert taking.is_alive(), "the first message was freed while the second was being registered"
        return register(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(state, "preregister_object_tree", register_while_taken)
        transport.send(second, task(params))
    taking.join(PATIENCE)
    asked = content(two, pulled(two))
    assert isinstance(asked, Broadcast)
    assert torch.equal(asked.params, params)
    for session in (one, two):
        session.leave()


def test_a_pull_waits_for_the_message_that_is_sent_meanwhile(server: EmbeddedServer, transport: GridTransport) -> None:
    """Nobody has to ask again and again."""
    session = session_of(server, "lyon")
    assert transport.receive(0) is None
    reply(session, pulled(session), join("lyon"))
    address = joined(transport)["lyon"]
    found: list[Message | None] = []
    waiting = threading.Thread(target=lambda: found.append(session.pull()))
    waiting.start()
    time.sleep(0.3)
    transport.send(address, task(torch.ones(3)))
    waiting.join(PATIENCE)
    assert len(found) == 1
    assert found[0] is not None
    session.leave()


def test_a_message_is_given_again_until_it_is_answered_or_the_next_is_asked_for(
    server: EmbeddedServer, transport: GridTransport
) -> None:
    session = session_of(server, "lyon")
    assert transport.receive(0) is None
    reply(session, pulled(session), join("lyon"))
    address = joined(transport)["lyon"]
    transport.send(address, task(torch.ones(3), round=1))
    first = pulled(session)
    session._unanswered = None  # the answer to the request got lost on its way: the client knows of no message
    again = pulled(session)
    assert again.metadata.message_id == first.metadata.message_id
    transport.send(address, task(torch.ones(3), round=2))  # it goes on without having answered
    second = content(session, pulled(session))
    assert isinstance(second, Broadcast)
    assert second.key.round == 2
    session.leave()


def test_ipv6_addresses_work() -> None:
    try:
        server = EmbeddedServer(host="::1", port=0, tls=None)
    except TransportError:
        pytest.skip("this machine has no IPv6 loopback")
    with server, ThreadClient(server.address, "lyon"):
        assert str(server.address).startswith("[::1]:")
        assert isinstance(server.transport().receive(PATIENCE), Joined)


def test_the_process_is_not_told_to_phone_home() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
