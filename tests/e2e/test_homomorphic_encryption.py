"""Homomorphic encryption over real processes: the same bits as without, and processes that are killed."""

import pytest

from fedshelf.privacy.ledger_content import read
from tests.e2e.test_secure_aggregation import SMALL, digest, run
from tests.processes import Site, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_stores_send_only_encrypted_updates_and_the_model_has_the_same_bits_after_a_kill_of_the_server(
    site: Site,
) -> None:
    flags = (*SMALL, "--he", "--run-dir", str(site.root / "encrypted"))
    server = site.server(*flags)
    first, *others = site.names
    held = site.held_client(others[0], "hold@1")
    clients = {name: site.client(name) for name in site.names if name != others[0]}
    held.wait_for("held", round=1)
    server.kill()
    again = site.server(*flags)
    site.release(1)
    ends = [process.end() for process in (again, held, *clients.values())]
    assert ends == [0] * len(ends), again.text()
    run(site, "plain", "--codec-up", "modular:32", "--min-clients", str(len(site.names)))
    assert digest(site, "encrypted") == digest(site, "plain")
    shown = site.show(site.root / "encrypted")
    assert (shown["protections"], shown["codec_up"]) == (["he"], "modular:32")
    assert all(round_["train_loss"] is not None for round_ in shown["rounds"])
    assert {member["num_examples"] for round_ in shown["rounds"] for member in round_["clients"]} == {None}

    releases = read(site.root / "home" / "clients" / first).releases
    encrypted = [release for release in releases if release.kind == "upload" and release.protections == ("he",)]
    assert len(encrypted) >= 2
    assert {release.purpose for release in releases if release.kind == "encryptionreply"} == {"encryption"}
    opened = {name: site.root / "home" / "clients" / name / "opened-sums.jsonl" for name in site.names}
    assert [name for name, path in opened.items() if path.exists()] == [min(site.names)]


def test_a_store_that_decrypts_and_is_killed_comes_back_with_new_keys(site: Site) -> None:
    first = min(site.names)
    server = site.server(
        *SMALL, "--he", "--he-decryptor", first, "--quorum", str(len(site.names)), "--run-dir",
        str(site.root / "run"), "--round-timeout", "60",
    )  # fmt: skip
    clients = {name: site.client(name) for name in site.names if name != first}
    victim = site.held_client(first, "hold@1")
    victim.wait_for("held", round=1)
    victim.kill()
    clients[first] = site.client(first)
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients.values()] == [0] * len(clients)
    summary = site.show(site.root / "run")
    assert all(statuses(summary, number)[name] == "counted" for number in (1, 2) for name in site.names)


def test_fedbuff_with_encryption_finishes_a_run(site: Site) -> None:
    size = str(len(site.names))
    run(site, "fedbuff", "--algorithm", "fedbuff", "--buffer-size", size, "--he", "--he-decryptor", "any")
    shown = site.show(site.root / "fedbuff")
    assert shown["protections"] == ["he"]
    assert [round_["round"] for round_ in shown["rounds"]] == [1, 2]


def test_a_store_that_requires_encryption_takes_part_in_no_run_without_it(site: Site) -> None:
    (site.root / "policy.toml").write_text('[protection]\nrequired = "he"\nmin-cohort = 3\n')
    first, *others = site.names
    server = site.server(
        *SMALL, "--quorum", str(len(others)), "--run-dir", str(site.root / "run"), min_clients=len(others)
    )  # fmt: skip
    held = site.held_client(others[0], "hold@1")
    clients = [held, *(site.client(name) for name in others[1:])]
    held.wait_for("held", round=1)
    strict = site.client(first, "--policy", str(site.root / "policy.toml"))
    strict.wait_for_text("this run does not encrypt updates (--he)")
    site.release(1)
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0] * len(clients)
    strict.interrupt()
    strict.end()
