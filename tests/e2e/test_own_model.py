"""A user's own model over the network: stores run it if they allow its name and have the same source."""

from pathlib import Path

import pytest

from tests.e2e.test_parity import three_ways
from tests.own_models import ARGUMENTS, RESNET10, write_resnet10
from tests.processes import Site, same_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_resnet10_as_an_own_model_equals_the_built_in_one_simulated_and_deployed(pair: Site) -> None:
    path = str(write_resnet10(pair.root / "models"))
    common = ("--rounds", "2", "--val-fraction", "0.1", "--personalize", "fedbn")
    _, alone, _ = three_ways(
        pair, *common, *ARGUMENTS, path, client_flags=("--model-path", path, "--allow-model", RESNET10)
    )
    pair.simulate(*common, run_dir=pair.root / "built-in")
    assert same_model(alone, pair.root / "built-in")


def test_a_store_that_does_not_allow_it_or_has_another_source_refuses_and_the_server_says_why(pair: Site) -> None:
    path, marked = str(write_resnet10(pair.root / "models")), pair.root / "imported"
    other = write_resnet10(pair.root / "other", width=9)
    (other / "ownnet" / "__init__.py").write_text(f"open({str(marked)!r}, 'w').close()\n")
    server = pair.server("--rounds", "1", *ARGUMENTS, path)
    first, second = pair.names
    good = ("--model-path", path, "--allow-model", RESNET10)
    clients = [pair.client(first, *good)]
    for reason, flags in (
        (f"--allow-model {RESNET10}", ("--model-path", str(other), "--policy", "open")),
        ("the source on this machine has the digest", ("--model-path", str(other), "--allow-model", RESNET10)),
    ):
        refused = pair.client(second, *flags)
        refused.wait_for_text("joining again in")
        assert reason in refused.text()
        assert any(reason in event["reason"] for event in server.events if event["event"] == "client_refused")
        refused.interrupt()
        refused.end()
        assert not marked.exists(), "a store runs nothing that it did not allow or that differs"
    clients.append(pair.client(second, *good))
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0, 0]


def test_a_refusal_names_no_path_of_the_store(pair: Site) -> None:
    server = pair.server("--rounds", "1", *ARGUMENTS, str(write_resnet10(pair.root / "models")), min_clients=1)
    refused = pair.client(pair.names[0], "--allow-model", RESNET10)
    event = server.wait_for("client_refused")
    refused.interrupt()
    refused.end()
    assert "there is no module 'ownnet'" in event["reason"]
    assert str(Path(pair.root)) not in event["reason"]
