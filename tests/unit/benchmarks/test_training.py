"""How the samples of *pilot* and *chain* are compared."""

from benchmarks import training
from benchmarks.measure import Sample
from benchmarks.workloads import PILOT


def sample(seconds: float, losses: list[float], round_seconds: float) -> Sample:
    figures = {"train_loss": losses, "round_seconds": [round_seconds] * 2}
    return Sample(seconds=seconds, cpu_seconds=1.0, peak_mb=1.0, processes=1, first_step=None, figures=figures)


LOSSES = [3.8, 3.5, 3.4, 3.3, 3.2]
LIMIT = [sample(20.0, LOSSES, 4.0), sample(30.0, LOSSES, 5.0), sample(22.0, LOSSES, 4.0)]


def test_a_ratio_is_that_of_the_medians_of_wall_clock() -> None:
    found = training.figures_of(PILOT, [sample(s, LOSSES, 9.0) for s in (33.0, 10.0, 90.0)], LIMIT)
    assert (found.seconds, found.ratio, found.is_complete) == (33.0, 1.5, True)


def test_a_program_that_ran_fewer_rounds_is_compared_by_seconds_per_round() -> None:
    found = training.figures_of(PILOT, [sample(15.0, LOSSES[:1], 10.0)] * 3, LIMIT)
    assert (found.ratio, found.rounds, found.is_complete) == (2.5, 1, False)


def test_a_peer_that_did_other_work_is_reported_as_failed() -> None:
    samples = {
        "limit": LIMIT, "FedShelf": LIMIT, "good": [sample(1.0, LOSSES[:2], 1.0)] * 3,
        "sometimes bad": [*LIMIT[:2], sample(1.0, [3.7, 3.5], 1.0)],
    }  # fmt: skip
    failed = {"slow": "timed out"}
    assert list(training.peer_loss_differences(samples, failed)) == ["good"]
    assert failed["slow"] == "timed out"
    assert "differ by 0.1 in the first round" in failed["sometimes bad"]
