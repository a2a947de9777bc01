"""The mean of the models of the last rounds takes the place of the last one."""

import pytest
import torch

from fedshelf.core.state import ModelState
from fedshelf.rounds.averaging import with_mean
from tests.property.rounds.test_crashes import fragile, run_with_kills
from tests.worlds import World


@pytest.mark.parametrize("last", [2, 3, 5])
def test_the_last_model_is_the_mean_of_the_last_ones(last: int) -> None:
    models = [torch.tensor([float(number), -(float(number) ** 2)]) for number in range(1, 6)]
    state = ModelState(params=torch.zeros(2))
    for number, params in enumerate(models, 1):
        state = with_mean(ModelState(params=params, mean=state.mean), round=number, num_rounds=5, last=last)
        assert (state.mean is None) == (number <= 5 - last or number == 5)
        if number < 5:
            assert torch.equal(state.params, params), "rounds continue from their own model"
    torch.testing.assert_close(state.params, torch.stack(models[-last:]).mean(0))


@pytest.mark.parametrize("last", [1, 9])
def test_one_model_is_no_mean_and_too_many_are_those_there_are(last: int) -> None:
    state = ModelState(params=torch.ones(2))
    for number in (1, 2, 3):
        state = with_mean(ModelState(params=number * torch.ones(2), mean=state.mean), round=number, num_rounds=3,
                          last=last)  # fmt: skip
    assert state.params.tolist() == ([3.0, 3.0] if last == 1 else [2.0, 2.0])
    assert state.mean is None


def test_a_run_ends_with_the_mean_and_is_otherwise_the_same() -> None:
    plain, averaged = World(num_rounds=4), World(num_rounds=4, plan={"average_rounds": 2})
    plain.run()
    averaged.run()
    before, after = ([state.model.params for state in world.checkpoints.states[-2:]] for world in (plain, averaged))
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], (before[0] + before[1]) / 2)
    assert torch.equal(averaged.final, after[1])


@pytest.mark.parametrize("kill_after", [20, 40, 60])
def test_a_server_that_is_killed_in_between_ends_with_the_same_mean(kill_after: int) -> None:
    whole, parts = (World(num_rounds=4, plan={"average_rounds": 3}) for _ in range(2))
    whole.run()
    run_with_kills(parts, fragile(parts), [kill_after], restart_clients=True)
    assert torch.equal(whole.final, parts.final)
