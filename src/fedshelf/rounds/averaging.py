"""The mean of the models of the last rounds, which takes the place of the last one.

    mean_1 = w_{T-N+1},  mean_k = mean_{k-1} + (w_{T-N+k} - mean_{k-1}) / k,  w_T <- mean_N

Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", Algorithm 1, over
rounds instead of epochs. The rounds themselves are unchanged: each continues from its own model.

Differs from the paper: statistics of batch normalization are averaged like weights, not computed anew.
"""

from dataclasses import replace

from fedshelf.core.state import ModelState


def with_mean(model: ModelState, *, round: int, num_rounds: int, last: int) -> ModelState:
    """Add the model of a round to the mean; after the last round, the mean is the model.

    Args:
        model: the state after the round.
        round: the round.
        num_rounds: T.
        last: N, the number of rounds to average; 1 for none.
    """
    last = min(last, num_rounds)
    number = round - (num_rounds - last)  # k
    if last < 2 or not 1 <= number <= last:
        return model if model.mean is None else replace(model, mean=None)
    mean = model.params
    if number > 1 and model.mean is not None:
        mean = model.mean + (model.params - model.mean) / number
    return replace(model, params=mean, mean=None) if number == last else replace(model, mean=mean)
