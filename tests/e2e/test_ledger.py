"""A store's ledger says exactly what a proxy between it and the server has seen."""

import json
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from fedshelf.privacy.ledger import Ledger
from fedshelf.privacy.ledger_content import FILE, HEAD_FILE, read
from tests.processes import Process, Site
from tests.recording_proxy import RecordingProxy, recording_proxy
from tests.released import Sent, sent

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


ONE_ROUND = ("--rounds", "1", "--val-fraction", "0", "--insecure")


def state_dir(site: Site, name: str = "store-1") -> Path:
    return site.root / "home" / "clients" / name


def watched(site: Site, proxy: RecordingProxy, *arguments: str) -> Process:
    """A client of store-1 behind the proxy."""
    direct, site.address = site.address, proxy.address
    client = site.client("store-1", "--insecure", *arguments)
    site.address = direct
    return client


def check_equal(said: Path, seen: Sent) -> None:
    """The ledger has what was seen, byte for byte, and nothing else."""
    releases = read(said).releases
    assert all(release.is_sent for release in releases)
    assert {release.digest: release.num_bytes for release in releases} == {**seen.payloads, **seen.crash_reports}
    assert {release.blob for release in releases if release.blob} == set(seen.blobs)


def test_a_proxy_has_seen_what_the_ledger_says_byte_for_byte(pair: Site, drawn_test_photos: Path) -> None:
    server = pair.server(
        "--rounds", "2", "--val-fraction", "0.2", "--insecure", "--clip-norm", "1", "--codec-up", "int8",
        "--personalize", "finetune", "--warm-start", "ridge", "--run-dir", str(pair.root / "run"),
    )  # fmt: skip
    with recording_proxy(pair.address) as proxy:
        other = pair.client("store-2", "--insecure")
        client = watched(pair, proxy, "--test-dir", str(drawn_test_photos))
        assert [process.end() for process in (server, client, other)] == [0, 0, 0], client.text()
        proxy.wait_for_the_end()
    seen = sent(map(bytes, proxy.streams))
    check_equal(state_dir(pair), seen)
    content = read(state_dir(pair))
    purposes = Counter(release.purpose for release in content.releases)
    assert purposes == {"join": 1, "setup": 1, "closed-form": 2, "train": 2, "evaluate": 3, "compare": 1}
    assert {release.protections for release in content.releases if release.purpose == "train"} == {("clip-norm 1",)}
    assert {release.protections for release in content.releases if release.purpose != "train"} == {()}
    assert seen.heads == sorted(seen.heads)
    (signed,) = content.countersigned.values()
    assert signed.head.number == seen.heads[-1] >= content.head.number - 1

    printed = pair.fedshelf("audit-log")
    assert printed.end() == 0
    audit = [event for event in printed.events if event.get("store") == "store-1"]
    heads = [event["entry"] for event in audit if event["event"] == "ledger"]
    assert heads == sorted(set(seen.heads))
    uploads = {event["digest"] for event in audit if event["event"] == "upload"}
    assert uploads == set(seen.blobs)


def test_the_sums_of_an_exact_head_and_their_withdrawal_are_in_the_ledger(pair: Site) -> None:
    run = str(pair.root / "run")
    recipe = ("--algorithm", "ridge", "--ridge-lambda", "0.01", "--rounds", "1", "--val-fraction", "0", "--insecure",
              "--run-dir", run)  # fmt: skip
    server = pair.server(*recipe)
    with recording_proxy(pair.address) as proxy:
        other, client = pair.client("store-2", "--insecure"), watched(pair, proxy)
        assert [process.end() for process in (server, client, other)] == [0, 0, 0], server.text()
        proxy.wait_for_the_end()
        check_equal(state_dir(pair), sent(map(bytes, proxy.streams)))
        before = len(read(state_dir(pair)).releases)
        server = pair.server(*recipe, "--extend", "1")
        leaving, other = watched(pair, proxy, "--withdraw"), pair.client("store-2", "--insecure")
        assert [process.end() for process in (leaving, other, server)] == [0, 0, 0], leaving.text()
        proxy.wait_for_the_end()
    check_equal(state_dir(pair), sent(map(bytes, proxy.streams)))
    later = read(state_dir(pair)).releases[before:]
    assert [release.kind for release in later][:2] == ["join", "ready"]
    assert "upload" in {release.kind for release in later}


def test_a_crash_report_and_what_failed_are_in_the_ledger(pair: Site) -> None:
    log = pair.root / "sent.jsonl"
    server = pair.server("--rounds", "100000", "--val-fraction", "0", "--insecure", min_clients=1)
    with recording_proxy(pair.address) as proxy:
        pair.address = proxy.address
        odd = pair.odd_client("store-1", "--insecure", "--record", str(log), "--do", "fail@2")
        server.wait_for("upload_received", round=2, client="store-1", status="failed")
        odd.interrupt()
        odd.end()
        client = pair.client("store-1", "--insecure")
        server.wait_for("upload_received", round=2, client="store-1", status="counted")
        client.kill(signal.SIGSEGV)
        ending = "the process of store-1 was ended by SIGSEGV (a fault in native code)"
        server.wait_for("client_left", client="store-1", reason=ending)
        proxy.wait_for_the_end()
    seen = sent(map(bytes, proxy.streams))
    releases = read(state_dir(pair)).releases
    assert {*seen.payloads, *seen.crash_reports} <= {release.digest for release in releases}
    assert len(seen.crash_reports) == 1
    assert [release.kind for release in releases].count("crash report") == 1
    (failed,) = (release for release in releases if release.kind == "failure")
    assert (failed.purpose, failed.round) == ("failure", 2)
    # The process may have died with one answer on its way.
    assert sum(release.digest not in {**seen.payloads, **seen.crash_reports} for release in releases) <= 1


def test_a_store_whose_ledger_was_altered_sends_nothing(pair: Site) -> None:
    server = pair.server("--rounds", "1", "--val-fraction", "0", "--insecure", min_clients=1)
    client = pair.client("store-1", "--insecure")
    assert [process.end() for process in (server, client)] == [0, 0]
    folder = state_dir(pair)
    path = folder / Ledger(folder).path.name
    path.write_bytes(path.read_bytes().replace(b'"purpose": "train"', b'"purpose": "tarin"'))
    server = pair.server("--rounds", "1", "--val-fraction", "0", "--insecure", min_clients=1)
    with recording_proxy(pair.address) as proxy:
        pair.address = proxy.address
        client = pair.client("store-1", "--insecure")
        assert client.end() == 1
    assert "ledger.jsonl': entry 5 does not continue the log" in client.text()
    assert [bytes(stream) for stream in proxy.streams] == []


def test_a_store_whose_ledger_is_gone_sends_nothing(pair: Site) -> None:
    server, client = pair.server(*ONE_ROUND, min_clients=1), pair.client("store-1", "--insecure")
    assert [process.end() for process in (server, client)] == [0, 0]
    for name in (FILE, HEAD_FILE):
        (state_dir(pair) / name).unlink()
    client = pair.client("store-1", "--insecure")
    assert client.end() == 1
    assert "ledger.jsonl' is missing, although something has left this store" in client.text()
    verified = pair.fedshelf("privacy", "ledger", str(pair.stores / "store-1"), "--verify")
    assert verified.end() == 1
    assert "is missing" in verified.text()


def test_a_rolled_back_ledger_is_reported_at_headquarters_and_ends_the_client_before_an_upload(pair: Site) -> None:
    server, client = pair.server(*ONE_ROUND, min_clients=1), pair.client("store-1", "--insecure")
    assert [process.end() for process in (server, client)] == [0, 0]
    folder = state_dir(pair)
    shutil.copytree(folder, pair.root / "copy")
    server, client = pair.server(*ONE_ROUND, min_clients=1), pair.client("store-1", "--insecure")
    assert [process.end() for process in (server, client)] == [0, 0]
    shutil.rmtree(folder)
    (pair.root / "copy").rename(folder)
    before = len(read(folder).releases)
    server = pair.server(*ONE_ROUND, min_clients=1)
    for _ in range(2):
        client = pair.client("store-1", "--insecure")
        assert client.end() == 1
        assert "the newest one that the server had seen before" in client.text()
    assert "the ledger of 'store-1' went back: it ended at entry" in server.text()
    assert server.running()
    server.interrupt()
    server.end()
    entries = list(map(json.loads, (folder / FILE).read_text().splitlines()))
    assert len([entry for entry in entries if entry["event"] == "intended"]) == before  # the join is a known one
    verified = pair.fedshelf("privacy", "ledger", str(pair.stores / "store-1"), "--verify")
    assert verified.end() == 1
    assert "that the server had seen before" in verified.text()
    printed = pair.fedshelf("audit-log")
    assert printed.end() == 0
    assert [event["store"] for event in printed.events if event["event"] == "ledger went back"] == ["store-1"]


def test_a_full_disk_is_named_and_the_client_resumes_by_itself(pair: Site) -> None:
    server = pair.server("--rounds", "2", "--val-fraction", "0", "--insecure", min_clients=1)
    client = pair.odd_client("store-1", "--insecure", "--do", "hold@2", "--until", str(pair.root))
    client.wait_for("held", round=2)
    # From now on no file of this process may grow: what a full disk is to it, and needs no disk to fill.
    limits = resource.prlimit(client.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    pair.release(2)
    client.wait_for_text("takes no file of this size: lift it. This client tries again every 5 s")
    assert "nothing is sent, because it cannot be written to this store's ledger" in client.text()
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, limits)
    assert [process.end() for process in (server, client)] == [0, 0]
    told = client.text().partition("nothing is sent")[2]
    for words in ("waiting for the server", "trying again", "start again"):
        assert words not in told
    assert all(release.is_sent for release in read(state_dir(pair)).releases)


def test_each_release_names_the_server_that_it_went_to(pair: Site) -> None:
    server, client = pair.server(*ONE_ROUND, min_clients=1), pair.client("store-1", "--insecure")
    assert [process.end() for process in (server, client)] == [0, 0]
    (pair.root / "home" / "identity").rename(pair.root / "other-identity")  # as of another server
    for path in (state_dir(pair) / "keys").iterdir():
        path.unlink()
    server, client = pair.server(*ONE_ROUND, min_clients=1), pair.client("store-1", "--insecure")
    assert [process.end() for process in (server, client)] == [0, 0], client.text()
    joins = [release for release in read(state_dir(pair)).releases if release.kind == "join"]
    assert len(joins) == 2
    assert {release.server for release in joins} == {pair.address}
    assert len({release.chain for release in joins}) == 2
    assert all(len(release.chain) > 40 for release in joins)
