"""The guarantee of a run composes all that the server knows to have left, also in void attempts."""

from dataclasses import replace

import pytest

from fedshelf.core.errors import PolicyError
from fedshelf.core.events import ClientStatus, NoiseReported, Participation, RoundFinished, RoundVoid
from fedshelf.privacy.accounting import SampledGaussian, compose
from fedshelf.reporting.privacy_report import privacy_report

DELTA = 1e-5


def members(**statuses: ClientStatus) -> tuple[Participation, ...]:
    return tuple(Participation(client=name, status=status) for name, status in statuses.items())


def finished(number: int, **statuses: ClientStatus) -> RoundFinished:
    return RoundFinished(
        round=number, attempt=0, clients=members(**statuses), train_loss=None, accuracy=None, central_accuracy=None,
        central_loss=None, seconds=1.0, bytes_up=0, bytes_down=0, best_round=None,
    )  # fmt: skip


def noise(client: str, multiplier: float = 1.0, rate: float = 0.1, steps: int = 10) -> NoiseReported:
    return NoiseReported(client=client, noise_multiplier=multiplier, sampling_rate=rate, steps=steps)


COUNTED, LATE, REFUSED, OFFLINE = (
    ClientStatus.COUNTED, ClientStatus.LATE, ClientStatus.REFUSED, ClientStatus.OFFLINE,
)  # fmt: skip


def test_a_run_without_noise_has_no_guarantee() -> None:
    assert privacy_report({}, [finished(1, a=COUNTED)], [], delta=DELTA) is None


def test_the_least_protected_store_stands_for_the_run() -> None:
    rounds = [finished(number, a=COUNTED, b=COUNTED) for number in (1, 2)]
    report = privacy_report({"a": noise("a"), "b": noise("b", rate=0.3)}, rounds, [], delta=DELTA)
    assert report is not None
    assert report.client == "b"
    one = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.3, steps=10)
    assert report.guarantee.epsilon == pytest.approx(compose([one, one], DELTA).epsilon)
    assert report.guarantee.unit == "photo"


def test_late_refused_and_void_uploads_left_the_store_too() -> None:
    rounds = [finished(1, a=COUNTED), finished(2, a=LATE), finished(3, a=OFFLINE)]
    voids = [RoundVoid(round=2, attempt=0, reason="", clients=members(a=REFUSED))]
    report = privacy_report({"a": noise("a")}, rounds, voids, delta=DELTA)
    assert report is not None
    assert report.num_releases == {"a": 3}
    assert report.guarantee.epsilon == pytest.approx(compose([SampledGaussian(
        noise_multiplier=1.0, sampling_rate=0.1, steps=30)], DELTA).epsilon)  # fmt: skip


def test_a_task_that_a_store_refused_by_its_policy_released_nothing() -> None:
    refused = Participation(
        client="a", status=REFUSED, reason=str(PolicyError("its privacy budget does not allow this release"))
    )
    rounds = [finished(1, a=COUNTED), replace(finished(2), clients=(refused,))]
    report = privacy_report({"a": noise("a")}, rounds, [], delta=DELTA)
    assert report is not None
    assert report.num_releases == {"a": 1}


def test_every_attempt_at_a_model_with_noise_at_the_server_counts() -> None:
    voids = [RoundVoid(round=2, attempt=0, reason="", clients=())]
    report = privacy_report({"": noise("", steps=1)}, [finished(1), finished(2)], voids, delta=DELTA)
    assert report is not None
    record = report.to_record()
    assert record["unit"] == "client"
    assert record["client"] is None
    [release] = record["releases"]
    assert release.pop("rdp") == pytest.approx(report.guarantee.rdp)
    assert release == {
        "client": None, "releases": 3, "noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 3,
    }  # fmt: skip
    assert record["delta"] == DELTA
    assert record["assumptions"]


def test_a_store_that_reported_no_noise_is_named() -> None:
    report = privacy_report({"a": noise("a")}, [finished(1, a=COUNTED, b=COUNTED)], [], delta=DELTA)
    assert report is not None
    assert report.guarantee.assumptions[-1] == "Not covered, because they reported no noise: 'b'."
    covered = privacy_report({"a": noise("a")}, [finished(1, a=COUNTED)], [], delta=DELTA)
    assert covered is not None
    assert covered.guarantee.assumptions[-1].startswith("The noise is what each store reported.")


def test_where_it_is_known_who_takes_part_the_store_that_does_most_often_counts() -> None:
    rounds = [finished(1, a=COUNTED, b=COUNTED), finished(2, b=LATE), finished(3, c=COUNTED)]
    voids = [RoundVoid(round=3, attempt=0, reason="", clients=members(b=REFUSED))]
    report = privacy_report({"": noise("", rate=1.0, steps=1)}, rounds, voids, delta=DELTA)
    assert report is not None
    assert report.num_releases == {"": 3}
    secret = privacy_report({"": noise("", rate=0.5, steps=1)}, rounds, voids, delta=DELTA)
    assert secret is not None
    assert secret.num_releases == {"": 4}


def test_noise_of_the_stores_is_accounted_by_whole_orders_alone() -> None:
    found = replace(noise("", rate=1.0, steps=1), is_discrete=True)
    report = privacy_report({"": found}, [finished(1, a=COUNTED)], [], delta=DELTA)
    assert report is not None
    assert report.guarantee.pld is None
    assert report.guarantee.epsilon == report.rdp[""] > 0
    assert any("many stores as the threshold" in sentence for sentence in report.guarantee.assumptions)
