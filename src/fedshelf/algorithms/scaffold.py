"""SCAFFOLD: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1.

    server:                                              client i, from x and c:
     1  for each round:                                   6  y_i <- x
     2    S <- random clients; each i: dy_i, dc_i         7  for each local epoch, for each batch b:
     3    dx <- 1/|S| · sum_i dy_i                        8    y_i <- y_i - eta_l · (g_i(y_i; b) - c_i + c)
          dc <- 1/|S| · sum_i dc_i                        9  c_i+ <- (option I)  g_i(x), over all of its data
     4    x <- x + eta_g · dx                                       (option II) c_i - c + 1/(K·eta_l) · (x - y_i)
     5    c <- c + |S|/N · dc                            10  return dy_i = y_i - x, dc_i = c_i+ - c_i;  c_i <- c_i+

Option II's line 9 is the mean of the K gradients g_i(y_i; b) in line 8: the sum of line 8 over all steps is x - y_i =
eta_l · sum(g_i - c_i + c). The implementation computes that mean. It is identical for the paper's plain steps, and
remains meaningful for local steps with momentum, decay or a clipped gradient. Option I's gradient is larger than later
ones, so that many steps at a high rate overshoot (docs/explanation/algorithms/scaffold.md).

Differs from the paper: nothing with plain local steps. N counts the clients that were live when the cohort was drawn,
and a client that was never counted has c_i = 0; control variates cover trainable values, batch-norm statistics are
averaged (by the same equal weights); option I's pass is over augmented photos in training batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fedshelf.algorithms.base import SERVER_LR, Aggregate, Algorithm, stepped
from fedshelf.core.settings import Setting

if TYPE_CHECKING:
    from fedshelf.algorithms.base import Broadcast, ClientState, ModelState, Tensor, Trainer, Upload

CONTROL_VARIATE = "control_variate"


@dataclass(frozen=True, slots=True)
class Scaffold(Algorithm):
    """Averaging with control variates against client drift.

    Attributes:
        server_lr: eta_g.
        option: how control variates are computed.
        auxiliary: names of the auxiliary vectors.
    """

    server_lr: Annotated[float, SERVER_LR] = 1.0
    option: Annotated[Literal["1", "2"], Setting(key="scaffold_option", help="How control variates are "
        "computed: 1 in an extra pass over a store's photos, 2 from the gradients of training.")] = "2"  # fmt: skip
    auxiliary: tuple[str, ...] = (CONTROL_VARIATE,)
    ignores: ClassVar[tuple[str, ...]] = ("weights",)

    def broadcast(self, state: ModelState, num_trainable: int) -> Mapping[str, Tensor]:
        return {CONTROL_VARIATE: state.optimizer.get(CONTROL_VARIATE, state.params.new_zeros(num_trainable))}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        common = broadcast.auxiliary[CONTROL_VARIATE]  # c
        own = state.algorithm.get(CONTROL_VARIATE, common.new_zeros(len(common)))  # c_i
        device = trainer.bound_model.compute.device
        correction = (common - own).to(device)
        gradients = correction.new_zeros(len(correction))

        def control(gradient: Tensor, values: Tensor) -> None:
            gradients.add_(gradient)  # g_i, before it is corrected
            gradient.add_(correction)  # line 8

        if self.option == "1":
            trainer.bound_model.load(broadcast.params)
            renewed = trainer.gradient(round=broadcast.key.round).to(own.device)  # line 9, option I
        upload = trainer.upload(broadcast, gradient_hook=control)
        if self.option == "2":
            renewed = (gradients / (upload.num_steps or 1)).to(own.device)  # line 9, option II
        change = renewed - own
        return upload.with_auxiliary(control_variate=change), replace(state, algorithm={CONTROL_VARIATE: renewed})

    def weight(self, upload: Upload, staleness: int) -> float:
        return 1.0  # line 3

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        trainable = aggregate.delta[: aggregate.num_trainable]
        change = aggregate.auxiliary[CONTROL_VARIATE]
        common = state.optimizer.get(CONTROL_VARIATE, change.new_zeros(len(change)))
        params = stepped(state.params, aggregate, self.server_lr * trainable)  # line 4
        common = common + (aggregate.num_clients / population) * change  # line 5
        return replace(state, params=params, optimizer={CONTROL_VARIATE: common})
