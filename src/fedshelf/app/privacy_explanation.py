"""What a store's policy means, before the store joins: what would leave, who learns what, ε, bytes, and seconds."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedshelf.app.components import algorithm_of, check_setup, most_epochs
from fedshelf.app.model import bound_model_of
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import PolicyError
from fedshelf.core.messages import Comparison, Evaluation, Failure, Join, Ready, Upload
from fedshelf.core.text import counted
from fedshelf.data.catalogue import Catalogue
from fedshelf.privacy.policy import UNLIMITED, Policy
from fedshelf.privacy.withholding import WITHHELD_BY
from fedshelf.training.loop import differentiate_one
from fedshelf.training.timing import noise_runs, seconds

BYTES_PER_VALUE = {"float32": 4, "float64": 8}
MOST_VECTORS = 2  # as long as the model, in an upload: the update and a control variate
MESSAGES = (Join, Ready, Upload, Evaluation, Comparison, Failure)
_PURPOSES = {Upload: "train", Evaluation: "evaluate", Comparison: "compare"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """A field of a message to the server.

    Attributes:
        message: the message.
        field: the field.
        state: `clear`, `noised`, `withheld`, or `not sent` with its message.
        key: the policy's key that decides this; "" if none does.
    """

    message: str
    field: str
    state: str
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What a policy means.

    Attributes:
        fields: all fields of all messages.
        learns: who learns what, in sentences.
        epsilon: maximum ε in 365 days; None if there is no bound.
        delta: δ of that ε.
        protection: what bounds ε, in a sentence.
        bytes_up: bytes of an upload before compression, of a run; otherwise the maximum, None if there is none.
        bytes_per_day: maximum bytes of uploads in 24 hours; None if there is none.
        seconds_per_round: predicted duration of a round's training on this machine; None if it is unknown.
        refusals: why the policy refuses the run; empty if it does not.
        is_of_a_run: whether a run's configuration was given.
    """

    fields: tuple[Released, ...]
    learns: tuple[str, ...]
    epsilon: float | None
    delta: float | None
    protection: str
    bytes_up: int | None
    bytes_per_day: int | None
    seconds_per_round: float | None
    refusals: tuple[str, ...]
    is_of_a_run: bool

    def to_record(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return dataclasses.asdict(self)


def released(policy: Policy) -> tuple[Released, ...]:
    """What a policy lets leave, field by field."""
    return tuple(_released(policy, kind, field.name) for kind in MESSAGES for field in dataclasses.fields(kind))


def explain(
    policy: Policy, config: RunConfig | None = None, *, num_classes: int = 2, num_train: int | None = None
) -> Explanation:
    """Explain a policy.

    Args:
        policy: the policy.
        config: the configuration of a run; None explains what any run can ask for.
        num_classes: the products of that run.
        num_train: the store's training photos, to predict how long a round takes.

    Raises:
        ModelError: the run's model cannot be built.
    """
    limits, round_seconds, refusals = policy.limits, None, list[str]()
    num_bytes = _limited(MOST_VECTORS * BYTES_PER_VALUE["float32"], limits.max_parameters)
    if config is not None:
        refusals = _refusals(policy, config, num_train)
        names = tuple(f"product-{number}" for number in range(num_classes))
        bound = bound_model_of(config, Catalogue(names, tuple((name,) for name in names)), device="auto")
        algorithm = algorithm_of(config).for_model(bound.params.layout, bound.output_layer)
        vectors = algorithm.vectors(bound.params.layout).values()
        num_bytes = sum(BYTES_PER_VALUE[vector.dtype] * vector.size for vector in vectors)
        if num_train is not None:
            runs = noise_runs([bound], image_size=config.image_size, batch_size=config.batch_size)
            steps = config.local_epochs * math.ceil(num_train / config.batch_size)
            round_seconds = steps * seconds(lambda: differentiate_one(runs), bound.compute.device)
    is_bounded = policy.protection.required == "sample-dp"
    return Explanation(
        fields=released(policy),
        learns=_learns(policy),
        epsilon=policy.protection.epsilon if is_bounded else None,
        delta=policy.protection.delta if is_bounded else None,
        protection=_PROTECTIONS[policy.protection.required],
        bytes_up=num_bytes,
        bytes_per_day=None if num_bytes is None else _limited(num_bytes, limits.rounds_per_day),
        seconds_per_round=round_seconds,
        refusals=tuple(refusals),
        is_of_a_run=config is not None,
    )


_PROTECTIONS: Mapping[str, str] = {
    "none": "No noise is required, so no ε bounds what updates reveal of a photo.",
    "sample-dp": "Runs must add noise at the store. ε is for one photo, over all runs and servers. It holds for the "
    "update, and not for counts, accuracies, and times.",
    "secagg": "Runs must use secure aggregation, which this version does not have: the store takes part in no run.",
    "he": "Runs must use homomorphic encryption, which this version does not have: the store takes part in no run.",
}


def _limited(each: int, most: int) -> int | None:
    """The product; None if `most` is no limit."""
    return None if most >= UNLIMITED else each * most


def _released(policy: Policy, kind: type[Any], field: str) -> Released:
    def made(state: str, key: str = "") -> Released:
        return Released(message=kind.__name__, field=field, state=state, key=key)

    purpose, key = _PURPOSES.get(kind, ""), WITHHELD_BY.get(kind, {}).get(field, "")
    sums = kind is Upload and policy.purposes.closed_form and policy.metrics.example_counts
    if purpose and not getattr(policy.purposes, purpose) and not sums:
        return made("not sent", f"purposes.{purpose}")
    if kind is Evaluation and not policy.metrics.example_counts:
        return made("not sent", "metrics.example-counts")
    if key:
        shown = "metrics.per-product" if key == "counts_products" else f"metrics.{key.replace('_', '-')}"
        return made("clear" if getattr(policy.metrics, key) else "withheld", shown)
    if kind is Upload and field == "vectors":
        return made("noised" if policy.protection.required == "sample-dp" else "clear", "protection.required")
    return made("clear", f"purposes.{purpose}" if purpose else "")


def _learns(policy: Policy) -> tuple[str, ...]:
    metrics, is_noised = policy.metrics, policy.protection.required == "sample-dp"
    server = [
        "each update, with noise that bounds what it says of one photo"
        if is_noised
        else "each update, from which parts of photos can sometimes be reconstructed"
    ] * policy.purposes.train
    may_sum = policy.purposes.closed_form and metrics.example_counts
    server += ["sums of its photos' features, in runs that compute the output layer in closed form"] * may_sum
    server += ["the names of the store's products"] * metrics.class_names
    server += ["how many photos the store has"] * metrics.example_counts
    server += ["how well models do on its photos"] * (policy.purposes.evaluate and metrics.example_counts)
    server += ["how many photos it has of each product"] * metrics.counts_products
    others = ["the model, which may have memorized parts of photos"] * (not is_noised)
    others += ["the model"] * is_noised
    others += ["the names of its products, without the store's name"] * metrics.class_names
    least = policy.protection.min_cohort
    return (
        f"The server and its operator: {'; '.join(server) or 'nothing of the photos'}.",
        f"Other stores: {'; '.join(others)}.",
        "The network: sizes and times of messages, if TLS is on.",
        f"The server says that it adds up {counted(least, 'store')} or more. Only secure aggregation could prove it."
        if least > 1
        else "The server can use an update alone: min-cohort = 1.",
    )


def _refusals(policy: Policy, config: RunConfig, num_train: int | None) -> list[str]:
    """All reasons why a store with this policy refuses the run."""
    found: list[str] = []
    try:
        check_setup(policy, config)
    except PolicyError as error:
        found += map(str, error.args)
    try:
        if num_train is not None:
            policy.check_photos(
                num_train=num_train, num_photos=num_train, batch_size=config.batch_size, epochs=most_epochs(config)
            )  # fmt: skip
    except PolicyError as error:
        found += map(str, error.args)
    return found
