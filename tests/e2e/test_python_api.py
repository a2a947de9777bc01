"""`fedshelf.serve` and `fedshelf.join` in real processes, against `fedshelf.Federation`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fedshelf
from tests.api_process import RECIPE, own_training
from tests.processes import Process, Site, same_model, same_weights

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def call(site: Site, name: str, *own: str, **values: Any) -> Process:
    address = {"serve": {"address": site.address}, "join": {"server_address": site.address}}[name]
    return site.start(sys.executable, "-m", "tests.api_process", name, json.dumps({**address, **values}), *own)


def test_a_federation_by_serve_and_join_with_own_training_equals_a_simulated_one(
    pair: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed, simulated = pair.root / "deployed", pair.root / "simulated"
    server = call(pair, "serve", rounds=2, min_clients=2, run_dir=str(deployed))
    stores = [call(pair, "join", "own", data_dir=str(pair.stores / name), device="cpu") for name in pair.names]
    returned = server.wait_for("returned")
    assert returned == {"event": "returned", "status": "finished", "rounds": 2, "stores": pair.names}
    folders = [Path(store.wait_for("returned")["folder"]) for store in stores]
    assert [process.end() for process in (server, *stores)] == [0, 0, 0]
    monkeypatch.setenv("FEDSHELF_HOME", pair.environment["FEDSHELF_HOME"])
    fedshelf.Federation(pair.stores, local_training=own_training, device="cpu", run_dir=simulated, **RECIPE).run(
        2, progress=False
    )
    assert same_model(deployed, simulated)
    assert all(same_weights(folder, deployed / "model") for folder in folders)


def test_errors_are_raised_and_ctrl_c_returns(pair: Site) -> None:
    wrong = call(pair, "serve", round=2)
    assert wrong.wait_for("returned", error="UsageError")["message"].startswith("unknown keyword argument 'round'")
    server = call(pair, "serve", rounds=2, min_clients=2, run_dir=str(pair.root / "run"))
    server.wait_for_text("listening on")
    refused = call(pair, "join", data_dir=str(pair.root / "absent"))
    assert "no such folder" in refused.wait_for("returned", error="UsageError")["message"]
    waiting = call(pair, "join", data_dir=str(pair.stores / pair.names[0]))
    waiting.wait_for_text("waiting")
    for process in (waiting, server):
        process.interrupt()
    assert server.wait_for("returned")["status"] == "stopped"
    assert waiting.wait_for("returned")["folder"] == "None"
