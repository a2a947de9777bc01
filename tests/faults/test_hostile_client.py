"""Real client processes that send what they should not: refused, named, and of no effect on the others."""

from dataclasses import dataclass

import pytest

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
    Case("infinite-loss", "refused", ""),
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
    assert [client.end() for client in clients] == [0, 0, 0, int(len(cases) == MAX_FAILURES)]
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
