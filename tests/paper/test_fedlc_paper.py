"""What Zhang et al. 2022 say of FedLC, asserted of this implementation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.training.losses import FedLC
from tests.paper.losses import loss_and_gradient

LN2 = math.log(2)
COUNTS = torch.tensor([16, 1, 0, 81])  # to the power of -1/4: 1/2, 1, infinite, 1/3
LOGITS = torch.tensor([[LN2 + 1 / 2, 1.0, 7.0, 1 / 3]])  # calibrated with tau = 1: ln 2, 0, -inf, 0


def test_the_margin_is_tau_times_the_fourth_root_of_one_over_the_count() -> None:
    scale_K, shift_K = FedLC(3.0).calibration(COUNTS)
    assert scale_K.tolist() == [1, 1, 1, 1]
    assert shift_K.tolist() == pytest.approx([-1.5, -3, -math.inf, -1])


def test_an_example_by_hand() -> None:
    """Shares 1/2, 1/4, 0, 1/4."""
    calibration = FedLC(1.0).calibration(COUNTS)
    loss, gradient = loss_and_gradient(LOGITS, [0], calibration)
    assert loss == pytest.approx(LN2)
    assert gradient[0].tolist() == pytest.approx([-1 / 2, 1 / 4, 0, 1 / 4])
    assert loss_and_gradient(LOGITS, [1], calibration)[0] == pytest.approx(2 * LN2)
    assert loss_and_gradient(LOGITS.repeat(2, 1), [0, 1], calibration)[0] == pytest.approx(1.5 * LN2)


def test_the_example_with_label_smoothing() -> None:
    """Targets 0.8, 0.1, 0, 0.1: three tenths spread over the three classes in stock."""
    loss, gradient = loss_and_gradient(LOGITS, [0], FedLC(1.0).calibration(COUNTS), smoothing=0.3)
    assert loss == pytest.approx(0.8 * LN2 + 2 * 0.1 * 2 * LN2)
    assert gradient[0].tolist() == pytest.approx([-0.3, 0.15, 0, 0.15])


def test_a_rare_class_needs_a_larger_logit_for_the_same_loss() -> None:
    losses = [loss_and_gradient(torch.zeros(1, 4), [label], FedLC(1.0).calibration(COUNTS))[0] for label in (1, 0, 3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[1] == pytest.approx(1 - 1 / 2), (
        "the margin between two classes is their shifts' difference"
    )


CLASS_COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 50, 10**6]), min_size=1, max_size=7).filter(any)


@given(
    counts=CLASS_COUNTS, tau=st.sampled_from([0.0, 0.3, 1.0, 40.0]), smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    scale=st.sampled_from([0.0, 1.0, 1e4]), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_it_is_cross_entropy_of_the_classes_in_stock_alone_and_no_other_gets_a_gradient(
    counts: list[int], tau: float, smoothing: float, scale: float, seed: int
) -> None:
    counts_K = torch.tensor(counts)
    stocked = counts_K.nonzero().squeeze(1)
    draw = torch.Generator().manual_seed(seed)
    logits_BK = scale * torch.randn(4, len(counts), generator=draw)
    places_B = torch.randint(len(stocked), (4,), generator=draw)
    loss, gradient = loss_and_gradient(
        logits_BK, stocked[places_B].tolist(), FedLC(tau).calibration(counts_K), smoothing
    )
    few_BK = (logits_BK[:, stocked] - tau * counts_K[stocked].float() ** -0.25).requires_grad_()
    expected = F.cross_entropy(few_BK, places_B, label_smoothing=smoothing)
    expected.backward()
    assert few_BK.grad is not None
    assert math.isfinite(loss)
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[:, stocked], few_BK.grad, rtol=1e-5, atol=1e-6)
    assert (gradient[:, counts_K == 0] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("counts", "tau"), [([5, 1, 2], 0.0), ([7, 7, 7], 2.5)])
def test_without_tau_or_with_equal_counts_it_is_cross_entropy(counts: list[int], tau: float, smoothing: float) -> None:
    logits_BK = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    labels = [0, 2, 2, 1, 2, 0]
    found = loss_and_gradient(logits_BK, labels, FedLC(tau).calibration(torch.tensor(counts)), smoothing)
    plain = loss_and_gradient(logits_BK, labels, None, smoothing)
    tolerance = 3e-7 if tau == 0 else 3e-6  # shifted by a common amount, logits round otherwise
    assert found[0] == pytest.approx(plain[0], rel=tolerance)
    torch.testing.assert_close(found[1], plain[1], rtol=tolerance, atol=tolerance)


def test_without_tau_absent_classes_are_left_out_all_the_same() -> None:
    loss, gradient = loss_and_gradient(torch.zeros(1, 4), [1], FedLC(0.0).calibration(COUNTS))
    assert loss == pytest.approx(math.log(3))
    assert gradient[0].tolist() == pytest.approx([1 / 3, -2 / 3, 0, 1 / 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_store_of_one_product_has_no_loss_and_no_gradient(smoothing: float) -> None:
    loss, gradient = loss_and_gradient(
        torch.randn(3, 4), [2, 2, 2], FedLC(1.0).calibration(torch.tensor([0, 0, 3, 0])), smoothing
    )
    assert loss == 0
    assert gradient.abs().max() == 0
