"""A store that withdraws is taken out of a finished run's model, and told so."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Site, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
RIDGE = ("--algorithm", "ridge", "--ridge-lambda", "0.01", "--rounds", "1", "--val-fraction", "0")


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "model" / "model.safetensors")
    return found


def test_a_store_that_withdraws_is_taken_out_of_the_model_and_told_so(site: Site) -> None:
    run = site.root / "run"
    server, clients = site.server(*RIDGE, "--run-dir", str(run)), site.clients()
    assert server.end() == 0, server.text()
    assert {name: client.end() for name, client in clients.items()} == dict.fromkeys(site.names, 0)
    leaving, *others = site.names

    server = site.server(*RIDGE, "--run-dir", str(run), "--extend", "1")
    clients = {name: site.client(name, *(["--withdraw"] if name == leaving else [])) for name in site.names}
    assert {name: client.end() for name, client in clients.items()} == dict.fromkeys(site.names, 0)
    assert server.end() == 0, server.text()
    assert f"{leaving}: the photos of this store are no longer in the model, as of round 2" in clients[leaving].text()
    assert statuses(site.show(run), 2) == {**dict.fromkeys(others, "counted"), leaving: "withdrawn"}
    assert [path.name for path in (run / "checkpoints").glob("round-*")] == ["round-000002.safetensors"]

    never, stores = site.root / "never", site.root / "stores"
    for name in others:
        shutil.copytree(site.stores / name, stores / name)
    site.stores = stores
    site.simulate(*RIDGE, run_dir=never)
    expected = weights(never)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_store_that_never_took_part_is_told_that_there_is_nothing_to_withdraw(pair: Site) -> None:
    server = pair.server(*RIDGE, min_clients=1)
    stays, leaves = pair.names
    client = pair.client(leaves, "--withdraw")
    client.wait_for_text("connected to")
    other = pair.client(stays)
    assert client.end() == 0
    assert f"{leaves}: no photo of this store is in the model, so there is nothing to withdraw" in client.text()
    assert other.end() == server.end() == 0, server.text()


def test_a_run_that_trains_does_not_let_a_store_withdraw(pair: Site) -> None:
    server = pair.server("--rounds", "1", "--val-fraction", "0", min_clients=1)
    stays, leaves = pair.names
    client = pair.client(leaves, "--withdraw")
    assert client.end() == 1
    assert "does not let this store withdraw: it wants to withdraw, and the algorithm of this run" in client.text()
    other = pair.client(stays)
    assert server.end() == other.end() == 0, server.text()
