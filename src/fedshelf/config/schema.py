"""Everything a run can be told, once: the TOML file's keys, the flags, and their defaults.

A key's name is the flag's without the dashes: `client-lr = 0.05` in a file is `--client-lr 0.05`. The defaults are
the recipe that the reference benchmark was measured with (benchmarks/RESULTS.md).
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.config.places import absolute
from fedshelf.core.choices import (
    AggregatorName,
    AttackName,
    CompileChoice,
    DeviceName,
    EngineName,
    LocalWork,
    LossName,
    Metric,
    NormName,
    OptimizerName,
    PersonalizeName,
    SamplingName,
    ScaffoldOption,
    Schedule,
    WorkNorm,
)
from fedshelf.core.text import from_filesystem

AlgorithmName: TypeAlias = Literal[tuple(ALGORITHMS)]  # type: ignore[valid-type]  # whatever is registered


class Scope(StrEnum):
    """Who needs a value. `run`: it decides the result, and clients are sent it; `server`: it decides the result, at the
    server alone; `local`: it may differ when a run is resumed (in virtual time, not all: `files.effective`)."""

    RUN = "run"
    SERVER = "server"
    LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """How a field shows on the command line: its help, the panel it stands in, its scope, and its commands."""

    help: str
    panel: str
    scope: Scope = Scope.RUN
    commands: tuple[str, ...] = ("simulate", "server")


SIMULATE = ("simulate",)
SERVER = ("server",)
CLIENT = ("client",)
DATA, MODEL, TRAINING, ALGORITHM, WIRE = "Data", "Model", "Local training", "Algorithm", "Wire"
ROUNDS, RUN = "Rounds", "Run"


class Settings(BaseModel):
    """What a TOML file or flags may say; unknown keys are errors, keys have dashes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, alias_generator=lambda name: name.replace("_", "-")
    )

    @classmethod
    def flags(cls) -> dict[str, Flag]:
        """Each field's `Flag`."""
        return {
            name: next(m for m in field.metadata if isinstance(m, Flag)) for name, field in cls.model_fields.items()
        }

    @field_validator("*", mode="after")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        """The same run from another working folder is the same run."""
        return absolute(value) if isinstance(value, Path) else value


class RunConfig(Settings):
    """The configuration of a run."""

    data_dir: Annotated[Path | None, Flag(help="Folder of the stores, with one folder of photos per store.", panel=DATA,
        scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip
    test_dir: Annotated[Path | None, Flag(help="Test photos (CLASS/*.jpg) for evaluation at the server.",
        panel=DATA, scope=Scope.SERVER)] = None  # fmt: skip
    catalogue: Annotated[Path | None, Flag(help="File with the class names: one per line, .csv with a header, or JSON "
        "(default: the clients' folder names).", panel=DATA, scope=Scope.SERVER)] = None  # fmt: skip
    aliases: Annotated[Path | None, Flag(help="CSV file with the columns alias,class: other names that stores use for "
        "a class.", panel=DATA, scope=Scope.SERVER)] = None  # fmt: skip
    image_size: Annotated[int, Field(ge=8, le=2048), Flag(help="Side of the training photos in pixels.",
        panel=DATA)] = 48  # fmt: skip
    val_fraction: Annotated[float, Field(ge=0, lt=1), Flag(help="Share of a store's photos held out for validation.",
        panel=DATA)] = 0.1  # fmt: skip
    augment: Annotated[bool, Flag(help="Randomly crop, flip, rotate and relight training photos.", panel=DATA)] = True

    model: Annotated[str, Flag(help="resnet10, or the name of a timm model.", panel=MODEL)] = "resnet10"
    width: Annotated[int, Field(ge=1, le=1024), Flag(help="Channels of resnet10's first block.", panel=MODEL)] = 16
    norm: Annotated[NormName, Flag(help="Normalization layers.", panel=MODEL)] = "batch"
    init: Annotated[Path | None, Flag(help="Start from the weights in this file (safetensors, or a torch file of "
        "tensors).",
        panel=MODEL, scope=Scope.SERVER)] = None  # fmt: skip
    pretrained: Annotated[bool, Flag(help="Start from timm's pretrained weights (needs internet).", panel=MODEL,
        scope=Scope.SERVER)] = False  # fmt: skip

    optimizer: Annotated[OptimizerName, Flag(help="Local optimizer.", panel=TRAINING)] = "sgd"
    client_lr: Annotated[float, Field(gt=0), Flag(help="Learning rate of local training.", panel=TRAINING)] = 0.05
    lr_schedule: Annotated[Schedule, Flag(help="Schedule of the learning rate over the rounds.",
        panel=TRAINING)] = "cosine"  # fmt: skip
    warmup_rounds: Annotated[int, Field(ge=0), Flag(help="Rounds of linear warmup.", panel=TRAINING)] = 2
    local_epochs: Annotated[int, Field(ge=1), Flag(help="Local epochs per round.", panel=TRAINING)] = 2
    batch_size: Annotated[int, Field(ge=1), Flag(help="Photos per training step.", panel=TRAINING)] = 16
    dynamic_batch: Annotated[bool, Flag(help="Let each client use the batch size that is fastest on its machine, up "
        "to 4 times --batch-size, with a learning rate to match.", panel=TRAINING)] = False  # fmt: skip
    momentum: Annotated[float, Field(ge=0, lt=1), Flag(help="Nesterov momentum of SGD.", panel=TRAINING)] = 0.9
    weight_decay: Annotated[float, Field(ge=0), Flag(help="Weight decay.", panel=TRAINING)] = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Flag(help="Label smoothing.", panel=TRAINING)] = 0.1
    gradient_clip: Annotated[float, Field(ge=0), Flag(help="Maximum norm of each step's gradient; 0 for no limit.",
        panel=TRAINING)] = 5.0  # fmt: skip
    threads: Annotated[int, Field(ge=0), Flag(help="Training threads per client (results depend on it); 0 for one "
        "per core.", panel=TRAINING)] = 1  # fmt: skip
    compile: Annotated[CompileChoice, Flag(help="Compile the training step; auto does so on a GPU where a trial "
        "shows that it is faster.", panel=TRAINING)] = "auto"  # fmt: skip
    device: Annotated[DeviceName, Flag(help="Device that this process computes on.", panel=TRAINING,
        scope=Scope.LOCAL)] = "auto"  # fmt: skip

    algorithm: Annotated[AlgorithmName, Flag(help="Federated algorithm.", panel=ALGORITHM)] = "fedavg"
    mu: Annotated[
        float, Field(ge=0), Flag(help="Strength of the proximal term of fedprox and fedasync.", panel=ALGORITHM)
    ] = 0.01  # fmt: skip
    loss: Annotated[LossName, Flag(help="Loss of local training; fedrs and fedlc protect the products that a store "
        "does not sell.", panel=ALGORITHM)] = "cross-entropy"  # fmt: skip
    fedrs_alpha: Annotated[float, Field(ge=0, le=1), Flag(help="Factor of fedrs on the logits of products that a "
        "store does not sell.", panel=ALGORITHM)] = 0.5  # fmt: skip
    fedlc_tau: Annotated[float, Field(ge=0), Flag(help="Strength of fedlc's margins; products with fewer photos get "
        "wider ones.", panel=ALGORITHM)] = 1.0  # fmt: skip
    server_lr: Annotated[float | None, Field(gt=0), Flag(help="Learning rate of the server's step (default: 0.1 for "
        "fedadagrad, fedadam and fedyogi; 0.6 for fedasync, where it is alpha; else 1).", panel=ALGORITHM,
        scope=Scope.SERVER)] = None  # fmt: skip
    server_momentum: Annotated[float | None, Field(ge=0, lt=1), Flag(help="Momentum of fedavgm (default: 0.5); beta_1 "
        "of fedadagrad, fedadam and fedyogi (default: 0.9).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    server_beta2: Annotated[float, Field(ge=0, le=1), Flag(help="beta_2 of fedadam and fedyogi.", panel=ALGORITHM,
        scope=Scope.SERVER)] = 0.99  # fmt: skip
    server_tau: Annotated[float, Field(gt=0), Flag(help="Adaptivity of fedadagrad, fedadam and fedyogi; smaller "
        "values adapt more.", panel=ALGORITHM, scope=Scope.SERVER)] = 1e-2  # fmt: skip
    buffer_size: Annotated[int | None, Field(ge=1), Flag(help="Uploads per version of fedbuff (default: 4; fedasync "
        "makes a version of every upload).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    staleness_exponent: Annotated[float, Field(ge=0), Flag(help="How fast an upload of fedbuff and fedasync loses "
        "weight with age: its weight is (1 + age in versions) to the power of minus this.", panel=ALGORITHM,
        scope=Scope.SERVER)] = 0.5  # fmt: skip
    max_staleness: Annotated[int | None, Field(ge=0), Flag(help="Maximum age, in versions, of an upload of fedbuff "
        "or fedasync (default: no limit).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    scaffold_option: Annotated[ScaffoldOption, Flag(help="How SCAFFOLD computes control variates: 1 in an extra pass "
        "over a store's photos, 2 from the gradients of training.", panel=ALGORITHM)] = "2"  # fmt: skip
    aggregator: Annotated[AggregatorName, Flag(help="How uploads are combined; all but mean withstand some hostile "
        "clients (see docs/explanation/robust-aggregation.md).", panel=ALGORITHM,
        scope=Scope.SERVER)] = "mean"  # fmt: skip
    trim: Annotated[float, Field(ge=0, lt=0.5), Flag(help="Assumed share of hostile uploads in a round: trimmed-mean "
        "cuts it at each end, multi-krum leaves it out.", panel=ALGORITHM,
        scope=Scope.SERVER)] = 0.25  # fmt: skip
    norm_bound: Annotated[float | None, Field(gt=0), Flag(help="Maximum norm of an upload; larger ones are scaled "
        "down (default: no limit).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    attack: Annotated[AttackName, Flag(help="What simulated attackers do: train on wrong labels, or multiply their "
        "uploads.", panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = "none"  # fmt: skip
    attackers: Annotated[int, Field(ge=0), Flag(help="Number of attacking stores, the first by name.",
        panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = 0  # fmt: skip
    attack_factor: Annotated[float | None, Flag(help="Factor that attackers multiply their uploads by (default: -1 "
        "for sign-flip, -10 for scale).", panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip

    personalize: Annotated[PersonalizeName, Flag(help="What stays at the stores: batch-norm layers (fedbn), the last "
        "layer (fedper, fedrep), a second model (ditto), or the final model after fine-tuning (finetune).",
        panel=ALGORITHM)] = "none"  # fmt: skip
    fedrep_head_epochs: Annotated[int, Field(ge=1), Flag(help="Epochs of fedrep on the last layer alone, before the "
        "rest is trained.", panel=ALGORITHM)] = 2  # fmt: skip
    ditto_lambda: Annotated[float, Field(ge=0), Flag(help="How strongly ditto pulls a store's own model toward the "
        "global one.", panel=ALGORITHM)] = 0.1  # fmt: skip
    finetune_epochs: Annotated[int, Field(ge=0), Flag(help="Epochs of fine-tuning after the last round.",
        panel=ALGORITHM)] = 8  # fmt: skip
    finetune_lr: Annotated[float, Field(gt=0), Flag(help="Learning rate of fine-tuning.", panel=ALGORITHM)] = 0.005
    compare: Annotated[bool | None, Flag(help="After the last round, let each store keep the best of the global "
        "model, its personalized one and one trained alone, which takes as long as all rounds did (default: with "
        "--personalize).", panel=ALGORITHM, scope=Scope.LOCAL)] = None  # fmt: skip

    codec_up: Annotated[str, Flag(help="How uploads are compressed: codecs joined by '+', such as int8+zstd, "
        "topk:0.05+int4 or drive (see docs/explanation/compression.md).", panel=WIRE)] = "none"  # fmt: skip
    codec_down: Annotated[str, Flag(help="How the model's changes are compressed on their way to the clients, as for "
        "--codec-up.", panel=WIRE)] = "none"  # fmt: skip
    clip_norm: Annotated[float | None, Field(gt=0), Flag(help="Each client scales its upload down to this L2 norm "
        "before anything else happens to it (default: not at all).", panel=WIRE)] = None  # fmt: skip
    byte_budget: Annotated[float | None, Field(gt=0), Flag(help="Megabytes that a client may receive and send per "
        "round, half each way; codecs are then chosen per message.", panel=WIRE)] = None  # fmt: skip

    rounds: Annotated[int, Field(ge=1), Flag(help="Number of rounds.", panel=ROUNDS)] = 30
    min_clients: Annotated[int, Field(ge=1), Flag(help="Clients that must be there for the run to start.",
        panel=ROUNDS, scope=Scope.SERVER)] = 2  # fmt: skip
    fraction: Annotated[float, Field(gt=0, le=1), Flag(help="Share of the live clients drawn for each round.",
        panel=ROUNDS, scope=Scope.SERVER)] = 1.0  # fmt: skip
    sampling: Annotated[SamplingName, Flag(help="How clients are drawn: uniform, by size (in proportion to their "
        "photos, then weighted equally), or by availability (favoring those that are rarely live).", panel=ROUNDS,
        scope=Scope.SERVER)] = "uniform"  # fmt: skip
    quorum: Annotated[int | None, Field(ge=1), Flag(help="Uploads that a round needs by its deadline (default: more "
        "than two thirds of 4 or more drawn, 2 of 3, else all).", panel=ROUNDS, scope=Scope.SERVER)] = None  # fmt: skip
    round_timeout: Annotated[float, Field(gt=0), Flag(help="Deadline of a round's training, and again of its "
        "evaluation, in seconds.", panel=ROUNDS, scope=Scope.LOCAL)] = 1800.0  # fmt: skip
    straggler_factor: Annotated[float | None, Field(ge=1), Flag(help="Wait for all clients no longer than this many "
        "times what half of them are predicted to need, then for --quorum.", panel=ROUNDS,
        scope=Scope.SERVER)] = None  # fmt: skip
    over_selection: Annotated[float, Field(ge=0, le=10), Flag(help="Draw this share of extra clients, and count the "
        "first to answer.", panel=ROUNDS, scope=Scope.SERVER)] = 0.0  # fmt: skip
    local_work: Annotated[LocalWork, Flag(help="Work of a client per round: its epochs (fixed), as much as its speed "
        "allows so that all finish together (dynamic), or less where it is slow (cut).", panel=ROUNDS,
        scope=Scope.SERVER)] = "fixed"  # fmt: skip
    least_work: Annotated[float, Field(gt=0, le=1), Flag(help="Minimum share of its epochs for a slow client.",
        panel=ROUNDS, scope=Scope.SERVER)] = 0.25  # fmt: skip
    most_work: Annotated[float, Field(ge=1, le=100), Flag(help="Maximum multiple of its epochs for a fast client.",
        panel=ROUNDS, scope=Scope.SERVER)] = 2.0  # fmt: skip
    work_norm: Annotated[WorkNorm, Flag(help="Norm by which uploads of unequal work are normalized (l1 is FedNova).",
        panel=ROUNDS, scope=Scope.SERVER)] = "l2"  # fmt: skip
    max_examples: Annotated[int, Field(ge=1), Flag(help="Maximum number of photos that a client can claim as its "
        "weight.",
        panel=ROUNDS, scope=Scope.SERVER)] = 100_000  # fmt: skip
    test_every: Annotated[int, Field(ge=1), Flag(help="Evaluate on --test-dir every so many rounds, and after the "
        "last.", panel=ROUNDS, scope=Scope.SERVER)] = 1  # fmt: skip
    best_metric: Annotated[Metric, Flag(help="Metric that selects the best round (auto: validation accuracy, else "
        "central accuracy, else training loss).", panel=ROUNDS, scope=Scope.SERVER)] = "auto"  # fmt: skip
    patience: Annotated[int, Field(ge=0), Flag(help="Stop after this many rounds without improvement; 0 for never.",
        panel=ROUNDS, scope=Scope.SERVER)] = 0  # fmt: skip
    seed: Annotated[int, Field(ge=0, lt=2**63), Flag(help="Seed of everything random.", panel=ROUNDS)] = 0

    run_dir: Annotated[Path | None, Flag(help="Folder of the run (default: resume the newest unfinished run with the "
        "same settings in ./runs, else create one).", panel=RUN, scope=Scope.LOCAL)] = None  # fmt: skip
    extend: Annotated[int, Field(ge=0), Flag(help="Run this many more rounds than the run was created for.", panel=RUN,
        scope=Scope.LOCAL)] = 0  # fmt: skip
    engine: Annotated[EngineName, Flag(help="How clients are trained: one by one (local), many in one computation "
        "(vmap), the faster of the two by trial (auto), or on a Ray cluster (ray).", panel=RUN,
        scope=Scope.SERVER, commands=SIMULATE)] = "local"  # fmt: skip
    workers: Annotated[int, Field(ge=0), Flag(help="Worker processes; 0 trains in this process (with --engine ray: "
        "actors).", panel=RUN,
        scope=Scope.LOCAL, commands=SIMULATE)] = 0  # fmt: skip
    speeds: Annotated[str | None, Flag(help="How slow stores are in virtual time, in the order of names: with 1,1,5 "
        "the third takes five times as long. A shorter list is repeated (see docs/how-to/simulate-slow-stores.md).",
        panel=RUN, scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip
    dropout: Annotated[float, Field(ge=0, lt=1), Flag(help="Probability that a store fails in the middle of its "
        "training, and stays away until it would have finished.", panel=RUN, scope=Scope.SERVER,
        commands=SIMULATE)] = 0.0  # fmt: skip
    address: Annotated[str, Flag(help="HOST:PORT to listen on.", panel=RUN, scope=Scope.LOCAL,
        commands=SERVER)] = "0.0.0.0:8080"  # fmt: skip
    advertise: Annotated[tuple[str, ...], Flag(help="HOST[:PORT] by which clients reach this server, where it is not "
        "this machine's name or address (NAT, Docker, a DNS alias); added to the certificate. Can be repeated.",
        panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = ()  # fmt: skip
    insecure: Annotated[bool, Flag(help="Disable TLS: anyone on the network can read and change what is sent.",
        panel=RUN,
        scope=Scope.LOCAL, commands=SERVER)] = False  # fmt: skip
    heartbeat_timeout: Annotated[float, Field(ge=5), Flag(help="Seconds of silence after which a client counts as "
        "offline.", panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = 30.0  # fmt: skip

    @field_validator("speeds")
    @classmethod
    def _in_one_way(cls, value: str | None) -> str | None:
        """The same speeds, written otherwise, are the same run."""
        return None if value is None else ",".join(f"{number:.12g}" for number in parse_speeds(value))


class ClientConfig(Settings):
    """What a store's client is told on its own machine; all else comes from the server."""

    data_dir: Annotated[Path | None, Flag(help="The store's photos, with one folder per product.", panel=DATA,
        commands=CLIENT)] = None  # fmt: skip
    test_dir: Annotated[Path | None, Flag(help="Test photos (CLASS/*.jpg) to compare the store's models on (default: "
        "its validation photos).", panel=DATA, commands=CLIENT)] = None  # fmt: skip
    server_address: Annotated[str, Flag(help="HOST:PORT of the server.", panel=RUN, commands=CLIENT)] = "127.0.0.1:8080"
    name: Annotated[str | None, Flag(help="The client's name (default: the one it had before, else the data folder's; "
        "FOLDER-HOST where that is local_data, data, photos or train).", panel=RUN,
        commands=CLIENT)] = None  # fmt: skip
    state_dir: Annotated[Path | None, Flag(help="Folder for state between rounds (default: below $FEDSHELF_HOME, by "
        "the client's name).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    ca: Annotated[Path | None, Flag(help="Certificate authority of the server (default: that of a server on this "
        "machine).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    insecure: Annotated[bool, Flag(help="Disable TLS: anyone on the network can read and change what is sent.",
        panel=RUN,
        commands=CLIENT)] = False  # fmt: skip
    device: Annotated[DeviceName, Flag(help="Device that this client computes on.", panel=TRAINING,
        commands=CLIENT)] = "auto"  # fmt: skip
    max_wait: Annotated[float | None, Field(gt=0), Flag(help="Give up after this many seconds without an answer from "
        "the server, not counting time outside --active-hours (default: never).", panel=RUN,
        commands=CLIENT)] = None  # fmt: skip
    active_hours: Annotated[str | None, Flag(help="Take part only at these times of day, such as 22:00-06:00 or "
        "12:00-13:30,22:00-06:00 (default: always).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    time_zone: Annotated[str | None, Flag(help="Time zone of --active-hours, such as Europe/Berlin (default: this "
        "machine's).", panel=RUN, commands=CLIENT)] = None  # fmt: skip


def parse_speeds(text: str) -> tuple[float, ...]:
    """The numbers of `--speeds`.

    Raises:
        ValueError: `text` is something else than positive numbers joined by commas.
    """
    numbers = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{part.strip()!r} is not a number above 0; give numbers joined by commas, such as 1,1,5")
        numbers.append(number)
    return tuple(numbers)


def select(config: RunConfig, *scopes: Scope) -> dict[str, Any]:
    """The fields of the given scopes by key, as plain values; None is left out (TOML has no null)."""
    wanted = {name for name, flag in RunConfig.flags().items() if flag.scope in scopes}
    values: dict[str, Any] = config.model_dump(mode="json", by_alias=True, include=wanted, exclude_none=True)
    paths = {name.replace("_", "-") for name in wanted if isinstance(getattr(config, name), Path)}
    return {key: from_filesystem(value) if key in paths else value for key, value in values.items()}
