"""The pipeline's rule: what may not go together is refused when the run is configured, all of it at once."""

import pytest

from fedshelf.compression.chain import parse
from fedshelf.rounds.pipeline import Protection, problems

MASKED, NOISED = Protection(masked=True), Protection(noised=True)


@pytest.mark.parametrize("codec", ["none", "int8", "topk:0.1+modular:16:1", "drive", "int4+zstd", "modular:16:1+zstd"])
def test_masked_sums_refuse_what_masks_do_not_cancel_in(codec: str) -> None:
    assert problems(parse(codec), MASKED)


@pytest.mark.parametrize("codec", ["modular:16:1", "randk:0.1+modular:16:0.5"])
def test_modular_integers_and_a_common_choice_of_values_are_offered_to_masked_sums(codec: str) -> None:
    assert problems(parse(codec), MASKED) == []


@pytest.mark.parametrize("codec", ["topk:0.1", "topk:0.1+int8+zstd", "randk:0.5"])
def test_noise_refuses_error_feedback(codec: str) -> None:
    (only,) = problems(parse(codec), NOISED)
    assert "error feedback" in only


@pytest.mark.parametrize("codec", ["none", "int8+zstd", "drive", "int4"])
def test_noise_allows_what_keeps_no_memory(codec: str) -> None:
    assert problems(parse(codec), NOISED) == []


def test_all_that_is_wrong_is_told_at_once() -> None:
    found = problems(parse("topk:0.1+int8+zstd"), Protection(masked=True, noised=True))
    assert len(found) == 4
    assert all("--codec-up topk:0.1+int8+zstd" in problem for problem in found)


@pytest.mark.parametrize("codec", ["none", "topk:0.01+int8+zstd", "drive"])
def test_without_protection_everything_goes(codec: str) -> None:
    assert problems(parse(codec), Protection()) == []
