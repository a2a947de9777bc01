"""Noise that protects little is told when a run begins to use it, once."""

import logging

import pytest

from fedshelf.core.messages import Mechanism
from fedshelf.rounds.reported_noise import ReportedNoise
from tests.fakes import RecordingSink


def mechanism(noise: float, steps: int = 10) -> Mechanism:
    return Mechanism(noise_multiplier=noise, sampling_rate=0.1, steps=steps)


@pytest.mark.parametrize(
    ("noise", "delta", "size", "said"),
    [
        (4.0, 1e-5, 64, []),
        (0.3, 1e-5, 64, ["the noise hardly protects each photo of 'a': ε will be"]),
        (0.0, 1e-5, None, ["the noise hardly protects each photo of 'a': ε will be inf"]),
        (4.0, 0.5, 64, ["--delta 0.5 is not below 1 / 64, the number of photos of 'a'"]),
    ],
)
def test_weak_noise_is_told(
    noise: float, delta: float, size: int | None, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reported = ReportedNoise(RecordingSink(), delta=delta, num_rounds=5)
    with caplog.at_level(logging.WARNING):
        reported.note("a", mechanism(noise), size=size)
        reported.note("b", mechanism(noise), size=size)
    assert len(caplog.messages) == len(said)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, said, strict=True))


def test_noise_that_drowns_what_stores_send_is_told(caplog: pytest.LogCaptureFixture) -> None:
    reported = ReportedNoise(RecordingSink())
    reported.warn_of_volume(5.0)
    assert caplog.messages == []
    reported.warn_of_volume(90.0)
    assert "the noise in the mean of a round is 90-fold the largest upload" in caplog.text
    assert "--train head" in caplog.text


def test_a_run_that_trains_the_head_alone_is_not_told_to_do_so(caplog: pytest.LogCaptureFixture) -> None:
    ReportedNoise(RecordingSink()).warn_of_volume(90.0, trains_head_only=True)
    assert "It takes hundreds of stores in a round" in caplog.text
    assert "--train head" not in caplog.text
