"""The client of the Flower simulation: a module of its own, so that Ray's actors import it once and keep it warm."""

# mypy: disable-error-code="untyped-decorator"

from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.peers.exported_workload import ExportedWorkload, LocalTrainer

app = ClientApp()


@cache
def trainer(folder: str) -> LocalTrainer:
    """Return the actor's trainer, made by its first message and used by all that follow."""
    torch.set_num_threads(1)  # one actor per core
    return LocalTrainer(ExportedWorkload.load(Path(folder)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one store."""
    config = message.content.config_records["config"]
    worker = trainer(str(config["workload"]))
    worker.module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    loss = worker.fit(int(config["server-round"]), int(config["slot"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": worker.workload.photos_per_store})
    content = RecordDict({"arrays": ArrayRecord(worker.module.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
