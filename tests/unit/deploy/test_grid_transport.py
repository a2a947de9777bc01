"""The transport over a grid that behaves as a stock SuperLink may: errors instead of answers, nodes that blink."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedshelf.core.messages import ClassFolder, Failure, Setup, Upload
from fedshelf.core.ports import Joined, Left, Reply
from fedshelf.deploy.grid_transport import Engine, GridTransport
from fedshelf.deploy.records import Control, ControlKind, WireMessage, open_records, to_parcel
from fedshelf.serialization.messages import MAX_CLIENT_HEADER_BYTES
from tests.unit.deploy.echo import echo, join, task

CLIENT_APP_RAISED_EXCEPTION, MESSAGE_UNAVAILABLE, NODE_UNAVAILABLE = 2, 3, 5


class ScriptedGrid(Grid):  # type: ignore[misc]  # mypy does not follow imports into Flower
    """Keeps what is pushed; the test says which nodes are there and what comes back."""

    def __init__(self) -> None:
        self.nodes = [7]
        self.sent: list[Message] = []
        self.replies: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        found = [reply for reply in self.replies if reply.metadata.reply_to_message_id in wanted]
        self.replies = [reply for reply in self.replies if reply not in found]
        return found

    def answer(self, message: WireMessage) -> None:
        self.replies.append(Message(to_parcel(message).inline(), reply_to=self.sent[-1]))

    def fail(self, code: int, reason: str = "reason") -> None:
        asked = self.sent[-1].metadata
        metadata = Metadata(
            run_id=1, message_id="", src_node_id=1, dst_node_id=1, reply_to_message_id=asked.message_id, group_id="",
            created_at=asked.created_at, ttl=asked.ttl, message_type="system",
        )  # fmt: skip
        self.replies.append(make_message(metadata=metadata, error=Error(code=code, reason=reason)))

    run = property(lambda self: None)

    def set_run(self, run: object) -> None:
        pass

    def create_message(self, *arguments: object) -> None:
        pass

    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> list[Message]:
        raise AssertionError("the transport may not wait for all")


@pytest.fixture
def grid() -> ScriptedGrid:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return ScriptedGrid()


@pytest.fixture
def transport(grid: ScriptedGrid) -> GridTransport:
    engine = Engine()
    engine.poll_seconds = 0.01
    return GridTransport(grid, engine=engine, close_timeout=0.05)


@pytest.fixture
def address(grid: ScriptedGrid, transport: GridTransport) -> str:
    assert transport.receive(0) is None
    assert open_records(grid.sent[-1].content) == Control(kind=ControlKind.INTRODUCE)
    grid.answer(join("lyon"))
    arrival = transport.receive(0)
    assert isinstance(arrival, Joined)
    return arrival.address


def test_a_failed_app_is_a_failure_of_its_task(grid: ScriptedGrid, transport: GridTransport, address: str) -> None:
    asked = task(torch.ones(3))
    transport.send(address, asked)
    grid.fail(CLIENT_APP_RAISED_EXCEPTION, "out of memory")
    arrival = transport.receive(0)
    assert isinstance(arrival, Reply)
    assert arrival.task == asked.key
    assert isinstance(arrival.message, Failure)
    assert arrival.message.key == asked.key
    assert "out of memory" in arrival.message.reason


def test_a_lost_message_is_reported_with_its_task(grid: ScriptedGrid, transport: GridTransport, address: str) -> None:
    asked = task(torch.ones(3))
    transport.send(address, asked)
    grid.fail(MESSAGE_UNAVAILABLE, "expired")
    arrival = transport.receive(0)
    assert isinstance(arrival, Reply)
    assert (arrival.address, arrival.message, arrival.reason, arrival.task) == (address, None, "expired", asked.key)


def test_an_unavailable_node_has_left_and_is_introduced_anew_when_back(
    grid: ScriptedGrid, transport: GridTransport, address: str
) -> None:
    transport.send(address, task(torch.ones(3)))
    grid.fail(NODE_UNAVAILABLE)
    assert transport.receive(0) == Left(address=address)
    assert transport.receive(0) is None
    assert open_records(grid.sent[-1].content) == Control(kind=ControlKind.INTRODUCE)
    grid.answer(join("lyon"))
    again = transport.receive(0)
    assert isinstance(again, Joined)
    assert again.address != address


def test_a_node_that_vanishes_has_left_and_cannot_be_sent_to(
    grid: ScriptedGrid, transport: GridTransport, address: str
) -> None:
    grid.nodes = []
    assert transport.receive(0) == Left(address=address)
    assert transport.send(address, task(torch.ones(3))) == 0


def test_what_a_node_answered_before_it_left_counts(grid: ScriptedGrid, transport: GridTransport, address: str) -> None:
    asked = task(torch.ones(3))
    transport.send(address, asked)
    grid.answer(echo(asked))
    grid.nodes = []
    reply = transport.receive(0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Upload)
    assert transport.receive(0) == Left(address=address)


def test_a_node_that_never_introduced_itself_is_nobodys_business(grid: ScriptedGrid, transport: GridTransport) -> None:
    assert transport.receive(0) is None
    grid.answer(Failure(reason="no photos"))
    assert transport.receive(0) is None
    grid.nodes = []
    assert transport.receive(0) is None


def test_a_node_whose_introduction_cannot_be_read_is_told_why_and_heard_no_more(
    grid: ScriptedGrid, transport: GridTransport
) -> None:
    assert transport.receive(0) is None
    grid.answer(replace(join("lyon"), classes=(ClassFolder(leaf="x", path="x" * 40_000),)))
    assert transport.receive(0) is None
    told = open_records(grid.sent[-1].content)
    assert isinstance(told, Control)
    assert told.kind is ControlKind.REFUSED_FOR_NOW
    assert "path: String should have at most 32768 characters" in told.reason
    grid.answer(join("lyon"))
    assert transport.receive(0) is None


def test_a_header_that_is_too_large_for_a_client_is_not_parsed(
    grid: ScriptedGrid, transport: GridTransport, address: str
) -> None:
    asked = task(torch.ones(3))
    transport.send(address, asked)
    grid.answer(Failure(key=asked.key, reason="x" * MAX_CLIENT_HEADER_BYTES))
    arrival = transport.receive(0)
    assert isinstance(arrival, Reply)
    assert arrival.message is None
    assert "4,194,304 is the most" in arrival.reason


def test_a_model_that_stock_clients_do_not_keep_counts_each_time(
    grid: ScriptedGrid, transport: GridTransport, address: str
) -> None:
    asked = task(torch.ones(1000))
    assert transport.send(address, asked) == transport.send(address, asked) > 4000


def test_messages_go_to_the_entry_points_of_a_flower_app(
    grid: ScriptedGrid, transport: GridTransport, address: str
) -> None:
    transport.send(address, task(torch.ones(3)))
    transport.send(address, Setup(run_id="r", config="", catalogue="", layout_digest=""))
    assert [message.metadata.message_type for message in grid.sent] == ["query", "train", "query"]


@pytest.mark.parametrize(
    ("is_final", "kind"), [(True, ControlKind.REFUSED), (False, ControlKind.REFUSED_FOR_NOW)], ids=str
)
def test_an_answer_after_a_refusal_is_dropped(
    grid: ScriptedGrid, transport: GridTransport, address: str, is_final: bool, kind: ControlKind
) -> None:
    transport.send(address, task(torch.ones(3)))
    grid.answer(Failure(reason="late"))
    transport.refuse(address, "the name is taken", is_final=is_final)
    assert open_records(grid.sent[-1].content) == Control(kind=kind, reason="the name is taken")
    assert transport.receive(0) is None


def test_closing_tells_everybody_and_does_not_wait_for_ever(
    grid: ScriptedGrid, transport: GridTransport, address: str
) -> None:
    transport.close("run finished")
    assert open_records(grid.sent[-1].content) == Control(kind=ControlKind.CLOSED, reason="run finished")
