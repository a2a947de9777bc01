"""The server's side of *wire* on NVIDIA FLARE: its FedAvg, the first model, and when rounds begin and end."""

# mypy: disable-error-code="import-not-found,misc"

import os
from pathlib import Path

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg

from benchmarks.peers.nvflare_common import CHECK_SECONDS
from benchmarks.wire_limit import NUM_CLIENTS, NUM_ROUNDS, WireRounds


class Mean(FedAvg):
    """FedAvg over all clients; nothing is stored.

    Args:
        megabytes: Size of the model.
        figures: The file for the figures.
        own_process: Whether the job has a process in addition to the server's (POC), whose memory counts, too.
    """

    def __init__(self, megabytes: int, figures: str, own_process: bool) -> None:
        super().__init__(
            num_clients=NUM_CLIENTS, num_rounds=NUM_ROUNDS, persistor_id="", task_check_period=CHECK_SECONDS
        )
        self.megabytes, self.figures, self.own_process = megabytes, figures, own_process

    def load_model(self) -> FLModel:
        """Build the first model, and record when the first round begins."""
        self.rounds = WireRounds(self.megabytes)
        self.rounds.begin()
        return FLModel(params={"model": self.rounds.first_model()})

    def save_model(self, model: FLModel) -> None:
        """Record the end of the round; called after each one.

        Raises:
            ValueError: Not all clients took part.
        """
        self.rounds.end_round()
        if (count := model.meta["nr_aggregated"]) != NUM_CLIENTS:
            raise ValueError(f"{count} of {NUM_CLIENTS} clients took part in the round")
        if len(self.rounds.times) > NUM_ROUNDS:
            others = [os.getppid()] if self.own_process else []
            temporary = Path(self.figures).with_suffix(".part")
            temporary.write_text(self.rounds.figures(model.params["model"], other_processes=others), encoding="utf-8")
            temporary.rename(self.figures)
