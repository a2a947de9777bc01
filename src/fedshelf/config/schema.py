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
        return value.expanduser().absolute() if isinstance(value, Path) else value


class RunConfig(Settings):
    """The configuration of a run."""

    data_dir: Annotated[Path | None, Flag(help="Folder with one folder of photos per store.", panel=DATA,
        scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip
    test_dir: Annotated[Path | None, Flag(help="Folder of test photos (CLASS/*.jpg) for central evaluation.",
        panel=DATA, scope=Scope.SERVER)] = None  # fmt: skip
    catalogue: Annotated[Path | None, Flag(help="File that names the classes (JSON, or one name a line); else the "
        "clients' folders do.", panel=DATA, scope=Scope.SERVER)] = None  # fmt: skip
    image_size: Annotated[int, Field(ge=8, le=2048), Flag(help="Side of the photos in training, in pixels.",
        panel=DATA)] = 48  # fmt: skip
    val_fraction: Annotated[float, Field(ge=0, lt=1), Flag(help="Share of a store's photos held out for validation.",
        panel=DATA)] = 0.1  # fmt: skip
    augment: Annotated[bool, Flag(help="Crop, flip, rotate and relight photos in training.", panel=DATA)] = True

    model: Annotated[str, Flag(help="resnet10, or any timm model by name.", panel=MODEL)] = "resnet10"
    width: Annotated[int, Field(ge=1, le=1024), Flag(help="Channels of resnet10's first block.", panel=MODEL)] = 16
    norm: Annotated[NormName, Flag(help="Normalization layers.", panel=MODEL)] = "batch"
    init: Annotated[Path | None, Flag(help="Start from this checkpoint (safetensors, or a torch file of tensors).",
        panel=MODEL, scope=Scope.SERVER)] = None  # fmt: skip
    pretrained: Annotated[bool, Flag(help="Start from timm's pretrained weights (needs internet).", panel=MODEL,
        scope=Scope.SERVER)] = False  # fmt: skip

    optimizer: Annotated[OptimizerName, Flag(help="Local optimizer.", panel=TRAINING)] = "sgd"
    client_lr: Annotated[float, Field(gt=0), Flag(help="Learning rate of local training.", panel=TRAINING)] = 0.05
    lr_schedule: Annotated[Schedule, Flag(help="Course of the learning rate over rounds.", panel=TRAINING)] = "cosine"
    warmup_rounds: Annotated[int, Field(ge=0), Flag(help="Rounds of linear warm-up.", panel=TRAINING)] = 2
    local_epochs: Annotated[int, Field(ge=1), Flag(help="Passes over a store's photos per round.", panel=TRAINING)] = 2
    batch_size: Annotated[int, Field(ge=1), Flag(help="Photos per step.", panel=TRAINING)] = 16
    dynamic_batch: Annotated[bool, Flag(help="Each client trains with the batch size that is fastest on its machine, "
        "from --batch-size up to 4 times that, and a rate to match.", panel=TRAINING)] = False  # fmt: skip
    momentum: Annotated[float, Field(ge=0, lt=1), Flag(help="Nesterov momentum of SGD.", panel=TRAINING)] = 0.9
    weight_decay: Annotated[float, Field(ge=0), Flag(help="Weight decay.", panel=TRAINING)] = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Flag(help="Label smoothing.", panel=TRAINING)] = 0.1
    gradient_clip: Annotated[float, Field(ge=0), Flag(help="Bound on each step's gradient norm; 0 for none.",
        panel=TRAINING)] = 5.0  # fmt: skip
    threads: Annotated[int, Field(ge=0), Flag(help="Threads that each client trains with (results depend on it); 0: as "
        "many as its machine has cores.", panel=TRAINING)] = 1  # fmt: skip
    compile: Annotated[CompileChoice, Flag(help="Compile the model's training pass (auto: on a GPU, where a trial "
        "finds it faster).", panel=TRAINING)] = "auto"  # fmt: skip
    device: Annotated[DeviceName, Flag(help="Where this process computes.", panel=TRAINING, scope=Scope.LOCAL)] = "auto"

    algorithm: Annotated[AlgorithmName, Flag(help="Federated algorithm.", panel=ALGORITHM)] = "fedavg"
    mu: Annotated[
        float, Field(ge=0), Flag(help="Strength of the proximal term of fedprox and fedasync.", panel=ALGORITHM)
    ] = 0.01
    loss: Annotated[LossName, Flag(help="Loss of local training; fedrs and fedlc spare the products that a store does "
        "not sell.", panel=ALGORITHM)] = "cross-entropy"  # fmt: skip
    fedrs_alpha: Annotated[float, Field(ge=0, le=1), Flag(help="What fedrs scales the logits of products by that a "
        "store does not sell.", panel=ALGORITHM)] = 0.5  # fmt: skip
    fedlc_tau: Annotated[float, Field(ge=0), Flag(help="Strength of fedlc's margins, which are the wider the fewer "
        "photos a product has.", panel=ALGORITHM)] = 1.0  # fmt: skip
    server_lr: Annotated[float | None, Field(gt=0), Flag(help="Rate of the server's step (default: 0.1 for "
        "fedadagrad, fedadam and fedyogi, 0.6 for fedasync, whose alpha it is, else 1).", panel=ALGORITHM,
        scope=Scope.SERVER)] = None  # fmt: skip
    server_momentum: Annotated[float | None, Field(ge=0, lt=1), Flag(help="Momentum of fedavgm (default: 0.5); beta_1 "
        "of fedadagrad, fedadam and fedyogi (default: 0.9).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    server_beta2: Annotated[float, Field(ge=0, le=1), Flag(help="beta_2 of fedadam and fedyogi.", panel=ALGORITHM,
        scope=Scope.SERVER)] = 0.99  # fmt: skip
    server_tau: Annotated[float, Field(gt=0), Flag(help="Adaptivity of fedadagrad, fedadam and fedyogi: the smaller, "
        "the more adaptive.", panel=ALGORITHM, scope=Scope.SERVER)] = 1e-2  # fmt: skip
    buffer_size: Annotated[int | None, Field(ge=1), Flag(help="Uploads that make fedbuff's next version (default: 4; "
        "fedasync makes one of each upload).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    staleness_exponent: Annotated[float, Field(ge=0), Flag(help="How fast an upload of fedbuff and fedasync loses "
        "weight with age: as (1 + versions since it began) to minus this.", panel=ALGORITHM,
        scope=Scope.SERVER)] = 0.5  # fmt: skip
    max_staleness: Annotated[int | None, Field(ge=0), Flag(help="Versions that an upload of fedbuff or fedasync may "
        "be old (default: any number).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    scaffold_option: Annotated[ScaffoldOption, Flag(help="SCAFFOLD's control variates: 1 from a pass of their own over "
        "a store's photos, 2 from the gradients of training.", panel=ALGORITHM)] = "2"  # fmt: skip
    aggregator: Annotated[AggregatorName, Flag(help="How uploads become one; all but mean withstand some hostile "
        "clients (docs/explanation/robust-aggregation.md).", panel=ALGORITHM, scope=Scope.SERVER)] = "mean"  # fmt: skip
    trim: Annotated[float, Field(ge=0, lt=0.5), Flag(help="Share of a round's uploads that is assumed to be hostile: "
        "trimmed-mean cuts it at each end, multi-krum leaves it out.", panel=ALGORITHM,
        scope=Scope.SERVER)] = 0.25  # fmt: skip
    norm_bound: Annotated[float | None, Field(gt=0), Flag(help="Scale uploads down to this norm (default: take them as "
        "they are).", panel=ALGORITHM, scope=Scope.SERVER)] = None  # fmt: skip
    attack: Annotated[AttackName, Flag(help="What simulated attackers do: train on wrong labels, or multiply their "
        "uploads.", panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = "none"  # fmt: skip
    attackers: Annotated[int, Field(ge=0), Flag(help="How many stores, the first in the order of names, attack.",
        panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = 0  # fmt: skip
    attack_factor: Annotated[float | None, Flag(help="What attackers multiply their uploads by (default: -1 for "
        "sign-flip, -10 for scale).", panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip

    personalize: Annotated[PersonalizeName, Flag(help="What stays at the stores: batch-norm layers (fedbn), the "
        "last layer (fedper; fedrep trains it apart), a model of their own beside the global one (ditto), "
        "or the last global model fine-tuned (finetune).", panel=ALGORITHM)] = "none"  # fmt: skip
    fedrep_head_epochs: Annotated[int, Field(ge=1), Flag(help="Passes of fedrep over the last layer alone, before the "
        "rest is trained.", panel=ALGORITHM)] = 2  # fmt: skip
    ditto_lambda: Annotated[float, Field(ge=0), Flag(help="How strongly ditto holds a store's own model near the "
        "global one.", panel=ALGORITHM)] = 0.1  # fmt: skip
    finetune_epochs: Annotated[int, Field(ge=0), Flag(help="Passes of finetune over a store's photos, once the rounds "
        "are over.", panel=ALGORITHM)] = 8  # fmt: skip
    finetune_lr: Annotated[float, Field(gt=0), Flag(help="Learning rate of finetune.", panel=ALGORITHM)] = 0.005
    compare: Annotated[bool | None, Flag(help="After the last round, let each store choose what serves it best: the "
        "global model, its personalized one, or one trained alone, which takes it as long as all rounds (default: "
        "where there is personalization).", panel=ALGORITHM, scope=Scope.LOCAL)] = None  # fmt: skip

    codec_up: Annotated[str, Flag(help="How uploads are compressed: a chain of codecs joined by '+', such as "
        "int8+zstd, topk:0.05+int4 or drive (docs/explanation/compression.md).", panel=WIRE)] = "none"  # fmt: skip
    codec_down: Annotated[str, Flag(help="How the model's change from round to round is compressed on its way to the "
        "clients; a chain as for --codec-up.", panel=WIRE)] = "none"  # fmt: skip
    clip_norm: Annotated[float | None, Field(gt=0), Flag(help="Each client scales its upload down to this L2 norm "
        "before anything else happens to it (default: not at all).", panel=WIRE)] = None  # fmt: skip
    byte_budget: Annotated[float | None, Field(gt=0), Flag(help="Megabytes that a client may receive and send in a "
        "round, half each way; codecs are then chosen for each message.", panel=WIRE)] = None  # fmt: skip

    rounds: Annotated[int, Field(ge=1), Flag(help="Rounds to run.", panel=ROUNDS)] = 30
    min_clients: Annotated[int, Field(ge=1), Flag(help="Clients to start with; later rounds wait for as many, too.",
        panel=ROUNDS, scope=Scope.SERVER)] = 2  # fmt: skip
    fraction: Annotated[float, Field(gt=0, le=1), Flag(help="Share of the live clients drawn for a round.",
        panel=ROUNDS, scope=Scope.SERVER)] = 1.0  # fmt: skip
    sampling: Annotated[SamplingName, Flag(help="How they are drawn: uniform; by size (in proportion to photos, "
        "and counted alike); by availability (the seldom live more often).", panel=ROUNDS,
        scope=Scope.SERVER)] = "uniform"  # fmt: skip
    quorum: Annotated[int | None, Field(ge=1), Flag(help="Uploads that are enough at the deadline (default: 0.8 of "
        "those drawn).", panel=ROUNDS, scope=Scope.SERVER)] = None  # fmt: skip
    round_timeout: Annotated[float, Field(gt=0), Flag(help="Deadline of a round's training, and of its evaluation, in "
        "seconds.", panel=ROUNDS, scope=Scope.LOCAL)] = 1800.0  # fmt: skip
    straggler_factor: Annotated[float | None, Field(ge=1), Flag(help="Wait for all no longer than so many times what "
        "half of them are predicted to need, then for --quorum.", panel=ROUNDS, scope=Scope.SERVER)] = None  # fmt: skip
    over_selection: Annotated[float, Field(ge=0, le=10), Flag(help="Ask this share more clients than are wanted, and "
        "count the first to answer.", panel=ROUNDS, scope=Scope.SERVER)] = 0.0  # fmt: skip
    local_work: Annotated[LocalWork, Flag(help="Work of a client in a round: its epochs (fixed); by its speed, so that "
        "all finish together (dynamic); less where it is slow (cut).", panel=ROUNDS,
        scope=Scope.SERVER)] = "fixed"  # fmt: skip
    least_work: Annotated[float, Field(gt=0, le=1), Flag(help="Least share of its epochs that a slow "
        "client is given.", panel=ROUNDS, scope=Scope.SERVER)] = 0.25  # fmt: skip
    most_work: Annotated[float, Field(ge=1, le=100), Flag(help="Most multiple of its epochs that a fast client "
        "is given.", panel=ROUNDS, scope=Scope.SERVER)] = 2.0  # fmt: skip
    work_norm: Annotated[WorkNorm, Flag(help="Norm of their steps by which uploads of unequal work are divided (l1 is "
        "FedNova).", panel=ROUNDS, scope=Scope.SERVER)] = "l2"  # fmt: skip
    max_examples: Annotated[int, Field(ge=1), Flag(help="Most photos that one client may claim as its weight.",
        panel=ROUNDS, scope=Scope.SERVER)] = 100_000  # fmt: skip
    test_every: Annotated[int, Field(ge=1), Flag(help="Rounds from one evaluation on --test-dir to the next; the last "
        "round has one.", panel=ROUNDS, scope=Scope.SERVER)] = 1  # fmt: skip
    best_metric: Annotated[Metric, Flag(help="What decides which round is best (auto: validation accuracy, else "
        "central accuracy, else training loss).", panel=ROUNDS, scope=Scope.SERVER)] = "auto"  # fmt: skip
    patience: Annotated[int, Field(ge=0), Flag(help="Stop after so many rounds without a better one; 0: never.",
        panel=ROUNDS, scope=Scope.SERVER)] = 0  # fmt: skip
    seed: Annotated[int, Field(ge=0, lt=2**63), Flag(help="Seed of everything that is drawn.", panel=ROUNDS)] = 0

    run_dir: Annotated[Path | None, Flag(help="Folder of this run (default: go on with the newest unfinished run "
        "of the same configuration under ./runs, else a new one).", panel=RUN, scope=Scope.LOCAL)] = None  # fmt: skip
    extend: Annotated[int, Field(ge=0), Flag(help="Run so many rounds more than the run was made for.", panel=RUN,
        scope=Scope.LOCAL)] = 0  # fmt: skip
    engine: Annotated[EngineName, Flag(help="How clients are trained: one by one (local), many in one "
        "computation (vmap), what a trial finds faster of the two (auto), or on a Ray cluster (ray).", panel=RUN,
        scope=Scope.SERVER, commands=SIMULATE)] = "local"  # fmt: skip
    workers: Annotated[int, Field(ge=0), Flag(help="Worker processes; 0 trains in this one (ray: actors).", panel=RUN,
        scope=Scope.LOCAL, commands=SIMULATE)] = 0  # fmt: skip
    speeds: Annotated[str | None, Flag(help="How slow stores are in virtual time, in the order of names: with 1,1,5 "
        "the third takes five times as long; fewer numbers than stores are repeated "
        "(docs/how-to/simulate-slow-stores.md).", panel=RUN, scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip
    dropout: Annotated[float, Field(ge=0, lt=1), Flag(help="Probability that a store breaks off in the middle of its "
        "training, and is away until that would have been over.", panel=RUN, scope=Scope.SERVER,
        commands=SIMULATE)] = 0.0  # fmt: skip
    address: Annotated[str, Flag(help="HOST:PORT to listen on.", panel=RUN, scope=Scope.LOCAL,
        commands=SERVER)] = "0.0.0.0:8080"  # fmt: skip
    insecure: Annotated[bool, Flag(help="No TLS: anyone on the line can read and change what is sent.", panel=RUN,
        scope=Scope.LOCAL, commands=SERVER)] = False  # fmt: skip
    heartbeat_timeout: Annotated[float, Field(ge=5), Flag(help="Silence after which a client counts as offline, in "
        "seconds.", panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = 30.0  # fmt: skip

    @field_validator("speeds")
    @classmethod
    def _in_one_way(cls, value: str | None) -> str | None:
        """The same speeds, written otherwise, are the same run."""
        return None if value is None else ",".join(f"{number:.12g}" for number in parse_speeds(value))


class ClientConfig(Settings):
    """What a store's client is told on its own machine; all else comes from the server."""

    data_dir: Annotated[Path | None, Flag(help="The store's photos: CLASS/*.jpg.", panel=DATA, commands=CLIENT)] = None
    test_dir: Annotated[Path | None, Flag(help="Test photos (CLASS/*.jpg) on which the store's models are compared in "
        "the end (default: on those held out for validation).", panel=DATA, commands=CLIENT)] = None  # fmt: skip
    server_address: Annotated[str, Flag(help="HOST:PORT of the server.", panel=RUN, commands=CLIENT)] = "127.0.0.1:8080"
    name: Annotated[str | None, Flag(help="The client's name (default: the data folder's).", panel=RUN,
        commands=CLIENT)] = None  # fmt: skip
    state_dir: Annotated[Path | None, Flag(help="Where state between rounds is kept (default: a folder of the client's "
        "name in the user's own data directory).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    ca: Annotated[Path | None, Flag(help="The server's certificate authority (default: that of a server on this "
        "machine).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    insecure: Annotated[bool, Flag(help="No TLS: anyone on the line can read and change what is sent.", panel=RUN,
        commands=CLIENT)] = False  # fmt: skip
    device: Annotated[DeviceName, Flag(help="Where this client computes.", panel=TRAINING, commands=CLIENT)] = "auto"
    max_wait: Annotated[float | None, Field(gt=0), Flag(help="Give up after so many seconds without an answer from the "
        "server, none of them outside of --active-hours (default: never).", panel=RUN,
        commands=CLIENT)] = None  # fmt: skip
    active_hours: Annotated[str | None, Flag(help="Take part at these times of the day alone, such as 22:00-06:00 or "
        "12:00-13:30,22:00-06:00 (default: always).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    time_zone: Annotated[str | None, Flag(help="Whose clock --active-hours goes by, such as Europe/Berlin (default: "
        "this machine's).", panel=RUN, commands=CLIENT)] = None  # fmt: skip


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
            raise ValueError(f"{part.strip()!r} is no number above 0; give numbers joined by commas, such as 1,1,5")
        numbers.append(number)
    return tuple(numbers)


def select(config: RunConfig, *scopes: Scope) -> dict[str, Any]:
    """The fields of the given scopes by key, as plain values; None is left out (TOML has no null)."""
    wanted = {name for name, flag in RunConfig.flags().items() if flag.scope in scopes}
    values: dict[str, Any] = config.model_dump(mode="json", by_alias=True, include=wanted, exclude_none=True)
    return values
