"""What a store's policy means, before the store joins: what would leave, who learns what, ε, bytes, and seconds."""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedshelf.app.components import (
    algorithm_of,
    check_setup,
    client_noise_of,
    closed_form_of,
    compares,
    encrypted_form_of,
    encryption_of,
    has_noise_of_stores,
    mask_of,
    most_epochs,
    protection_of,
)
from fedshelf.app.differential_privacy import noise_for
from fedshelf.app.differential_privacy import released as released_by
from fedshelf.app.model import bound_model_of
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import BudgetError, PolicyError
from fedshelf.core.messages import (
    Comparison,
    EncryptionReply,
    Evaluation,
    Failure,
    Join,
    MaskingReply,
    Mechanism,
    Ready,
    Upload,
)
from fedshelf.core.text import counted
from fedshelf.data.catalogue import Catalogue
from fedshelf.privacy.accounting import as_release, compose
from fedshelf.privacy.budget import Budget
from fedshelf.privacy.client_dp import ClientDP
from fedshelf.privacy.dp_sgd import SampleDP
from fedshelf.privacy.epsilon import renyi
from fedshelf.privacy.policy import UNLIMITED, Policy
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from fedshelf.privacy.withholding import WITHHELD_BY, WITHOUT_NOISE
from fedshelf.training.loop import differentiate_one
from fedshelf.training.timing import noise_runs, seconds

BYTES_PER_VALUE = {"float32": 4, "float64": 8}
MOST_VECTORS = 2  # as long as the model, in an upload: the update and a control variate
MESSAGES = (Join, Ready, Upload, Evaluation, Comparison, MaskingReply, EncryptionReply, Failure)
AFTER_SETUP = (Ready, Upload, Evaluation, Comparison, MaskingReply, EncryptionReply)
"""What a store sends only if it takes part in a run."""
_SUMMED: Mapping[type[Any], Collection[str]] = {
    Upload: ("num_examples", "num_steps", "train_loss"),
    Evaluation: ("num_examples", "num_correct", "loss_sum", "candidates", "products", "levels"),
}
"""Fields besides an upload's vectors that are added up, if the server sees only sums. Evaluations are masked, and never
encrypted."""
_EXCHANGES: Mapping[type[Any], str] = {MaskingReply: "secagg", EncryptionReply: "he"}
"""Messages that only runs with a protection have."""
_PURPOSES = {Upload: "train", Evaluation: "evaluate", Comparison: "compare"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """A field of a message to the server.

    Attributes:
        message: the message.
        field: the field.
        state: `clear`, `noised`, `summed`, `noised, summed`, `withheld`, or `not sent` with its message.
        key: the policy's key or the run's setting that decides this; "" if none does.
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
        epsilon: of a run, the ε of all its rounds for one photo of this store; otherwise the maximum in 365 days. None
            if there is no bound, or it is not known.
        delta: δ of that ε.
        protection: what bounds ε, in sentences.
        budget: maximum ε in 365 days by the policy; None if there is none.
        noise: the noise of one round of the run; None if there is none, or it is not known.
        rounds_allowed: rounds of the run that the budget allows a store that has given nothing before; None if it is
            not known.
        bytes_up: bytes of an upload of a run: encrypted, or else before compression; otherwise the maximum before
            either, None if there is none.
        bytes_per_day: maximum bytes of uploads in 24 hours; None if there is none.
        seconds_per_round: predicted duration of a round's training on this machine; None if it is unknown.
        refusals: why the policy refuses the run; empty if it does not.
        is_of_a_run: whether a run's configuration was given.
        is_encrypted: whether `bytes_up` are those of encrypted uploads.
    """

    fields: tuple[Released, ...]
    learns: tuple[str, ...]
    epsilon: float | None
    delta: float | None
    protection: str
    budget: float | None
    noise: Mechanism | None
    rounds_allowed: int | None
    bytes_up: int | None
    bytes_per_day: int | None
    seconds_per_round: float | None
    refusals: tuple[str, ...]
    is_of_a_run: bool
    is_encrypted: bool

    def to_record(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Guarantee:
    epsilon: float | None
    delta: float | None
    protection: str
    noise: Mechanism | None = None
    rounds_allowed: int | None = None


def released(
    policy: Policy, config: RunConfig | None = None, *, refused: Collection[type[Any]] = ()
) -> tuple[Released, ...]:  # fmt: skip
    """What a policy lets leave, field by field.

    Args:
        policy: the policy.
        config: the configuration of a run; None for that of any run.
        refused: the messages that the store does not send because the policy refuses that run.
    """
    return tuple(
        Released(message=kind.__name__, field=field.name, state="not sent", key="the run is refused")
        if kind in refused
        else _released(policy, config, kind, field.name)
        for kind in MESSAGES
        for field in dataclasses.fields(kind)
        if kind not in _EXCHANGES or _summing(policy, config) == _EXCHANGES[kind]
    )


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
    limits, round_seconds, refusals, is_encrypted = policy.limits, None, list[str](), False
    num_bytes = _limited(MOST_VECTORS * BYTES_PER_VALUE["float32"], limits.max_parameters)
    if config is not None:
        refusals = _refusals(policy, config, num_train)
        names = tuple(f"product-{number}" for number in range(num_classes))
        bound = bound_model_of(config, Catalogue(names, tuple((name,) for name in names)), device="auto")
        algorithm = algorithm_of(config).for_model(bound.params.layout, bound.output_layer)
        vectors = algorithm.vectors(bound.params.layout).values()
        num_bytes = sum(BYTES_PER_VALUE[vector.dtype] * vector.size for vector in vectors)
        if (form := encrypted_form_of(config, bound)) is not None:
            num_bytes, is_encrypted = form.upload_bytes, True
        if num_train is not None:
            runs = noise_runs([bound], image_size=config.image_size, batch_size=config.batch_size)
            steps = config.local_epochs * math.ceil(num_train / config.batch_size)
            round_seconds = steps * seconds(lambda: differentiate_one(runs), bound.compute.device)
    required = guarantee = _required(policy)
    refused: tuple[type[Any], ...] = AFTER_SETUP if refusals else ()
    if config is not None and not refusals:
        try:
            guarantee = _guarantee(policy, config, num_train)
        except (PolicyError, BudgetError) as error:
            refusals, refused = [str(problem) for problem in error.args], AFTER_SETUP
        if guarantee.rounds_allowed == 0:  # which shows when the store is to train
            refusals, refused = [guarantee.protection], (Upload,)
    fields = released(policy, config, refused=refused)
    return Explanation(
        fields=fields,
        learns=_learns(policy, config, fields),
        epsilon=guarantee.epsilon,
        delta=guarantee.delta,
        protection=guarantee.protection,
        budget=required.epsilon,
        noise=guarantee.noise,
        rounds_allowed=guarantee.rounds_allowed,
        bytes_up=num_bytes,
        bytes_per_day=None if num_bytes is None else _limited(num_bytes, limits.rounds_per_day),
        seconds_per_round=round_seconds,
        refusals=tuple(refusals),
        is_of_a_run=config is not None,
        is_encrypted=is_encrypted,
    )


def _required(policy: Policy) -> _Guarantee:
    """What the policy guarantees in any run."""
    rules = policy.protection
    epsilon, delta = (rules.epsilon, rules.delta) if rules.required == "sample-dp" else (None, None)
    return _Guarantee(epsilon=epsilon, delta=delta, protection=_PROTECTIONS[rules.required])


def _guarantee(policy: Policy, config: RunConfig, num_train: int | None) -> _Guarantee:
    """What the noise of a run guarantees to a store that has given nothing before.

    Raises:
        PolicyError: no noise is enough for the budget.
        BudgetError: no noise is enough for the run's target.
    """
    protection, rounds = protection_of(config), config.rounds + config.extend
    most, delta = _required(policy).epsilon, policy.protection.delta
    if isinstance(protection, ClientDP) and protection.noise_at == "stores":
        return _shared_guarantee(config, protection, rounds)
    if not isinstance(protection, SampleDP):
        what = "that sum" if _summing(policy, config) else "each update"
        return _Guarantee(epsilon=None, delta=None, protection=_OF_RUN[protection.unit].format(what=what))
    if num_train is None:
        aims = [epsilon for epsilon in (protection.target_epsilon, most) if epsilon is not None]
        return _Guarantee(
            epsilon=min(aims) if protection.target_epsilon is not None else None, delta=protection.delta,
            protection="The store adds noise. What it guarantees in a store depends on its number of photos: give "
            "--data-dir." if protection.target_epsilon is None else "The store adds as much noise as this ε needs.",
        )  # fmt: skip
    noise = noise_for(config, protection, num_train, budget=Budget(tuple, epsilon=most, delta=delta))
    one = released_by(config, num_train, noise)
    found = compose([as_release(one)] * rounds, protection.delta).epsilon
    allowed = rounds
    if most is not None:
        allowed = bisect_right(
            range(1, rounds + 1), most, key=lambda number: compose([as_release(one)] * number, delta).epsilon
        )
    what = (
        f"The store adds noise of {noise:.4g} times the bound of a photo's part, in {counted(one.steps, 'step')} of a "
        f"round, to each of which a photo contributes with a probability of {one.sampling_rate:.3g}. ε is for one "
        f"photo, over {counted(rounds, 'round')}, if the store is drawn for each."
    )
    if allowed == 0:
        needed = compose([as_release(one)], delta).epsilon
        what = f"one round needs an ε of {needed:.4g} at δ = {delta:g}: epsilon = {most:g}"
    elif allowed < rounds:
        what += f" The budget of {most:g} stops the store after {counted(allowed, 'round')} of them."
    return _Guarantee(epsilon=found, delta=protection.delta, protection=what, noise=one, rounds_allowed=allowed)


def _shared_guarantee(config: RunConfig, protection: ClientDP, rounds: int) -> _Guarantee:
    """What the noise guarantees that the stores add together."""
    noise = client_noise_of(config, protection)
    epsilon = renyi({(noise, 1.0): rounds}, protection.delta, is_discrete=True) if noise else math.inf
    return _Guarantee(
        epsilon=epsilon, delta=protection.delta,
        protection="Each store adds a share of the noise before its update is masked. ε is for all photos of one "
        f"store together, and for the sums that the server sees, over {counted(rounds, 'round')}, if the store is "
        "drawn for each.",
    )  # fmt: skip


_OF_RUN: Mapping[str | None, str] = {
    None: "The run adds no noise, so no ε bounds what updates reveal of a photo.",
    "client": "The server adds noise to the sum of updates, and sees {what} without it. No ε bounds what the server "
    "learns of a photo.",
}
_PROTECTIONS: Mapping[str, str] = {
    "none": "No noise is required, so no ε bounds what updates reveal of a photo.",
    "sample-dp": "Runs must add noise at the store. ε is for one photo, over all runs and servers. It holds for the "
    "update, and not for counts, accuracies, and times.",
    "secagg": "Runs must use secure aggregation. No ε bounds what the sum reveals of a photo.",
    "he": "Runs must use homomorphic encryption. No ε bounds what the sum reveals of a photo.",
}


def _limited(each: int, most: int) -> int | None:
    """The product; None if `most` is no limit."""
    return None if most >= UNLIMITED else each * most


def _released(policy: Policy, config: RunConfig | None, kind: type[Any], field: str) -> Released:
    def made(state: str, key: str = "") -> Released:
        return Released(message=kind.__name__, field=field, state=state, key=key)

    purpose, key = _PURPOSES.get(kind, ""), WITHHELD_BY.get(kind, {}).get(field, "")
    is_noised = policy.protection.required == "sample-dp" if config is None else _is_noised(config)
    sums = kind is Upload and policy.purposes.closed_form and policy.metrics.example_counts
    sums = sums and (config is None or _computes_sums(config))
    if purpose and not getattr(policy.purposes, purpose) and not sums:
        return made("not sent", f"purposes.{purpose}")
    if kind is Evaluation and not policy.metrics.example_counts:
        return made("not sent", "metrics.example-counts")
    if kind is Comparison and config is not None and not compares(config):
        return made("not sent", "compare")
    summing = _summing(policy, config)
    summed = {"": (), "he": (Upload,)}.get(summing, (Upload, Evaluation))
    is_shared = config is not None and has_noise_of_stores(config) and not is_noised
    told = WITHOUT_NOISE.get(kind, {}) if is_noised or is_shared or (summing and kind not in summed) else {}
    if is_shared and kind is Upload and told is not None:
        told = {**told, "num_examples": None, "num_steps": None}
    because = "dp = sample" if is_noised else "noise-at = stores" if is_shared else summing
    if told is None:
        return made("not sent", because)
    if key and not getattr(policy.metrics, key):
        return made("withheld", _shown(key))
    if field in told:
        return made("withheld", because)
    if kind in summed and field in _SUMMED[kind]:
        return made("summed", "protection.required" if config is None else summing)
    if key:
        return made("clear", _shown(key))
    if kind is Upload and field == "vectors":
        has_noise = is_noised or is_shared
        state = ", ".join(["noised"] * has_noise + ["summed"] * bool(summing)) or "clear"
        setting = f"dp, {summing}" if has_noise and summing else summing or "dp"
        return made(state, "protection.required" if config is None else setting)
    return made("clear", f"purposes.{purpose}" if purpose else "")


def _shown(key: str) -> str:
    return "metrics.per-product" if key == "counts_products" else f"metrics.{key.replace('_', '-')}"


def _summing(policy: Policy, config: RunConfig | None) -> str:
    """What lets the server see sums only: `secagg`, `he`, or ""."""
    if config is None:
        return policy.protection.required if policy.protection.required in ("secagg", "he") else ""
    return "secagg" if mask_of(config).is_on else "he" if encryption_of(config).is_on else ""


def _is_noised(config: RunConfig) -> bool:
    return isinstance(protection_of(config), SampleDP)


def _computes_sums(config: RunConfig) -> bool:
    return algorithm_of(config).counts_photos or closed_form_of(config) is not None


def _learns(policy: Policy, config: RunConfig | None, fields: tuple[Released, ...]) -> tuple[str, ...]:
    state = {f"{field.message}.{field.field}": field.state for field in fields}

    def leaves(field: str) -> bool:
        return state[field] not in ("withheld", "not sent")

    is_noised, is_summed = (word in state["Upload.vectors"] for word in ("noised", "summed"))
    is_shared = config is not None and has_noise_of_stores(config) and not _is_noised(config)
    update = "the sum of the updates of a round's stores" if is_summed else "each update"
    may_train = policy.purposes.train or (config is not None and _computes_sums(config))
    server = [
        f"{update}, with noise that bounds what it says of one {'store' if is_shared else 'photo'}"
        if is_noised
        else f"{update}, from which parts of photos can sometimes be reconstructed"
    ] * (leaves("Upload.vectors") and may_train)
    shows_body = config is not None and encryption_of(config).is_on and encryption_of(config).scope == "head"
    server += ["of each update, the change of the layers before the output layer"] * (
        shows_body and leaves("Upload.vectors")
    )
    may_sum = policy.purposes.closed_form and policy.metrics.example_counts
    may_sum = may_sum and (config is None or (_computes_sums(config) and leaves("Upload.vectors") and not is_noised))
    features = "the features of these stores' photos" if is_summed else "its photos' features"
    server += [f"sums of {features}, in runs that compute the output layer in closed form"] * may_sum
    server += ["the names of the store's products"] * leaves("Join.classes")
    server += ["how many photos the store has"] * leaves("Ready.num_train")
    measures = leaves("Evaluation.num_correct") or leaves("Comparison.accuracies")
    whose = "the photos of a round's stores together" if is_summed else "its photos"
    server += [f"how well models do on {whose}"] * measures
    who = "these stores have together" if is_summed else "it has"
    server += [f"how many photos {who} of each product"] * leaves("Evaluation.products")
    decrypts = (
        "The stores that decrypt"
        if config is not None and encryption_of(config).any_decrypts
        else "The store that decrypts"
    )
    others = ["the model, which may have memorized parts of photos"] * (not is_noised)
    others += ["the model"] * is_noised
    others += ["the names of its products, without the store's name"] * leaves("Join.classes")
    least = policy.protection.min_cohort
    return (
        f"The server and its operator: {'; '.join(server) or 'nothing of the photos'}.",
        f"Other stores: {'; '.join(others)}.",
        "The network: sizes and times of messages, if TLS is on.",
        f"The server says that it adds up {counted(least, 'store')} or more. Only secure "
        "aggregation or homomorphic encryption could prove it."
        if least > 1 and not is_summed
        else f"A sum is of {counted(max(least, LEAST_MEMBERS), 'store')} or more. A server that invents stores gets "
        "around that, unless the policy pins the roster's key (roster-key)."
        if is_summed
        else "The server can use an update alone: min-cohort = 1.",
    ) + (f"{decrypts}: the sum of the updates of a round's stores; together with the server, each update.",) * (
        _summing(policy, config) == "he" and leaves("Upload.vectors")
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
