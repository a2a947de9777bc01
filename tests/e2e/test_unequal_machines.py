"""Machines that differ, as real processes: timed by the server, given work by their speed, waited for only so long."""

import math
import sqlite3
from pathlib import Path

import pytest

from fedshelf.storage.checkpoints import FileCheckpoints
from tests.processes import Site, reason, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def run(site: Site, *flags: str) -> Path:
    """A deployed run to its end."""
    directory = site.root / "deployed"
    server = site.server("--val-fraction", "0", "--rounds", "3", "--run-dir", str(directory), *flags)
    clients = site.clients()
    assert server.end() == 0, server.text()
    assert {name: client.end() for name, client in clients.items()} == dict.fromkeys(site.names, 0)
    return directory


def members(directory: Path, column: str) -> dict[int, dict[str, object]]:
    """A column of all members, by round."""
    found: dict[int, dict[str, object]] = {}
    with sqlite3.connect(directory / "run.db") as database:
        for round_, client, value in database.execute(f"SELECT round, client, {column} FROM participation"):
            found.setdefault(round_, {})[client] = value
    return found


def test_real_clients_are_timed_and_share_the_work_of_a_round_by_their_speed(site: Site) -> None:
    directory = run(site, "--local-work", "dynamic", "--straggler-factor", "50")
    state = FileCheckpoints(directory / "checkpoints").load()
    assert state is not None
    assert set(state.pace) == set(site.names)
    assert all(0 < seconds < math.inf for seconds in state.pace.values())
    steps = members(directory, "num_steps")
    configured = steps.pop(1)
    for round_, dealt in steps.items():
        total = sum(int(str(count)) for count in dealt.values())
        assert abs(total - sum(int(str(count)) for count in configured.values())) <= len(dealt) / 2, round_
    assert {status for round_ in members(directory, "status").values() for status in round_.values()} == {"counted"}


def test_a_real_client_that_hangs_is_not_waited_for_longer_than_its_like_would_take(site: Site) -> None:
    """The timeout would be half an hour."""
    directory, (held, *others) = site.root / "deployed", site.names
    server = site.server(
        "--rounds", "2", "--run-dir", str(directory), "--straggler-factor", "2", "--quorum", str(len(others))
    )  # fmt: skip
    clients = [site.held_client(held, "hold@2"), *(site.client(name) for name in others)]
    assert server.end() == 0, server.text()
    summary = site.show(directory)
    assert statuses(summary, 2) == {held: "late", **dict.fromkeys(others, "counted")}
    assert "a quorum is enough (--straggler-factor)" in reason(summary, 2, held)
    site.release(2)
    assert [client.end() for client in clients] == [0] * len(clients)
