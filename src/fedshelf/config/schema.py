"""All settings of a run: the TOML file's keys, the flags, and their defaults.

A key is the flag's name without the leading dashes: `client-lr = 0.05` in a file is `--client-lr 0.05`. The defaults
are the recipe of the reference benchmark (benchmarks/RESULTS.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, create_model, field_validator, model_validator

from fedshelf.config.families import FAMILIES, component_settings
from fedshelf.config.places import absolute
from fedshelf.core.choices import (
    AdmissionName,
    AttackName,
    CompileChoice,
    DeviceName,
    DistillMode,
    EngineName,
    LocalWork,
    Metric,
    NormName,
    OptimizerName,
    SamplingName,
    Schedule,
    TrainName,
    WarmStart,
    WeightsName,
    WorkNorm,
)
from fedshelf.core.settings import (
    ALGORITHM,
    DATA,
    MAX_SECONDS,
    MAX_SEED,
    MODEL,
    PRIVACY,
    ROUNDS,
    RUN,
    TRAINING,
    WIRE,
    Scope,
    Setting,
    settings_of,
)
from fedshelf.core.text import from_filesystem
from fedshelf.models.registry import MODELS

C = TypeVar("C")
SIMULATE, SERVER, CLIENT = ("simulate",), ("server",), ("client",)
DISTILL, DISTILLING = ("distill",), ("distill", "server")
RENAMED: Mapping[str, str] = {"speeds": "slowdowns"}
"""Former names of fields. They still work as keys and flags, and log the current name once."""
NEWER = (
    "norm_bound",
    "warm_start",
    "refit_head",
    "train",
    "freeze_norm",
    "feature_views",
    "adapter_rank",
    "adapter_alpha",
    "sales",
    "forecast_weight",
    "backbone_lr_factor",
    "head_lr_factor",
    "unfreeze_after",
    "average_rounds",
    "weights",
    "dp",
    "delta",
    "clipping",
    "clip_quantile",
    "clip_rate",
    "noise_at",
    "projection",
    "he_scope",
    "mode",
    "distill_weight",
    "temperature",
    "ensemble_steps",
    "ensemble_lr",
)
"""Fields that version 0.1 did not have and that always have a value: a run's text leaves out their defaults."""
_WORDS: Mapping[str, tuple[str, ...]] = {"norm_bound": ("auto", "off"), "clip_norm": ("adaptive",)}
"""Words that fields of numbers accept."""
_FIRST = (
    "mu", "loss", "fedrs_alpha", "fedlc_tau", "server_lr", "server_momentum", "server_beta2", "server_tau",
    "buffer_size", "staleness_exponent", "max_staleness", "scaffold_option",
)  # fmt: skip
"""Fields with a fixed relative order, because a run's text, and so its digest, has always had them in this order."""
_MORE_THAN_THE_HEAD = ("train", "all", "norm", "adapter")


class Settings(BaseModel):
    """Settings in a TOML file or from flags. Unknown keys are errors; keys have dashes.

    Attributes:
        order: field names in the order of files and help; empty means the order of declaration.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, alias_generator=lambda name: name.replace("_", "-"),
        allow_inf_nan=False,
    )  # fmt: skip
    order: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def flags(cls) -> dict[str, Setting]:
        """Return each field's `Setting`."""
        fields = {name: cls.model_fields[name] for name in cls.order or cls.model_fields}
        return {name: next(m for m in field.metadata if isinstance(m, Setting)) for name, field in fields.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        """Make paths absolute, so that a run is the same from another working directory."""
        return absolute(value) if isinstance(value, Path) else value


def with_components(own: "type[RunConfig]") -> "type[RunConfig]":
    """Add the settings that components declare, after the key that `component_settings` gives for them."""
    flags, components = own.flags(), component_settings()
    fields: dict[str, Any] = {
        family: (Annotated[Literal[tuple(registry)], flags[family]], own.model_fields[family].default)
        for family, registry in FAMILIES.items()
    }
    for settings in components.values():
        fields |= {key: (Annotated[setting.type, setting], setting.default) for key, setting in settings.items()}
    made = create_model(own.__name__, __base__=own, __module__=__name__, __doc__=own.__doc__, **fields)
    order = [name for field in own.model_fields for name in (field, *components.get(field, ()))]
    first = iter(_FIRST)
    made.order = tuple(next(first) if name in _FIRST else name for name in order)
    return made


@with_components
class RunConfig(Settings):
    """A run's configuration: the fields below and those that components declare (`config.families`)."""

    data_dir: Annotated[Path | None, Setting(help="Folder of the stores, with one folder of photos per store.",
        panel=DATA, scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip
    test_dir: Annotated[Path | None, Setting(help="Test photos (CLASS/*.jpg) for evaluation at the server.", panel=DATA,
        scope=Scope.SERVER)] = None  # fmt: skip
    catalogue: Annotated[Path | None, Setting(help="File with the class names: one per line, .csv with a header, or "
        "JSON (default: the folder names of the stores).", panel=DATA, scope=Scope.SERVER)] = None  # fmt: skip
    aliases: Annotated[Path | None, Setting(help="CSV file with the columns alias,class: other names that stores use "
        "for a class.", panel=DATA, scope=Scope.SERVER)] = None  # fmt: skip
    confirm_catalogue: Annotated[bool, Setting(help="Accept an unusual catalogue of the stores' folder names, such as "
        "one to which a single store adds far more products than the others have.", panel=DATA, scope=Scope.LOCAL,
        commands=SERVER)] = False  # fmt: skip
    image_size: Annotated[int, Setting(help="Side of the training photos in pixels.", ge=8, le=2048, panel=DATA)] = 48
    val_fraction: Annotated[float, Setting(help="Share of a store's photos held out for validation.", ge=0, lt=1,
        panel=DATA)] = 0.1  # fmt: skip
    augment: Annotated[bool, Setting(help="Randomly crop, flip, rotate, and relight training photos.",
        panel=DATA)] = True  # fmt: skip

    model: Annotated[str, Setting(help=f"{', '.join(MODELS)}, the name of a timm model, or MODULE:FUNCTION, "
        "a function of yours that takes the number of classes (see docs/how-to/use-your-own-model.md).",
        panel=MODEL)] = "resnet10"  # fmt: skip
    model_digest: Annotated[str | None, Setting(help="Digest that the source of --model MODULE:FUNCTION must have "
        "(default: what it has when the run is created).", panel=MODEL, commands=())] = None  # fmt: skip
    model_path: Annotated[Path | None, Setting(help="Folder of the module of --model MODULE:FUNCTION, if Python does "
        "not find it.", panel=MODEL, scope=Scope.LOCAL)] = None  # fmt: skip
    width: Annotated[
        int,
        Setting(help="Channels of resnet10's first block.", ge=1, le=1024, panel=MODEL, only_with=("model", *MODELS)),
    ] = 16
    norm: Annotated[NormName, Setting(help="Normalization layers.", panel=MODEL)] = "batch"
    init: Annotated[Path | None, Setting(help="Start from the weights in this file (safetensors, or a torch file of "
        "tensors).", panel=MODEL, scope=Scope.SERVER)] = None  # fmt: skip
    pretrained: Annotated[bool, Setting(help="Start from pretrained weights: those of an installed package "
        "(fedshelf[weights]: tf_efficientnet_lite0), otherwise timm's (needs internet). Changes the defaults of some "
        "other flags (see docs/how-to/start-from-pretrained-weights.md).", panel=MODEL,
        scope=Scope.SERVER)] = False  # fmt: skip

    mode: Annotated[DistillMode, Setting(help="Where the student learns: in the stores (federated), at the server from "
        "photos there (central), or in the stores and, from what their models say together, at the server "
        "(ensemble).", panel=MODEL, scope=Scope.SERVER, commands=DISTILL)] = "federated"  # fmt: skip
    teacher: Annotated[Path | None, Setting(help="Run whose model the stores learn from besides their labels: its "
        "folder or id; a store that has chosen a model of its own in that run learns from that one. Or a model's "
        "folder, which is the same for all (see docs/how-to/distill.md).", panel=MODEL, scope=Scope.SERVER,
        commands=DISTILLING)] = None  # fmt: skip
    teacher_digest: Annotated[str | None, Setting(help="Digest that the model of --teacher must have (default: what "
        "it has when the run is created).", panel=MODEL, commands=())] = None  # fmt: skip
    distill_weight: Annotated[float, Setting(help="Share of the teacher in the loss (alpha); the labels have the "
        "rest. 0 trains without a teacher.", ge=0, le=1, panel=MODEL, only_with=("teacher",),
        commands=DISTILLING)] = 0.5  # fmt: skip
    temperature: Annotated[float, Setting(help="What the logits of teacher and student are divided by (T).", gt=0,
        le=100, panel=MODEL, only_with=("teacher",), commands=DISTILLING)] = 2.0  # fmt: skip
    unlabelled_dir: Annotated[Path | None, Setting(help="Photos at the server, of any products and in any folders, on "
        "which the stores' models of a round are distilled into one (FedDF).", panel=MODEL, scope=Scope.SERVER,
        commands=DISTILLING)] = None  # fmt: skip
    ensemble_steps: Annotated[int, Setting(help="With --unlabelled-dir: steps at the server after each round.", ge=1,
        panel=MODEL, scope=Scope.SERVER, only_with=("unlabelled_dir",), commands=DISTILLING)] = 100  # fmt: skip
    ensemble_lr: Annotated[float, Setting(help="With --unlabelled-dir: first learning rate of these steps (Adam).",
        gt=0, panel=MODEL, scope=Scope.SERVER, only_with=("unlabelled_dir",),
        commands=DISTILLING)] = 0.001  # fmt: skip

    train: Annotated[TrainName, Setting(help="What is trained: all, the output layer (head; photos are then computed "
        "up to it once), or that and the normalization layers (norm) or low-rank adapters of the other linear layers "
        "(adapter), or what --sales adds alone (sales). The rest is sent to each store once.",
        panel=MODEL)] = "all"  # fmt: skip
    freeze_norm: Annotated[bool, Setting(help="Leave the statistics of batch normalization as they are, and normalize "
        "with them in training, too.", panel=MODEL, only_with=("train", "all", "norm"))] = False  # fmt: skip
    feature_views: Annotated[int, Setting(help="With --train head: views of each photo that are computed once, the "
        "photo itself and random ones.", ge=1, le=64, panel=MODEL,
        only_with=("train", "head", "sales"))] = 1  # fmt: skip
    sales: Annotated[bool, Setting(help="Train with each store's sales (sales.csv next to its photos): they say what a "
        "photo may show, and the units of the next 7 days are forecast. Needs --train head or sales (see "
        "docs/how-to/train-with-sales.md).", panel=MODEL)] = False  # fmt: skip
    forecast_weight: Annotated[float, Setting(help="With --sales: weight of the forecast's loss, where that of the "
        "products in photos has 1; 0 trains no forecast.", ge=0, le=100, panel=MODEL,
        only_with=("sales",))] = 1.0  # fmt: skip
    adapter_rank: Annotated[int, Setting(help="With --train adapter: rank of the adapters; bytes and capacity grow "
        "with it.", ge=1, le=256, panel=MODEL, only_with=("train", "adapter"))] = 4  # fmt: skip
    adapter_alpha: Annotated[float, Setting(help="With --train adapter: the adapters' output is multiplied by this "
        "number divided by their rank.", gt=0, panel=MODEL, only_with=("train", "adapter"))] = 8.0  # fmt: skip

    optimizer: Annotated[OptimizerName, Setting(help="Local optimizer.", panel=TRAINING)] = "sgd"
    client_lr: Annotated[float, Setting(help="Learning rate of local training.", gt=0, panel=TRAINING)] = 0.05
    lr_schedule: Annotated[Schedule, Setting(help="Schedule of the learning rate over the rounds.",
        panel=TRAINING)] = "cosine"  # fmt: skip
    warmup_rounds: Annotated[int, Setting(help="Rounds of linear warmup.", ge=0, panel=TRAINING)] = 2
    local_epochs: Annotated[int, Setting(help="Local epochs per round.", ge=1, panel=TRAINING)] = 2
    batch_size: Annotated[int, Setting(help="Photos per training step.", ge=1, panel=TRAINING)] = 16
    dynamic_batch: Annotated[bool, Setting(help="Let each client use the batch size that is fastest on its machine, up "
        "to 4 times --batch-size, with a learning rate to match.", panel=TRAINING)] = False  # fmt: skip
    momentum: Annotated[
        float, Setting(help="Nesterov momentum of SGD.", ge=0, lt=1, panel=TRAINING, only_with=("optimizer", "sgd"))
    ] = 0.9
    weight_decay: Annotated[float, Setting(help="Weight decay.", ge=0, panel=TRAINING)] = 5e-4
    label_smoothing: Annotated[float, Setting(help="Label smoothing.", ge=0, lt=1, panel=TRAINING)] = 0.1
    gradient_clip: Annotated[float, Setting(help="Maximum norm of each step's gradient; 0 for no limit.", ge=0,
        panel=TRAINING)] = 5.0  # fmt: skip
    backbone_lr_factor: Annotated[float, Setting(help="Learning rate of all but the output layer, as a multiple of "
        "--client-lr; gradients of the two are then clipped apart.", ge=0, panel=TRAINING,
        only_with=_MORE_THAN_THE_HEAD)] = 1.0  # fmt: skip
    head_lr_factor: Annotated[float, Setting(help="Learning rate of the output layer, as a multiple of --client-lr; 0 "
        "leaves it as it is.", ge=0, panel=TRAINING)] = 1.0  # fmt: skip
    unfreeze_after: Annotated[int, Setting(help="Rounds in which the output layer alone is trained, before the rest.",
        ge=0, panel=TRAINING, only_with=_MORE_THAN_THE_HEAD)] = 0  # fmt: skip
    threads: Annotated[int, Setting(help="Training threads per client (results depend on it); 0 for one per core.",
        ge=0, le=1024, panel=TRAINING)] = 1  # fmt: skip
    compile: Annotated[CompileChoice, Setting(help="Compile the training step.", panel=TRAINING)] = "off"
    device: Annotated[DeviceName, Setting(help="Device that this process computes on.", panel=TRAINING,
        scope=Scope.LOCAL)] = "auto"  # fmt: skip

    algorithm: Annotated[str, Setting(help="Federated algorithm.", panel=ALGORITHM)] = "fedavg"
    loss: Annotated[str, Setting(help="Loss of local training; fedrs and fedlc protect the products that a store "
        "does not sell.", panel=ALGORITHM)] = "cross-entropy"  # fmt: skip
    warm_start: Annotated[WarmStart, Setting(help="Before round 1, compute the output layer in closed form (ridge).",
        panel=ALGORITHM)] = "none"  # fmt: skip
    refit_head: Annotated[bool, Setting(help="After the last round, compute the output layer in closed form again, "
        "for the trained other layers.", panel=ALGORITHM)] = False  # fmt: skip
    average_rounds: Annotated[int, Setting(help="Replace the last round's model by the mean of the models of this "
        "many last rounds.", ge=1, panel=ALGORITHM, scope=Scope.SERVER)] = 1  # fmt: skip
    weights: Annotated[WeightsName, Setting(help="How uploads are weighted: by their number of photos (examples), or "
        "all alike (equal), for stores that do not report this number.", panel=ALGORITHM)] = "examples"  # fmt: skip
    aggregator: Annotated[str, Setting(help="How uploads are combined; all but mean withstand some hostile "
        "clients (see docs/explanation/robust-aggregation.md).", panel=ALGORITHM,
        scope=Scope.SERVER)] = "mean"  # fmt: skip
    norm_bound: Annotated[float | Literal["auto", "off"], Setting(help="Maximum norm of an upload; larger ones are "
        "scaled down: a number, auto (5 times the median of the round's uploads, where there are 4 or more), or off.",
        panel=ALGORITHM, scope=Scope.SERVER)] = "auto"  # fmt: skip
    attack: Annotated[AttackName, Setting(help="What simulated attackers do: train on wrong labels, or multiply their "
        "uploads.", panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = "none"  # fmt: skip
    attackers: Annotated[int, Setting(help="Number of attacking stores, the first by name.", ge=0, panel=ALGORITHM,
        scope=Scope.SERVER, commands=SIMULATE)] = 0  # fmt: skip
    attack_factor: Annotated[float | None, Setting(help="Factor that attackers multiply their uploads by (default: -1 "
        "for sign-flip, -10 for scale).", panel=ALGORITHM, scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip

    personalize: Annotated[str, Setting(help="What stays at the stores: batch-norm layers (fedbn), the "
        "last layer (fedper, fedrep), a second model (ditto), the gate of --sales (gate), or the final model after "
        "fine-tuning (finetune).",
        panel=ALGORITHM)] = "none"  # fmt: skip
    compare: Annotated[bool | None, Setting(help="After the last round, let each store keep the best of the global "
        "model, its personalized one and one trained alone, which takes as long as all rounds did (default: with "
        "--personalize).", panel=ALGORITHM, scope=Scope.LOCAL)] = None  # fmt: skip

    codec_up: Annotated[str, Setting(help="How uploads are compressed: codecs joined by '+', such as int8+zstd, "
        "topk:0.05+int4 or drive (see docs/explanation/compression.md).", panel=WIRE)] = "none"  # fmt: skip
    codec_down: Annotated[str, Setting(help="How the model's changes are compressed on their way to the clients, as "
        "for --codec-up.", panel=WIRE)] = "none"  # fmt: skip
    dp: Annotated[str, Setting(help="Differential privacy: for each photo, by noise in the stores' own training "
        "(sample), for each store, by noise at the server (client), or none (see "
        "docs/explanation/differential-privacy.md).", panel=PRIVACY)] = "none"  # fmt: skip
    byte_budget: Annotated[float | None, Setting(help="Megabytes that a client may receive and send per round, half "
        "each way; codecs are then chosen per message.", gt=0, panel=WIRE)] = None  # fmt: skip

    rounds: Annotated[int, Setting(help="Number of rounds (--algorithm ridge: 1 by default).", ge=1, panel=ROUNDS)] = 30
    min_clients: Annotated[int, Setting(help="Clients that must join before the run starts.", ge=1, panel=ROUNDS,
        scope=Scope.SERVER)] = 2  # fmt: skip
    fraction: Annotated[float, Setting(help="Share of the live clients drawn for each round.", gt=0, le=1, panel=ROUNDS,
        scope=Scope.SERVER)] = 1.0  # fmt: skip
    sampling: Annotated[SamplingName, Setting(help="How clients are drawn: uniform, by size (in proportion to their "
        "photos, then weighted equally), or by availability (favoring those that are rarely live).", panel=ROUNDS,
        scope=Scope.SERVER)] = "uniform"  # fmt: skip
    quorum: Annotated[int | None, Setting(help="Uploads that a round needs by its deadline (default: more than two "
        "thirds of 4 or more drawn, 2 of 3, else all).", ge=1, panel=ROUNDS, scope=Scope.SERVER)] = None  # fmt: skip
    round_timeout: Annotated[float, Setting(help="Deadline of a round's training, and again of its evaluation, in "
        "seconds.", gt=0, le=MAX_SECONDS, panel=ROUNDS, scope=Scope.LOCAL)] = 1800.0  # fmt: skip
    straggler_factor: Annotated[float | None, Setting(help="Wait for all clients no longer than this many times what "
        "half of them are predicted to need, then for --quorum.", ge=1, panel=ROUNDS,
        scope=Scope.SERVER)] = None  # fmt: skip
    over_selection: Annotated[float, Setting(help="Draw this share of extra clients, and use the first uploads.",
        ge=0, le=10, panel=ROUNDS, scope=Scope.SERVER)] = 0.0  # fmt: skip
    local_work: Annotated[LocalWork, Setting(help="Work of a client per round: its epochs (fixed), as much as its "
        "speed allows so that all finish together (dynamic), or less where it is slow (cut).", panel=ROUNDS,
        scope=Scope.SERVER)] = "fixed"  # fmt: skip
    least_work: Annotated[float, Setting(help="Minimum share of its epochs for a slow client.", gt=0, le=1,
        panel=ROUNDS, scope=Scope.SERVER, only_with=("local_work", "dynamic", "cut"))] = 0.25  # fmt: skip
    most_work: Annotated[float, Setting(help="Maximum multiple of its epochs for a fast client.", ge=1, le=100,
        panel=ROUNDS, scope=Scope.SERVER, only_with=("local_work", "dynamic"))] = 2.0  # fmt: skip
    work_norm: Annotated[WorkNorm, Setting(help="Norm by which uploads of unequal work are normalized (l1 is FedNova).",
        panel=ROUNDS, scope=Scope.SERVER, only_with=("local_work", "dynamic", "cut"))] = "l2"  # fmt: skip
    max_examples: Annotated[int, Setting(help="Maximum number of photos that a client can claim as its weight.", ge=1,
        le=10**12, panel=ROUNDS, scope=Scope.SERVER)] = 100_000  # fmt: skip
    test_every: Annotated[int, Setting(help="Evaluate on --test-dir every N rounds, and after the last one.", ge=1,
        panel=ROUNDS, scope=Scope.SERVER, only_with=("test_dir",))] = 1  # fmt: skip
    best_metric: Annotated[Metric, Setting(help="Metric that selects the best round (auto: validation accuracy, else "
        "central accuracy, else training loss).", panel=ROUNDS, scope=Scope.SERVER)] = "auto"  # fmt: skip
    patience: Annotated[int, Setting(help="Stop after this many rounds without improvement; 0 for never.", ge=0,
        panel=ROUNDS, scope=Scope.SERVER)] = 0  # fmt: skip
    seed: Annotated[int, Setting(help="Random seed.", ge=0, le=MAX_SEED, panel=ROUNDS)] = 0

    run_dir: Annotated[Path | None, Setting(help="Folder of the run (default: resume the newest unfinished run with "
        "the same settings in ./runs, else create one).", panel=RUN, scope=Scope.LOCAL)] = None  # fmt: skip
    extend: Annotated[int, Setting(help="Run this many more rounds than the run was created for.", ge=0, panel=RUN,
        scope=Scope.LOCAL)] = 0  # fmt: skip
    engine: Annotated[EngineName, Setting(help="How clients are trained: one by one (local), many in one computation "
        "(vmap), the faster of the two by trial (auto), or on a Ray cluster (ray).", panel=RUN, scope=Scope.SERVER,
        commands=SIMULATE)] = "local"  # fmt: skip
    workers: Annotated[int, Setting(help="Worker processes; 0 trains in this process (with --engine ray: actors).",
        ge=0, le=1024, panel=RUN, scope=Scope.LOCAL, commands=SIMULATE)] = 0  # fmt: skip
    slowdowns: Annotated[str | None, Setting(help="How slow stores are in virtual time, in the order of names: with "
        "1,1,5 the third takes five times as long. A shorter list is repeated (see "
        "docs/how-to/simulate-slow-stores.md).", panel=RUN, scope=Scope.SERVER, commands=SIMULATE)] = None  # fmt: skip
    dropout: Annotated[float, Setting(help="Probability that a store fails in the middle of its training, and stays "
        "away until it would have finished.", ge=0, lt=1, panel=RUN, scope=Scope.SERVER,
        commands=SIMULATE)] = 0.0  # fmt: skip
    address: Annotated[str, Setting(help="HOST:PORT to listen on.", panel=RUN, scope=Scope.LOCAL,
        commands=SERVER)] = "0.0.0.0:8080"  # fmt: skip
    advertise: Annotated[tuple[str, ...], Setting(help="HOST[:PORT] under which clients reach this server, if it is "
        "not this machine's name or address (NAT, Docker, a DNS alias); added to the certificate. Can be repeated.",
        panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = ()  # fmt: skip
    insecure: Annotated[bool, Setting(help="Disable TLS: anyone on the network can read and change what is sent.",
        panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = False  # fmt: skip
    tls_cert: Annotated[Path | None, Setting(help="Certificate of this server (PEM) from an authority of your own "
        "(default: FedShelf makes one).", panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = None  # fmt: skip
    tls_key: Annotated[Path | None, Setting(help="Key of --tls-cert (PEM).", panel=RUN, scope=Scope.LOCAL,
        commands=SERVER)] = None  # fmt: skip
    admission: Annotated[AdmissionName, Setting(help="Who may take part: token (stores that were enrolled or hold a "
        "token), or open (anyone, under any name that is not taken; for trials).", panel=RUN, scope=Scope.LOCAL,
        commands=SERVER)] = "token"  # fmt: skip
    invite: Annotated[int | None, Setting(help="Stores that the token printed at the start admits (default: "
        "--min-clients; 0 for no token).", ge=0, panel=RUN, scope=Scope.LOCAL, commands=SERVER,
        only_with=("admission", "token"))] = None  # fmt: skip
    home: Annotated[Path | None, Setting(help="Folder of the chain's identity and certificates (default: "
        "$FEDSHELF_HOME).", panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = None  # fmt: skip
    heartbeat_timeout: Annotated[float, Setting(help="Seconds of silence after which a client counts as offline.", ge=5,
        le=MAX_SECONDS, panel=RUN, scope=Scope.LOCAL, commands=SERVER)] = 30.0  # fmt: skip

    @model_validator(mode="after")
    def _implied(self) -> Self:
        """Fill in what the given settings imply for others."""
        self.__dict__.update(implied({name: getattr(self, name) for name in self.model_fields_set}))
        return self

    @field_validator("slowdowns")
    @classmethod
    def _in_one_way(cls, value: str | None) -> str | None:
        """Normalize the slowdowns, so that equal values give the same run."""
        return None if value is None else ",".join(f"{number:.12g}" for number in parse_slowdowns(value))

    @field_validator("norm_bound", "clip_norm", mode="before", check_fields=False)
    @classmethod
    def _word_or_positive(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept a number above 0, also as a flag's text, and a few words."""
        words = _WORDS[str(info.field_name)]
        if value is None and info.field_name == "clip_norm":
            return None
        try:
            number = value if value in words or isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = None
        if number in words or (isinstance(number, float) and 0 < number < math.inf):
            return number
        raise ValueError(f"must be {', '.join(words)}, or a number above 0")

    def settings_of(self, component: Callable[..., C]) -> C:
        """Create `component` with this run's settings, or its own default where the run has none."""
        given = {name: getattr(self, setting.key) for name, setting in settings_of(component).items()}
        return component(**{name: value for name, value in given.items() if value is not None})


class ClientConfig(Settings):
    """A client's local settings; everything else comes from the server."""

    data_dir: Annotated[Path | None, Setting(help="The store's photos, with one folder per product.", panel=DATA,
        commands=CLIENT)] = None  # fmt: skip
    test_dir: Annotated[Path | None, Setting(help="Test photos (CLASS/*.jpg) to compare the store's models on "
        "(default: its validation photos).", panel=DATA, commands=CLIENT)] = None  # fmt: skip
    server_address: Annotated[str, Setting(help="HOST:PORT of the server.", panel=RUN,
        commands=CLIENT)] = "127.0.0.1:8080"  # fmt: skip
    name: Annotated[str | None, Setting(help="Name of this store (default: the name used last, otherwise the data "
        "folder's name, or FOLDER-HOST for local_data, data, photos, and train).", panel=RUN,
        commands=CLIENT)] = None  # fmt: skip
    state_dir: Annotated[Path | None, Setting(help="Folder for state between rounds (default: a folder of this name in "
        "$FEDSHELF_HOME).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    token: Annotated[str | None, Setting(help="Token that admits this store, once; - reads it from standard input "
        "(default: $FEDSHELF_TOKEN; a server on this machine needs none).", panel=RUN,
        commands=CLIENT)] = None  # fmt: skip
    token_file: Annotated[Path | None, Setting(help="File that holds the token.", panel=RUN,
        commands=CLIENT)] = None  # fmt: skip
    ca: Annotated[Path | None, Setting(help="Certificate authority of the server (default: the one that the token "
        "named, or that of a server on this machine).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    insecure: Annotated[bool, Setting(help="Disable TLS: anyone on the network can read and change what is sent.",
        panel=RUN, commands=CLIENT)] = False  # fmt: skip
    policy: Annotated[str, Setting(help="What this store does for a server: standard, strict, open (no limits, for "
        "trials), or a TOML file (see docs/how-to/limit-what-a-server-may-do.md).", panel=RUN,
        commands=CLIENT)] = "standard"  # fmt: skip
    allow_model: Annotated[tuple[str, ...], Setting(help="Name of a model that this store trains besides those of its "
        "policy, such as mymodels.small:make_model. Can be repeated.", panel=RUN, commands=CLIENT)] = ()  # fmt: skip
    model_path: Annotated[Path | None, Setting(help="Folder of the modules of allowed models, if Python does not "
        "find them.", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    withdraw: Annotated[bool, Setting(help="Take this store's contribution out of the model, then exit "
        "(--algorithm ridge).", panel=RUN, commands=CLIENT)] = False  # fmt: skip
    device: Annotated[DeviceName, Setting(help="Device that this client computes on.", panel=TRAINING,
        commands=CLIENT)] = "auto"  # fmt: skip
    max_wait: Annotated[float | None, Setting(help="Give up after this many seconds without an answer from the server, "
        "not counting time outside --active-hours (default: never).", gt=0,
        le=MAX_SECONDS, panel=RUN, commands=CLIENT)] = None  # fmt: skip
    active_hours: Annotated[str | None, Setting(help="Train only at these times of day, such as 22:00-06:00 or "
        "12:00-13:30,22:00-06:00 (default: always).", panel=RUN, commands=CLIENT)] = None  # fmt: skip
    time_zone: Annotated[str | None, Setting(help="Time zone of --active-hours, such as Europe/Berlin (default: this "
        "machine's).", panel=RUN, commands=CLIENT)] = None  # fmt: skip


_FITS_A_CLOSED_FORM: Mapping[str, Sequence[Any]] = {
    "algorithm": ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "scaffold"),
    "aggregator": ("mean",),
    "personalize": ("none", "finetune", "gate"),
    "dp": ("none",),
    "clip_norm": (None,),
    "attack": ("none",),
}
"""Values of settings that go with a head in closed form by default, the usual one first."""


_LEAST_SUMMANDS = 64  # of the `modular` codec without SUMMANDS


def modular_for(bits: int, summands: int) -> str:
    """The `modular` codec with room for a sum of so many codes; at least 64, which its text leaves out."""
    return f"modular:{bits}" if summands <= _LEAST_SUMMANDS else f"modular:{bits}:0:{summands}"


def implied(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings that are `given` imply for others, by field; empty for those that are given themselves."""
    return {name: value for name, value in recommended(given).items() if name not in given}


def recommended(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values, by field, that suit the settings that are `given`, where they are not the usual defaults."""
    found: dict[str, Any] = {}
    if given.get("mode") == "central":
        found["min_clients"] = 1
    if given.get("secagg") or given.get("he"):  # weights by examples need room
        bits = 16 if given.get("weights") == "equal" else 32
        found |= {"codec_up": modular_for(bits, 2 * (given.get("min_clients") or 3)), "min_clients": 3}
        if given.get("algorithm") == "fedbuff":  # whose weights are up to 16
            size = given.get("buffer_size") or 4
            found |= {"codec_up": modular_for(32, 16 * size), "min_clients": max(3, size)}
    if given.get("algorithm") == "ridge":
        all_at_once = given.get("fraction", 1.0) == 1.0 and not given.get("dropout")
        return {**found, "train": "head", **({"rounds": 1} if all_at_once or given.get("secagg") else {})}
    if given.get("sales"):  # smoothed labels would make the image model work against the store's mix of products
        found |= {"train": "head", "personalize": "gate", "label_smoothing": 0.0}
    if given.get("dp") == "sample":  # each photo's gradient is bounded
        found["gradient_clip"] = 0.0
    # A head in closed form is shared, made of exact sums that all live stores send at once, and kept as it is.
    fits = all(given.get(name, values[0]) in values for name, values in _FITS_A_CLOSED_FORM.items())
    fits = fits and given.get("warm_start", "ridge") == "ridge" and given.get("val_fraction", 0.1) > 0
    if given.get("sales") and given.get("pretrained") and given.get("train", "head") == "head" and fits:
        found |= {"warm_start": "ridge", "head_lr_factor": 0.1}
    if not given.get("pretrained") or given.get("train", found.get("train", "all")) != "all":
        return found
    # Fine-tuning; measured in docs/how-to/start-from-pretrained-weights.md.
    found |= {"client_lr": 0.01, "warmup_rounds": 0}
    if given.get("personalize") != "fedbn":  # whose statistics start fresh at the stores
        found["freeze_norm"] = True
    if fits:
        found |= {"warm_start": "ridge", "refit_head": True, "head_lr_factor": 0.0}
    return found


def parse_slowdowns(text: str) -> tuple[float, ...]:
    """Parse the value of `--slowdowns`.

    Raises:
        ValueError: `text` is not a comma-separated list of positive numbers.
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
    """Return the fields of the given scopes as plain values by key, without None (TOML has no null)."""
    wanted = [name for name, flag in RunConfig.flags().items() if flag.scope in scopes]
    values = config.model_dump(mode="json", include=set(wanted), exclude_none=True)
    values |= {name: from_filesystem(str(path)) for name in values if isinstance(path := getattr(config, name), Path)}
    return {name.replace("_", "-"): values[name] for name in wanted if name in values}
