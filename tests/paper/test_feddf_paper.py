"""What Lin et al. 2020 say of FedDF: it moves the average of models towards what they say together."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedshelf.core.rng import Rng
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.ensemble import Ensemble
from tests.worlds import PLAIN, SIZE, bound_model, linear, photos

SETTINGS = replace(PLAIN, batch_size=16)
IMAGES = photos(1, 64).images


def two_layers(seed: int = 7) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 16), nn.Tanh(), nn.Linear(16, 3))


def ensemble(module: nn.Module, *, steps: int = 60, learning_rate: float = 0.01) -> Ensemble:
    return Ensemble(
        bound_model=bound_model(module, SETTINGS), images=IMAGES, num_steps=steps, learning_rate=learning_rate
    )


def values(module: nn.Module) -> Tensor:
    return bound_model(copy.deepcopy(module), SETTINGS).params.shared.clone()


def logits(bound: BoundModel, params: Tensor) -> Tensor:
    views = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255 - torch.tensor(bound.normalization.mean).view(3, 1, 1)
    bound.load(params)
    with torch.no_grad():
        return bound.logits((views / torch.tensor(bound.normalization.std).view(3, 1, 1)).float())


def distance(fusing: Ensemble, models: Sequence[Tensor], params: Tensor) -> float:
    """KL (nats) from what the models say together to what `params` says."""
    together = torch.stack([logits(fusing.bound_model, model) for model in models]).mean(0).log_softmax(1)
    own = logits(fusing.bound_model, params).log_softmax(1)
    return F.kl_div(own, together, reduction="batchmean", log_target=True).item()


def test_clients_that_agree_leave_their_model_where_it_is() -> None:
    fusing, model = ensemble(linear(), learning_rate=0.001), values(linear())
    fused = fusing.fuse([model, model.clone()], model.clone(), Rng(3))
    assert distance(fusing, [model], fused) < 1e-5
    other = values(linear()) * -1
    fused = ensemble(linear()).fuse([other, other], model.clone(), Rng(3))
    assert distance(fusing, [other], fused) < 0.2 * distance(fusing, [other], model)


def test_an_average_that_says_nothing_is_fused_to_what_its_models_say() -> None:
    """The same function twice, its hidden units negated in one: their average is constant, their ensemble is not."""
    one = two_layers()
    with torch.no_grad():
        list(one.parameters())[2].mul_(8)
        other = copy.deepcopy(one)
        for parameter in list(other.parameters())[:3]:
            parameter.neg_()
    models = [values(one), values(other)]
    fusing, average = ensemble(two_layers(), steps=300), (models[0] + models[1]) / 2
    torch.testing.assert_close(logits(fusing.bound_model, models[0]), logits(fusing.bound_model, models[1]))
    start = average + 0.01 * values(two_layers(8))  # in a constant network, all gradients are zero
    assert distance(fusing, models, fusing.fuse(models, start, Rng(3))) < 0.2 * distance(fusing, models, start)


def test_the_ensemble_is_the_mean_of_logits_whatever_the_order_and_the_draws_are_the_rounds_own() -> None:
    fusing, start = ensemble(linear(), steps=5), values(linear())
    models = [start, start * -2, start * 0.5]
    first = fusing.fuse(models, start, Rng(3))
    assert torch.equal(first, fusing.fuse(iter(models), start, Rng(3)))
    torch.testing.assert_close(first, fusing.fuse(models[::-1], start, Rng(3)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(first, fusing.fuse(models, start, Rng(4)))
