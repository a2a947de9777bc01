"""Real client processes that send what they should not: refused, named, and of no effect on the others."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedshelf.rounds.membership import MAX_FAILURES
from tests.processes import Site, draw_stores, reason, same_model, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@dataclass(frozen=True)
class Case:
    """What the hostile client does in a round, and what the run database shall say of it."""

    oddity: str
    status: str
    reason: str


CASES = (
    Case("nan", "refused", "its delta holds nan in tensor"),
    Case("wrong-shape", "refused", "its delta has shape"),
    Case("stale", "refused", "stale or of another run"),
    Case("other-run", "refused", "stale or of another run"),
    Case("no-examples", "refused", "it claims 0 examples"),
    Case("infinite-loss", "refused", "train_loss: Input should be a finite number"),
    Case("digits-as-text", "refused", "num_steps: Input should be a valid integer"),
    Case("huge-auxiliary", "refused", "it carries the vectors ['control'], the algorithm declares []"),
    Case("truncated", "refused", "its blob did not arrive: truncated or altered"),
    Case("fail", "failed", "OSError: No space left on device"),
    Case("long-reason", "failed", "blah blah"),
)


@pytest.mark.parametrize("first", range(0, len(CASES), MAX_FAILURES))
def test_hostile_uploads_are_refused_by_name_and_change_not_one_bit(site: Site, first: int) -> None:
    """The last of three in a row excludes the client: a run has no more."""
    cases = CASES[first : first + MAX_FAILURES]
    common = ("--rounds", str(len(cases)), "--val-fraction", "0")
    run, without = site.root / "run", site.root / "without"
    server = site.server(*common, "--quorum", "3", "--run-dir", str(run))
    orders = [part for number, case in enumerate(cases, 1) for part in ("--do", f"{case.oddity}@{number}")]
    clients = [*(site.client(name) for name in site.names[:3]), site.odd_client("store-4", *orders)]
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0, 0, 0, 0], "an excluded client stays connected"
    assert "Traceback" not in server.text()

    summary = site.show(run)
    for number, case in enumerate(cases, 1):
        found = statuses(summary, number)
        assert found == dict.fromkeys(site.names[:3], "counted") | {"store-4": case.status}, case
        assert case.reason in reason(summary, number, "store-4"), case
        assert len(reason(summary, number, "store-4")) <= 2000
    assert summary["void_rounds"] == 0

    site.stores = draw_stores(site.root / "stores", num_stores=4)  # the same photos, and one store fewer
    (site.stores / "store-4").rename(site.root / "left-out")
    site.simulate(*common, "--min-clients", "3", run_dir=without)
    assert same_model(run, without)


def test_a_claim_of_a_million_million_photos_weighs_no_more_than_the_cap(pair: Site) -> None:
    common = ("--rounds", "1", "--val-fraction", "0", "--max-examples", "10")  # less than either store has
    run, honest = pair.root / "run", pair.root / "honest"
    server = pair.server(*common, "--run-dir", str(run))
    clients = [pair.odd_client("store-1", "--do", "greedy"), pair.client("store-2")]
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0, 0]
    pair.simulate(*common, run_dir=honest)
    assert same_model(run, honest)
    (round_,) = pair.show(run)["rounds"]
    assert [client["num_examples"] for client in round_["clients"]] == [10, 10]


def rss(pid: int, what: str) -> int:
    """Bytes of memory of a process: VmRSS now, or VmHWM at most so far."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_introductions_beyond_all_measure_are_refused_with_the_limit_and_cost_the_server_little(pair: Site) -> None:
    server = pair.server("--rounds", "1", "--run-dir", str(pair.root / "run"))
    server.wait_for_text("listening on")
    before = rss(server.pid, "VmRSS")
    reasons = {
        "no-classes": "it names no product",
        "deep": "a class folder lies 1,500 folders deep, 32 is the most",
        "many": "bytes long; 4,194,304 is the most",
        "long-names": "path: String should have at most 32768 characters",
    }
    odd = pair.odd_client("store-1", *(part for kind in reasons for part in ("--join", kind)))
    for kind, why in reasons.items():
        assert why in odd.wait_for("refused", join=kind)["reason"]
    assert rss(server.pid, "VmHWM") - before < 100 << 20
    honest = pair.client("store-2")
    assert server.end() == 0, server.text()
    assert [odd.end(), honest.end()] == [0, 0]
    assert "Traceback" not in server.text()


def test_a_store_that_brings_thousands_of_products_of_its_own_holds_the_start_up_until_it_is_gone(pair: Site) -> None:
    server = pair.server("--rounds", "1", "--run-dir", str(pair.root / "run"))
    first = pair.client("store-1")
    flood = pair.odd_client("store-2", "--join", "most-that-are-allowed")
    server.wait_for_text("the catalogue is not frozen, because 'store-2' alone brings 20,000 of its")
    server.wait_for_text("--confirm-catalogue; otherwise stop that store")
    flood.interrupt()
    flood.end()
    second = pair.client("store-2")
    assert server.end() == 0, server.text()
    assert [first.end(), second.end()] == [0, 0]
    assert len(json.loads((pair.root / "run" / "catalogue.json").read_text())["classes"]) == 4


def test_one_of_four_that_always_fails_is_excluded_and_the_others_finish(site: Site) -> None:
    """In training, and in evaluation where its uploads count."""
    common = ("--rounds", "5", "--val-fraction", "0.2", "--quorum", "4")
    run = site.root / "run"
    server = site.server(*common, "--run-dir", str(run))
    honest = [site.client(name) for name in site.names[:3]]
    odd = site.odd_client("store-4", "--do", "fail")
    assert server.end() == 0, server.text()
    assert [client.end() for client in (*honest, odd)] == [0, 0, 0, 0]
    summary = site.show(run)
    assert summary["void_rounds"] == 3
    excluded = server.wait_for("client_excluded", client="store-4")
    assert "3 times in a row" in excluded["reason"]
    assert excluded["last_round"] == 11
    assert all(statuses(summary, number) == dict.fromkeys(site.names[:3], "counted") for number in range(1, 6))


def test_an_upload_that_destroys_the_model_costs_its_client_ten_rounds_and_the_others_nothing(site: Site) -> None:
    """Uploads of 1e30, at first where an automatic norm bound holds, and then where none does."""
    run, unbounded = site.root / "run", site.root / "unbounded"
    common = ("--rounds", "5", "--val-fraction", "0.2")
    orders = [part for order in ("destroy@1", *(f"fail-evaluation@{n}" for n in "234")) for part in ("--do", order)]
    server = site.server(*common, "--run-dir", str(run))
    clients = [*(site.client(name) for name in site.names[:3]), site.odd_client("store-4", *orders)]
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0] * 4
    summary = site.show(run)
    assert reason(summary, 1, "store-4").startswith("norm bounded: trainable from")
    assert statuses(summary, 4)["store-4"] == "counted"
    assert "no memory for that (3 times in a row)" in server.wait_for("client_excluded", client="store-4")["reason"]
    assert statuses(summary, 5) == dict.fromkeys(site.names[:3], "counted")
    assert is_sane(run)

    server = site.server(*common, "--norm-bound", "off", "--run-dir", str(unbounded))
    clients = [*(site.client(name) for name in site.names[:3]), site.odd_client("store-4", "--do", "destroy@2")]
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0] * 4
    summary = site.show(unbounded)
    assert "the model is destroyed" in reason(summary, 2, "store-4")
    assert server.wait_for("client_excluded", client="store-4")["last_round"] == 12
    assert summary["void_rounds"] == 0, "the others need not train again"
    assert statuses(summary, 3) == dict.fromkeys(site.names[:3], "counted")
    assert is_sane(unbounded)


def is_sane(run: Path) -> bool:
    """Whether no checkpoint and no model of a run holds huge values."""
    files = [*(run / "checkpoints").glob("*.safetensors"), run / "model" / "model.safetensors"]
    vectors = [vector.float() for file in files for vector in load_file(file).values() if vector.numel()]
    return len(files) > 1 and all(float(vector.abs().max()) < 1e4 for vector in vectors)


def test_an_honest_client_of_a_run_that_fails_exits_with_the_reason_and_1(site: Site) -> None:
    """Two of three destroy the model again and again: nobody can tell who is right."""
    run = site.root / "run"
    server = site.server("--rounds", "1", "--val-fraction", "0", "--run-dir", str(run), min_clients=3)
    odd = [site.odd_client(name, "--do", "destroy") for name in site.names[1:3]]
    honest = site.client("store-1")
    assert server.end() == 1
    assert honest.end() == 1
    for process in (server, honest):
        assert "void 10 times in a row" in process.text()
        assert "Traceback" not in process.text()
    assert [client.end() for client in odd] == [0, 0]
    assert not list((run / "checkpoints").glob("*.safetensors"))
