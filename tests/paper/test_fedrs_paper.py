"""What Li & Zhan 2021 say of FedRS, asserted of this implementation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.training.losses import FedRS
from tests.paper.losses import loss_and_gradient

LN2, LN3, LN6 = math.log(2), math.log(3), math.log(6)


def test_the_logits_of_classes_without_photos_are_scaled_and_no_others_however_rare() -> None:
    scale_K, shift_K = FedRS(0.3).calibration(torch.tensor([1, 0, 1000, 0]))
    assert scale_K.tolist() == pytest.approx([1, 0.3, 1, 0.3])
    assert shift_K.tolist() == [0, 0, 0, 0]


def test_an_example_by_hand() -> None:
    """Logits ln 2, 2 ln 3, 0; the middle class absent; alpha 1/2: restricted ln 2, ln 3, 0; shares 2/6, 3/6, 1/6."""
    example = torch.tensor([[LN2, 2 * LN3, 0.0]])
    calibration = FedRS(0.5).calibration(torch.tensor([3, 0, 2]))
    loss, gradient = loss_and_gradient(example, [0], calibration)
    assert loss == pytest.approx(LN3)
    assert gradient[0].tolist() == pytest.approx([1 / 3 - 1, 1 / 2 * 1 / 2, 1 / 6])
    assert loss_and_gradient(example, [2], calibration)[0] == pytest.approx(LN6)
    batch_loss, _ = loss_and_gradient(example.repeat(2, 1), [0, 2], calibration)
    assert batch_loss == pytest.approx((LN3 + LN6) / 2)


def test_the_example_with_label_smoothing() -> None:
    """Targets 0.8, 0.1, 0.1: three tenths spread over all classes, since all have a logit."""
    calibration = FedRS(0.5).calibration(torch.tensor([3, 0, 2]))
    loss, gradient = loss_and_gradient(torch.tensor([[LN2, 2 * LN3, 0.0]]), [0], calibration, smoothing=0.3)
    assert loss == pytest.approx(0.8 * LN3 + 0.1 * LN2 + 0.1 * LN6)
    assert gradient[0].tolist() == pytest.approx([1 / 3 - 0.8, (1 / 2 - 0.1) / 2, 1 / 6 - 0.1], abs=1e-6)


COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 50]), min_size=2, max_size=7).filter(any)


@given(counts=COUNTS, alpha=st.floats(0, 1), smoothing=st.sampled_from([0.0, 0.1, 0.9]), seed=st.integers(0, 2**20))
def test_absent_classes_get_alpha_times_the_gradient_of_their_restricted_logit(
    counts: list[int], alpha: float, smoothing: float, seed: int
) -> None:
    counts_K = torch.tensor(counts)
    draw = torch.Generator().manual_seed(seed)
    logits_BK = 5 * torch.randn(4, len(counts), generator=draw)
    labels_B = counts_K.nonzero().squeeze(1)[torch.randint(int((counts_K > 0).sum()), (4,), generator=draw)]
    loss, gradient = loss_and_gradient(logits_BK, labels_B.tolist(), FedRS(alpha).calibration(counts_K), smoothing)
    restricted_BK = torch.where(counts_K > 0, logits_BK, alpha * logits_BK).requires_grad_()
    expected = F.cross_entropy(restricted_BK, labels_B, label_smoothing=smoothing)
    expected.backward()
    assert restricted_BK.grad is not None
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert math.isfinite(loss)
    torch.testing.assert_close(
        gradient, torch.where(counts_K > 0, 1.0, alpha) * restricted_BK.grad, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("counts", "alpha"), [([5, 1, 2], 0.2), ([5, 0, 2], 1.0)])
def test_with_all_classes_or_alpha_one_it_is_cross_entropy(counts: list[int], alpha: float, smoothing: float) -> None:
    logits_BK = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    labels = [0, 2, 2, 0, 2, 0]
    found = loss_and_gradient(logits_BK, labels, FedRS(alpha).calibration(torch.tensor(counts)), smoothing)
    plain = loss_and_gradient(logits_BK, labels, None, smoothing)
    assert found[0] == pytest.approx(plain[0], rel=3e-7)
    torch.testing.assert_close(found[1], plain[1], rtol=3e-7, atol=3e-8)


def test_the_smaller_alpha_the_less_an_absent_class_is_pushed_down() -> None:
    pushes = [
        loss_and_gradient(torch.zeros(1, 3), [0], FedRS(alpha).calibration(torch.tensor([1, 0, 1])))[1][0, 1].item()
        for alpha in (1.0, 0.5, 0.1, 0.0)
    ]
    assert pushes == sorted(pushes, reverse=True)
    assert pushes[0] > pushes[2] > pushes[3] == 0
