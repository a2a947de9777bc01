"""Clients that find their own batch size, as real processes."""

import json

import pytest

from tests.processes import Site, draw_stores

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_each_client_measures_once_trains_with_what_it_found_and_says_so(pair: Site) -> None:
    pair.stores = draw_stores(pair.root / "stores", num_stores=2, photos=12)
    run = pair.root / "run"
    server = pair.server(
        "--rounds", "2", "--batch-size", "2", "--dynamic-batch", "--lr-schedule", "constant", "--val-fraction", "0",
        "--run-dir", str(run),
    )  # fmt: skip
    clients = pair.clients("--policy", "open")  # with so few photos, steps are of two or four
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients.values()] == [0, 0]
    found = {}
    for name in pair.names:
        (kept,) = (pair.root / "home" / "clients").glob(f"{name}/batch-size.json")
        found[name] = json.loads(kept.read_text())["batch_size"]
    assert set(found.values()) <= {2, 4}, "a store of 36 photos: with 8 an epoch would have fewer than eight steps"
    for round_ in pair.show(run)["rounds"]:
        for client in round_["clients"]:
            size = found[client["client"]]
            assert (client["status"], client["batch_size"]) == ("counted", size)
            assert client["client_lr"] == pytest.approx(0.05 * size / 2)
