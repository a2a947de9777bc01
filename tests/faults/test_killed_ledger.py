"""A store that is killed at any point: what left is never more than its ledger says."""

import random
import signal
import sys
from collections import Counter

import pytest

from fedshelf.privacy.ledger_content import Release, read
from tests.processes import Site
from tests.recording_proxy import recording_proxy
from tests.released import sent

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize(
    ("points", "seed"), [(50, 1), pytest.param(1000, 2, marks=pytest.mark.long)], ids=["50 points", "1000 points"]
)
def test_what_left_a_killed_store_is_never_more_than_its_ledger_says(pair: Site, points: int, seed: int) -> None:
    server = pair.server("--rounds", "100000", "--val-fraction", "0.2", "--insecure", min_clients=1)
    rng, state = random.Random(seed), pair.root / "home" / "clients" / "store-1"
    told: dict[str, Release] = {}
    never_seen: set[str] = set()
    with recording_proxy(pair.address) as proxy:
        for _ in range(points):
            client = pair.start(
                sys.executable, "-m", "tests.dying_client", str(rng.randrange(1, 6000)), "--data-dir",
                str(pair.stores / "store-1"), "--server-address", proxy.address, "--insecure",
            )  # fmt: skip
            assert client.wait_for_death() == -signal.SIGKILL, client.text()
            proxy.wait_for_the_end()
            seen = sent(map(bytes, proxy.streams))
            releases = {release.digest: release for release in read(state).releases}  # read after what was seen
            assert seen.payloads.keys() | seen.crash_reports.keys() <= releases.keys()
            assert {digest for digest, blob in seen.blobs.items() if blob} <= {r.blob for r in releases.values()}
            new = [digest for digest, r in releases.items() if digest not in told and r.kind != "crash report"]
            too_many = [digest for digest in new if digest not in seen.payloads]
            assert too_many in ([], new[-1:]), "more than the one in flight"
            never_seen |= set(too_many)
            told = releases
        assert server.running(), server.text()
        kinds = Counter(release.kind for release in told.values())
        assert min(kinds[kind] for kind in ("join", "ready", "upload", "evaluation")) > 0
        assert all(
            release.digest in {**seen.payloads, **seen.crash_reports} for release in told.values() if release.is_sent
        )
