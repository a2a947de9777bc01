"""What FedShelf uses of Flower beyond its documented API. When Flower is upgraded, this says what has gone."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import fedshelf.deploy

DOCUMENTED = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
HOLDERS = {"flower_engine.py", "flower_grid.py", "flower_client.py"}
ROOM = Path(fedshelf.deploy.__file__).parent


def imported_names(path: Path) -> list[tuple[str, str]]:
    """(module, name) of each import from Flower in a source file."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flwr":
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "flwr"]
    return found


def test_internals_are_used_in_three_files_alone() -> None:
    users = {path.name for path in ROOM.glob("*.py") for module, _ in imported_names(path) if module not in DOCUMENTED}
    assert users == HOLDERS


@pytest.mark.parametrize(
    ("module", "name"), sorted({entry for holder in HOLDERS for entry in imported_names(ROOM / holder)})
)
def test_an_imported_internal_is_still_there(module: str, name: str) -> None:
    found = hasattr(importlib.import_module(module), name)
    if not found:
        importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize(
    ("owner", "method", "parameters"),
    [
        ("flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState", name, parameters)
        for name, parameters in {
            "start_session": ["run_id"],
            "store_message_and_object_tree": ["message", "object_tree", "session_id"],
            "store_object": ["run_id", "session_id", "object_id", "object_content"],
            "delete_messages": ["message_ins_ids"],
            "get_nodes": ["run_id"],
            "get_node_id_by_public_key": ["public_key"],
            "acknowledge_node_heartbeat": ["node_id", "heartbeat_interval"],
            "acknowledge_task_heartbeat": ["task_id"],
            "activate_node": ["node_id", "heartbeat_interval"],
            "deactivate_node": ["node_id"],
            "claim_task": ["task_id"],
            "activate_task": ["task_id"],
            "finish_task": ["task_id", "sub_status", "details"],
        }.items()
    ]
    + [
        ("flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore", "get", ["object_id"]),
        ("flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore", "delete", ["object_id"]),
        ("flwr.supercore.object_store.in_memory_object_store:InMemoryObjectStore", "get_object_tree", ["object_id"]),
        ("flwr.superlink.servicer.fleet:fleet_handlers", "push_messages", ["request", "state"]),
        ("flwr.superlink.servicer.fleet:fleet_handlers", "pull_messages", ["request", "state", "store"]),
    ],
)
def test_a_method_still_takes_what_we_give_it(owner: str, method: str, parameters: list[str]) -> None:
    module, _, name = owner.partition(":")
    function = getattr(getattr(importlib.import_module(module), name), method)
    assert [p for p in inspect.signature(function).parameters if p != "self"] == parameters


def test_the_state_still_remembers_which_reply_answers_which_message() -> None:
    from fedshelf.deploy.flower_engine import FlowerEngine

    engine = FlowerEngine(silence=30)
    assert engine.state.message_ins_id_to_message_res_id == {}
    assert engine.state.message_res_store == {}
    assert engine.state._object_push_session_by_root == {}
    session = engine.state._object_push_sessions[engine.state.start_session(engine.run.run_id)]
    assert session.pending_object_ids == set()
    assert len(engine.state.object_store) == 0


def test_messages_of_the_engine_are_not_logged_where_the_run_reports_the_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flwr.app import Message, RecordDict

    from fedshelf.deploy.flower_engine import FlowerEngine
    from fedshelf.deploy.flower_grid import EmbeddedGrid

    fedshelf.deploy.quiet_engine_log()
    engine = FlowerEngine(silence=30)
    grid = EmbeddedGrid(engine, lambda node: None, lambda reason: None)
    assert list(grid.push_messages([Message(RecordDict(), 17, "query")])) == [""], "that node has left"
    reply = Message(RecordDict(), reply_to=Message(RecordDict(), 17, "query"))
    for field, value in {"run_id": engine.run.run_id, "message_id": "a", "reply_to_message_id": "gone"}.items():
        reply.metadata.__dict__[f"_{field}"] = value
    assert engine.state.store_message_res(reply) is None, "the answer is late"
    assert not caplog.records
    reply.metadata.__dict__["_ttl"] = -1.0
    engine.state.store_message_res(reply)
    (line,) = caplog.records
    assert line.getMessage().startswith("Flower's engine: ")
