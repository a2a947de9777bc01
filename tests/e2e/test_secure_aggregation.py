"""Secure aggregation over real processes: the same bits as without masks, and a store that is killed."""

import json

import pytest

from fedshelf.privacy.ledger_content import read
from tests.processes import Site, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SMALL = ("--rounds", "2", "--no-compare", "--norm", "group")


def digest(site: Site, name: str) -> bytes:
    return (site.root / name / "model" / "model.safetensors").read_bytes()


def run(site: Site, name: str, *flags: str) -> None:
    server = site.server(*SMALL, *flags, "--run-dir", str(site.root / name))
    clients = site.clients()
    ends = [process.end() for process in (server, *clients.values())]
    assert ends == [0] * len(ends), [process.text() for process in (server, *clients.values())]


def test_stores_send_only_masked_updates_and_the_model_has_the_same_bits(site: Site) -> None:
    run(site, "masked", "--secagg")
    run(site, "plain", "--codec-up", "modular:32", "--min-clients", str(len(site.names)))
    assert digest(site, "masked") == digest(site, "plain")
    shown = site.show(site.root / "masked")
    assert (shown["protections"], shown["codec_up"]) == (["secagg"], "modular:32")
    assert all(round_["train_loss"] is not None for round_ in shown["rounds"])
    other = site.show(site.root / "plain")
    assert [found["accuracy"] for found in shown["rounds"]] == [found["accuracy"] for found in other["rounds"]]
    assert None not in [found["accuracy"] for found in shown["rounds"]], "it needs no --test-dir"
    assert {member["accuracy"] for round_ in shown["rounds"] for member in round_["clients"]} == {None}
    assert (shown["products"], shown["products_on"]) == (other["products"], "validation photos")
    assert shown["products"]
    assert {member["num_examples"] for round_ in shown["rounds"] for member in round_["clients"]} == {None}

    state_dir = site.root / "home" / "clients" / site.names[0]
    (uploads, replies, evaluations) = (
        [r for r in read(state_dir).releases if r.kind == kind] for kind in ("upload", "maskingreply", "evaluation")
    )
    masked = [release for release in uploads if release.protections]
    assert [release.protections for release in masked] == [("secagg",)] * 2
    assert [release.protections for release in evaluations if release.protections] == [("secagg",)] * 2
    assert [release.purpose for release in replies] == ["masking"] * 16
    card = json.loads((state_dir / "model" / "model_card.json").read_text())
    assert card["metrics"]["accuracy"] is not None, "the store knows its own figures"
    lines = (state_dir / "opened-sums.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all(name in lines[0] for name in site.names)


def test_stores_add_the_noise_of_the_sum_and_note_that_in_their_ledgers(site: Site) -> None:
    run(site, "noisy", "--secagg", "--dp", "client", "--noise-at", "stores", "--target-epsilon", "8")
    shown = site.show(site.root / "noisy")
    assert shown["protections"] == ["dp client", "noise-at stores", "secagg"]
    assert 7.9 < shown["privacy"]["epsilon"] <= 8
    assert shown["privacy"]["unit"] == "client"
    assert {round_["train_loss"] for round_ in shown["rounds"]} == {None}
    releases = read(site.root / "home" / "clients" / site.names[0]).releases
    masked = [release for release in releases if release.kind == "upload"]
    assert [release.protections for release in masked] == [("clip-norm adaptive", "noise-at stores", "secagg")] * 2


def test_a_store_that_is_killed_in_a_round_is_left_out_and_the_others_finish_it(site: Site) -> None:
    first, *others = site.names
    server = site.server(
        *SMALL, "--secagg", "--secagg-threshold", str(len(others)), "--quorum", str(len(others)), "--run-dir",
        str(site.root / "run"), "--round-timeout", "60",
    )  # fmt: skip
    clients = {name: site.client(name) for name in others}
    victim = site.held_client(first, "hold@1")
    server.wait_for("round_started", round=1)
    victim.wait_for("held", round=1)
    victim.kill()
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients.values()] == [0] * len(others)
    summary = site.show(site.root / "run")
    assert statuses(summary, 1)[first] != "counted"
    assert all(statuses(summary, number)[name] == "counted" for number in (1, 2) for name in others)


def test_stores_that_pin_the_roster_key_trust_a_store_that_is_enrolled_after_they_joined(site: Site) -> None:
    server = site.server(*SMALL, "--secagg", "--run-dir", str(site.root / "run"))
    server.wait_for_text("listening on")
    key = site.fedshelf("enroll", "key")
    assert key.end() == 0, key.text()
    (site.root / "policy.toml").write_text(f'[server]\nroster-key = "{key.events[-1]["text"].strip()}"\n')
    pinned = ("--policy", str(site.root / "policy.toml"))
    *early, last = site.names
    clients = [site.client(name, *pinned) for name in early]
    for client in clients:
        client.wait_for_text("connected to")
    clients.append(site.client(last, *pinned))
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0] * len(clients)
    summary = site.show(site.root / "run")
    assert summary["void_rounds"] == 0
    assert all(statuses(summary, number) == dict.fromkeys(site.names, "counted") for number in (1, 2))
    assert not any("invents other stores" in client.text() for client in clients)


def test_a_store_that_requires_masks_takes_part_in_no_run_without_them(site: Site) -> None:
    (site.root / "policy.toml").write_text('[protection]\nrequired = "secagg"\nmin-cohort = 3\n')
    first, *others = site.names
    server = site.server(
        *SMALL, "--quorum", str(len(others)), "--run-dir", str(site.root / "run"), min_clients=len(others)
    )  # fmt: skip
    held = site.held_client(others[0], "hold@1")
    clients = [held, *(site.client(name) for name in others[1:])]
    held.wait_for("held", round=1)
    strict = site.client(first, "--policy", str(site.root / "policy.toml"))
    strict.wait_for_text("this run does not mask updates (--secagg)")
    site.release(1)
    assert server.end() == 0, server.text()
    assert [client.end() for client in clients] == [0] * len(clients)
    strict.interrupt()
    strict.end()
    told = {entry["client"]: entry["reason"] for entry in site.show(site.root / "run")["refused"]}
    assert "required = 'secagg', and this run does not mask updates" in told[first]
    run(site, "masked", "--secagg")
