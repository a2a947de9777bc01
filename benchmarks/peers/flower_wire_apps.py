"""*wire* as Flower's ServerApp and ClientApp, as `flwr run` starts them: FedAvg over four nodes, no training."""

# mypy: disable-error-code="untyped-decorator"

from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.wire_limit import NUM_CLIENTS, NUM_ROUNDS, WireRounds, change

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Return the changed model."""
    (model,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    number = int(message.content.config_records["config"]["server-round"])
    model = model + change(int(context.node_config["partition-id"]), number)
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord([model]), "metrics": metrics})
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and write the figures."""
    config = context.run_config
    rounds = WireRounds(int(config["megabytes"]))

    def record_time(server_round: int, arrays: ArrayRecord) -> None:
        rounds.end_round() if server_round else rounds.begin()

    def count(replies: list[RecordDict], weight: str) -> MetricRecord:
        return MetricRecord({"clients": len(replies)})

    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=NUM_CLIENTS, min_available_nodes=NUM_CLIENTS,
        train_metrics_aggr_fn=count,
    )  # fmt: skip
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord([rounds.first_model()]), num_rounds=NUM_ROUNDS, evaluate_fn=record_time
    )
    if any(metrics["clients"] != NUM_CLIENTS for metrics in result.train_metrics_clientapp.values()):
        raise ValueError(f"not all {NUM_CLIENTS} nodes answered in each round: {result.train_metrics_clientapp}")
    (model,) = result.arrays.to_numpy_ndarrays()
    temporary = Path(str(config["figures"])).with_suffix(".part")
    temporary.write_text(rounds.figures(model, other_processes=[int(config["superlink"])]), encoding="utf-8")
    temporary.rename(str(config["figures"]))
