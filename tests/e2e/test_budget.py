"""A store's privacy budget over real processes: what its ledger says, and a store that stops while the others go on."""

import json

import pytest

from fedshelf.privacy.accounting import SampledGaussian, compose
from fedshelf.privacy.ledger_content import Release, read
from tests.processes import Site, reason, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NOISE = ("--dp", "sample", "--noise-multiplier", "2", "--norm", "group", "--val-fraction", "0")
POLICY = """
[protection]
required = "sample-dp"
epsilon = {epsilon}
[limits]
min-photos-per-step = 1
"""


def uploads(site: Site, name: str) -> list[Release]:
    content = read(site.root / "home" / "clients" / name)
    return [release for release in content.releases if release.kind == "upload"]


def epsilon_of(releases: list[Release]) -> float:
    return compose([SampledGaussian.from_json(release.mechanism) for release in releases], 1e-5).epsilon


def test_a_store_stops_before_its_budget_is_exceeded_and_the_run_goes_on(site: Site) -> None:
    run = site.root / "run"
    first, *others = site.names
    (site.root / "open.toml").write_text(POLICY.format(epsilon=1000))
    measured = site.server("--rounds", "2", *NOISE, "--run-dir", str(site.root / "measured"))
    clients = [site.client(name, "--policy", str(site.root / "open.toml")) for name in site.names]
    assert [process.end() for process in (measured, *clients)] == [0] * (1 + len(clients))
    spent = epsilon_of(uploads(site, first))
    assert uploads(site, first)[-1].epsilon == pytest.approx(spent)
    assert "noise 2 in" in uploads(site, first)[-1].protections[0]

    (site.root / "tight.toml").write_text(POLICY.format(epsilon=spent * 1.3))
    server = site.server("--rounds", "4", *NOISE, "--quorum", str(len(others)), "--run-dir", str(run))
    clients = [site.client(name, "--policy", str(site.root / "open.toml")) for name in others]
    clients.append(site.client(first, "--policy", str(site.root / "tight.toml")))
    assert [process.end() for process in (server, *clients)] == [0] * (1 + len(clients)), server.text()

    summary = site.show(run)
    assert [set(statuses(summary, number).values()) for number in (3, 4)] != [{"counted"}] * 2
    refused = next(number for number in (1, 2, 3, 4) if statuses(summary, number).get(first) == "refused")
    why = "this store's policy does not allow it: its privacy budget does not allow this release"
    assert why in reason(summary, refused, first)
    assert [(entry["client"], entry["reason"].startswith(why)) for entry in summary["refused"]] == [(first, True)]
    assert all(statuses(summary, number)[name] == "counted" for number in (1, 2, 3, 4) for name in others)
    assert spent < epsilon_of(uploads(site, first)) <= spent * 1.3  # both runs together
    assert len(uploads(site, others[0])) == 6

    privacy = site.show(run)["privacy"]
    assert privacy["unit"] == "photo"
    assert privacy["epsilon"] == pytest.approx(epsilon_of(uploads(site, privacy["client"])[2:]))
    assert json.dumps(privacy["assumptions"])


def test_a_policy_that_requires_noise_refuses_a_run_without_it_and_one_that_came_after(pair: Site) -> None:
    (pair.root / "policy.toml").write_text(POLICY.format(epsilon=100))
    plain = pair.server("--rounds", "1", "--run-dir", str(pair.root / "plain"))
    clients = pair.clients()
    assert [process.end() for process in (plain, *clients.values())] == [0, 0, 0]
    run = pair.root / "noised"
    server = pair.server("--rounds", "1", *NOISE, "--quorum", "1", "--run-dir", str(run))
    first, other = pair.names
    processes = [server, pair.client(first, "--policy", str(pair.root / "policy.toml")), pair.client(other)]
    assert [process.end() for process in processes] == [0, 0, 0], server.text()
    assert statuses(pair.show(run), 1) == {first: "refused", other: "counted"}
    told = reason(pair.show(run), 1, first)
    assert told.endswith("its privacy budget does not allow this release. The store's own log says more")
    assert "left without noise (train), so that no ε bounds what has left for 365 days" in processes[1].text()


def test_another_name_for_the_same_photos_has_the_same_budget(pair: Site) -> None:
    (pair.root / "open.toml").write_text(POLICY.format(epsilon=1000))
    first, _ = pair.names
    one = ("--rounds", "1", *NOISE)
    server = pair.server(*one, "--run-dir", str(pair.root / "first"), min_clients=1)
    client = pair.client(first, "--policy", str(pair.root / "open.toml"))
    assert [process.end() for process in (server, client)] == [0, 0]
    spent = epsilon_of(uploads(pair, first))

    for name, state in (("alias", ()), ("alias-2", ("--state-dir", str(pair.root / "elsewhere")))):
        server = pair.server(*one, "--run-dir", str(pair.root / name), min_clients=1)
        client = pair.client(first, "--name", name, *state, "--policy", str(pair.root / "open.toml"))
        assert [process.end() for process in (server, client)] == [0, 0], client.text()
    before = uploads(pair, first)
    for state_dir in (pair.root / "home" / "clients" / "alias", pair.root / "elsewhere"):
        (release,) = (release for release in read(state_dir).releases if release.kind == "upload")
        before.append(release)
        assert release.epsilon == pytest.approx(epsilon_of(before))
        assert release.delta == 1e-5

    (pair.root / "tight.toml").write_text(POLICY.format(epsilon=spent * 1.01))
    run = pair.root / "refused"
    server = pair.server("--rounds", "1", *NOISE, "--run-dir", str(run), min_clients=1)
    client = pair.client(first, "--name", "alias-3", "--policy", str(pair.root / "tight.toml"))
    client.wait_for_text("and the budget is epsilon")
    server.interrupt()
    client.interrupt()
    server.end()
    client.end()
    assert not uploads(pair, "alias-3")
    kinds = {release.kind for release in read(pair.root / "home" / "clients" / "alias-3").releases}
    assert kinds == {"join", "ready", "refusal"}
