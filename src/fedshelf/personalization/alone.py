"""The local-only baseline: the rounds' training on one store's photos, without federation.

     1  w_1 <- the run's first model, with an output layer in closed form if the run begins with one
     2  for each round t = 1..T, if the run trains in steps:
     3    y <- local training from w_t, as in round t
     4    w_{t+1} <- w_t + (y - w_t)
     5  if the run ends with an output layer in closed form, so does this

Line 4 is computed as the server adds an upload, so the result is bit for bit the model of a FedAvg run over this store
only. It also uses the same random draws as the rounds, so that the candidates differ by federation and not by chance.
The loss is plain cross-entropy: the losses against label skew help when stores are averaged, but ignore how frequent a
product is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from fedshelf.core.messages import PARAMS, Broadcast, Purpose, TaskKey
from fedshelf.training.phases import Phase
from fedshelf.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedForm:
    """When a run computes the output layer in closed form.

    Attributes:
        solve: computes it from one store's photos, for shared values [S].
        at_first: before the first round.
        at_last: after the last round.
        trains: whether there are rounds in between.
    """

    solve: Callable[[Tensor, Trainer], Tensor]
    at_first: bool
    at_last: bool
    trains: bool


def train_alone(
    trainer: Trainer, first: Tensor, *, run_id: str, num_rounds: int, client_lr: Callable[[int], float],
    closed_form: ClosedForm | None = None,
) -> None:  # fmt: skip
    """Train the store's local-only model on the trainer's bound model.

    Args:
        trainer: trains the whole model, ignoring its phases.
        first: shared values [S] of the run's first model; personal ones have their initial values.
        run_id: the run.
        num_rounds: T.
        client_lr: learning rate by round.
        closed_form: computes the output layer; None if the run has nothing of that kind.

    Raises:
        FedShelfError: training diverged.
    """
    bound = trainer.bound_model
    plain = trainer.having(replace(bound.settings, loss=None))
    whole = replace(plain, phases=(Phase(),))
    bound.params.personal.copy_(bound.initial_personal)
    shared = first
    if closed_form is not None and closed_form.at_first:
        shared = closed_form.solve(shared, plain)
    for number in range(1, num_rounds + 1) if closed_form is None or closed_form.trains else ():
        task = Broadcast(
            key=TaskKey(run_id=run_id, round=number, attempt=0), purpose=Purpose.TRAIN,
            client_lr=client_lr(number), vectors={PARAMS: shared},
        )  # fmt: skip
        shared = bound.params.layout.clamp(shared + whole.upload(task).delta)  # lines 3 and 4
    if closed_form is not None and closed_form.at_last:
        shared = closed_form.solve(shared, plain)
    bound.load(shared)
