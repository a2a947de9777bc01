"""What a store stocks, in the bias of the last layer."""

import numpy as np
import torch
from torch import nn

from fedshelf.personalization.head import add_class_prior
from tests.worlds import linear, with_batch_norm

LABELS = np.array([0, 0, 0, 2, 0, 2])


def test_probabilities_change_by_bayes_rule_with_half_a_photo_more_of_each_class() -> None:
    module = with_batch_norm().eval()
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = module(images).softmax(1)
        assert add_class_prior(module, LABELS)
        after = module(images).softmax(1)
    expected = before * torch.tensor([4.5, 0.5, 2.5])
    torch.testing.assert_close(after, expected / expected.sum(1, keepdim=True))


def test_equal_counts_and_no_photos_change_nothing() -> None:
    for labels in (np.array([0, 1, 2, 2, 1, 0]), np.zeros(0, np.int64)):
        module, same = linear(), linear()
        assert add_class_prior(module, labels)
        for one, other in zip(module.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_a_model_without_such_a_bias_stays_as_it_is() -> None:
    assert not add_class_prior(nn.Sequential(nn.Flatten(), nn.Linear(48, 3, bias=False)), LABELS)
    assert not add_class_prior(nn.Conv2d(3, 3, 1), LABELS)
