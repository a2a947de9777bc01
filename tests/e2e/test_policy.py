"""Each rule of a policy refuses, over real processes, with a sentence that headquarters sees; the others go on."""

import json
from pathlib import Path

import pytest

from fedshelf.deploy.tls import certificate_fingerprint
from tests.e2e.test_what_leaves_a_store import model_size, recorded, store_of
from tests.leaks import leaks
from tests.processes import CLASSES, Process, Site, draw_stores, reason, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

POLICIES = {
    "store-2": "[metrics]\nclass-names = false\nexample-counts = false\nlosses = false",
    "store-3": "[purposes]\nevaluate = false\ncompare = false",
    "store-4": "[protection]\nmin-cohort = 6",
    "store-5": "[purposes]\ntrain = false",
    "store-6": '[models]\nallow = ["resnet18"]\n[limits]\nmax-threads = 1\n[protection]\nrequired = "sample-dp"',
    "store-7": '[protection]\nrequired = "secagg"',
    "store-8": "[limits]\nmax-local-steps = 1",
}
SAYS = "this store's policy does not allow it: "
AT_SETUP = {
    "store-6": "model 'resnet10' is none of those allowed (resnet18); required = 'sample-dp', and this run adds no "
    "noise at the stores (--dp sample)",
    "store-7": "required = 'secagg', which this version of FedShelf cannot do: this store takes part in no run",
    "store-8": "its local epochs have more steps than max-local-steps = 1",
}
IN_ROUNDS = {
    "store-4": "the server may use the updates of 2 stores: min-cohort = 6",
    "store-5": "this store does not train: train = false",
}


def client(site: Site, name: str, *arguments: str) -> Process:
    policy = site.root / f"{name}.toml"
    policy.write_text(POLICIES.get(name, ""))
    return site.client(name, "--policy", str(policy), *arguments)


@pytest.fixture
def chain(site: Site, tmp_path: Path) -> Site:
    """The machine of eight stores, and a catalogue."""
    site.stores = draw_stores(tmp_path / "eight", num_stores=8)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return site


def test_each_rule_refuses_with_a_sentence_that_headquarters_sees(chain: Site) -> None:
    run = chain.root / "run"
    server = chain.server(
        "--rounds", "2", "--catalogue", str(chain.root / "classes.txt"), "--weights", "equal", "--val-fraction", "0.2",
        "--quorum", "2", "--compare", "--run-dir", str(run), min_clients=5,
    )  # fmt: skip
    clients = {name: client(chain, name) for name in chain.names}
    for name, sentence in AT_SETUP.items():
        assert server.wait_for("client_refused", client=name)["reason"] == SAYS + sentence
    assert server.end() == 0
    assert [clients[f"store-{number}"].end() for number in (1, 2, 3, 4, 5)] == [0] * 5
    assert all(clients[name].running() for name in AT_SETUP), "the next run may be one that they allow"

    shown = chain.show(run)
    for number in (1, 2):
        found = statuses(shown, number)
        assert {found[f"store-{counted}"] for counted in (1, 2, 3)} == {"counted"}
        assert {found[name] for name in IN_ROUNDS} == {"refused"}
        assert {name: reason(shown, number, name) for name in IN_ROUNDS} == {n: SAYS + s for n, s in IN_ROUNDS.items()}
    told = {entry["client"]: entry["reason"] for entry in shown["refused"]}
    assert {name: told[name] for name in AT_SETUP} == {name: SAYS + sentence for name, sentence in AT_SETUP.items()}
    assert {name: told[name] for name in IN_ROUNDS} == {name: SAYS + sentence for name, sentence in IN_ROUNDS.items()}
    assert told["store-3"] == f"{SAYS}this store compares no models: compare = false", "the newest"
    compared = {store["client"]: store["best"] for store in shown["stores"]}
    assert compared["store-3"] is None
    assert compared["store-1"] is not None

    (last,) = (event for event in server.events if event["event"] == "stores_compared")
    reasons = {store["client"]: store["reason"] for store in last["stores"]}
    assert reasons["store-3"] == f"{SAYS}this store compares no models: compare = false"
    refused = [event for event in server.events if event["event"] == "client_refused" and event["client"] == "store-3"]
    assert [event["reason"] for event in refused] == [
        f"its evaluation is not used: {SAYS}this store evaluates no models: evaluate = false",
        f"{SAYS}this store compares no models: compare = false",
    ], "each told once, not in each round"
    for name, sentence in IN_ROUNDS.items():
        assert f"of the server, the last one because {SAYS}{sentence}" in clients[name].text()
    assert "since it was started: it refused what it was asked for" in clients["store-5"].text()


def test_a_store_tells_no_figure_that_it_withholds_and_the_run_copes(chain: Site) -> None:
    run, log = chain.root / "run", chain.root / "sent.jsonl"
    server = chain.server(
        "--rounds", "2", "--catalogue", str(chain.root / "classes.txt"), "--weights", "equal", "--patience", "5",
        "--compare", "--run-dir", str(run), min_clients=2,
    )  # fmt: skip
    policy = chain.root / "store-2.toml"
    policy.write_text(POLICIES["store-2"])
    watched = chain.odd_client("store-2", "--policy", str(policy), "--record", str(log))
    other = chain.client("store-3", "--policy", str(policy))
    assert [process.end() for process in (server, watched, other)] == [0, 0, 0]
    messages = recorded(log)
    store = store_of(chain.stores / "store-2", model_size(chain))
    assert [leaks(message, store) for message in messages] == [[]] * len(messages)
    fields = [json.loads(message["header"]["json"]) for message in messages if "header" in message]
    assert {message["kind"] for message in fields} == {"join", "ready", "upload", "comparison"}
    for message in fields:
        for name in (
            "num_train",
            "num_validation",
            "num_left_out",
            "num_examples",
            "num_steps",
            "train_loss",
            "seconds",
        ):
            assert message.get(name) is None
        assert not message.get("classes")
        assert not message.get("accuracies")
    assert not any(name in json.dumps(fields) for name in CLASSES)

    shown = chain.show(run)
    assert [(r["train_loss"], r["accuracy"]) for r in shown["rounds"]] == [(None, None)] * 2
    assert {c["num_examples"] for r in shown["rounds"] for c in r["clients"]} == {None}
    assert (shown["best_round"], shown["products"]) == (None, [])
    text = chain.fedshelf("runs", "show", str(run))
    assert text.end() == 0
    assert (run / "model" / "model.safetensors").exists()


def test_a_run_that_needs_what_a_store_withholds_is_refused(pair: Site) -> None:
    server = pair.server("--rounds", "1", min_clients=2)
    (pair.root / "names.toml").write_text("[metrics]\nclass-names = false\n")
    (pair.root / "counts.toml").write_text("[metrics]\nexample-counts = false\n")
    first = pair.client("store-1", "--policy", str(pair.root / "names.toml"), "--name", "nameless")
    assert "start the server with --catalogue FILE" in server.wait_for("client_refused", client="nameless")["reason"]
    first.kill()
    others = [pair.client("store-1"), pair.client("store-2", "--policy", str(pair.root / "counts.toml"))]
    told = server.wait_for("client_refused", client="store-2")["reason"]
    assert told.startswith(SAYS + "this run needs the store's number of photos")
    assert "--weights equal" in told
    for process in (server, *others):
        process.interrupt()
        process.end()


def test_a_store_works_for_no_server_but_those_that_its_policy_names(pair: Site) -> None:
    server = pair.server("--rounds", "1", min_clients=1)
    server.wait_for_text("In each")
    authority = certificate_fingerprint(pair.root / "home" / "tls" / "ca.pem")
    for rule, flags, sentence in (
        ('addresses = ["10.0.0.1:8080"]', (), "is none of addresses = 10.0.0.1:8080"),
        (f'authorities = ["{"ab" * 32}"]', (), f"but the one with the fingerprint {authority}"),
        (f'authorities = ["{authority}"]', ("--insecure",), "but none alone: give --ca or --token"),
    ):
        (pair.root / "server.toml").write_text(f"[server]\n{rule}\n")
        refused = pair.client("store-1", "--policy", str(pair.root / "server.toml"), *flags)
        assert refused.end() == 1
        assert sentence in refused.text()
    (pair.root / "server.toml").write_text(f'[server]\naddresses = ["{pair.address}"]\nauthorities = ["{authority}"]\n')
    policy = str(pair.root / "server.toml")
    explained = pair.fedshelf("privacy", "explain", "--policy", policy, "--server", pair.address, "--json")
    assert explained.end() == 0
    record = json.loads("".join(event["text"] for event in explained.events))
    assert record["server"] == {"address": pair.address, "authority": authority, "problem": None}
    allowed = pair.client("store-1", "--policy", policy)
    assert [server.end(), allowed.end()] == [0, 0]
