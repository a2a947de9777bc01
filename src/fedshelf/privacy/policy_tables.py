"""The tables of a store's policy: each with its rules, and the sentence by which a request is refused.

The limits bound how often, and on how few photos, a server may compute something from this store's photos. They do not
make a single answer harmless: weights that are made for the purpose can hold photos back from most of a batch, so that
the rest shows in the difference. Only secure aggregation, or clipping with noise, supports that promise.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from fedshelf.core.errors import PolicyError
from fedshelf.core.messages import Broadcast, Purpose
from fedshelf.core.settings import Setting
from fedshelf.core.text import counted
from fedshelf.models.registry import MODELS, is_own, problem_with_own

ProtectionName = Literal["none", "sample-dp", "secagg", "he"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectionOffer:
    """What a run's configuration says about the protection of updates before they leave a store.

    Noise that the server adds is none of it: the server sees updates without it.

    Attributes:
        kind: the protection.
        delta: δ that the run's ε is stated for.
    """

    kind: ProtectionName = "none"
    delta: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits on what a server may ask for.

    Attributes:
        min_photos_per_step: minimum batch size. A store with fewer photos trains on all of them at once. At least so
            many of its photos, or half of them, take part in training.
        min_epochs_per_task: minimum share of an epoch in a training task.
        models_per_round: different models, control variates or learning rates to train with under one round number.
        evaluations_per_round: evaluations under one round number.
        comparisons_per_run: model comparisons in a run.
        max_comparison_rounds: rounds that a comparison trains the store's own model for.
        rounds_per_day: training tasks and comparisons in 24 hours, over all runs and servers; of evaluations,
            `evaluations_per_round` times as many.
        max_local_epochs: maximum number of epochs in a training task.
        max_local_steps: maximum number of steps in a training task.
        max_parameters: values of the model.
        max_memory_mb: megabytes that training needs, as measured on two photos.
        max_image_size: side of the training photos in pixels.
        max_threads: training threads.
        max_cache_mb: megabytes of the cache of decoded photos.
    """

    min_photos_per_step: Annotated[int, Setting(help="minimum batch size", ge=1)] = 8
    min_epochs_per_task: Annotated[float, Setting(help="minimum share of an epoch in a task", ge=0)] = 0.25
    models_per_round: Annotated[int, Setting(help="models to train under one round number", ge=1)] = 1
    evaluations_per_round: Annotated[int, Setting(help="evaluations under one round number", ge=0)] = 2
    comparisons_per_run: Annotated[int, Setting(help="model comparisons in a run", ge=0)] = 1
    max_comparison_rounds: Annotated[int, Setting(help="rounds of training in a comparison", ge=1)] = 1000
    rounds_per_day: Annotated[int, Setting(help="training tasks in 24 hours", ge=1)] = 1000
    max_local_epochs: Annotated[int, Setting(help="maximum epochs in a task", ge=1)] = 100
    max_local_steps: Annotated[int, Setting(help="maximum steps in a task", ge=1)] = 1_000_000
    max_parameters: Annotated[int, Setting(help="values of the model", ge=1)] = 50_000_000
    max_memory_mb: Annotated[int, Setting(help="megabytes that training needs", ge=1)] = 8_000
    max_image_size: Annotated[int, Setting(help="side of the photos in pixels", ge=8)] = 512
    max_threads: Annotated[int, Setting(help="training threads", ge=1)] = 64
    max_cache_mb: Annotated[int, Setting(help="megabytes of the photo cache", ge=1)] = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models that this store trains.

    Attributes:
        allow: names; `*` stands for any characters, but not in the name of a user's own code, `MODULE:FUNCTION`.
        own_code: whether a user's own code may be among them.
    """

    allow: Annotated[tuple[str, ...], Setting(help="names, where * stands for any characters")] = (
        *MODELS, "resnet*", "mobilenet*", "tf_mobilenet*", "efficientnet*", "tf_efficientnet*", "convnext*", "regnet*",
        "densenet*",
    )  # fmt: skip
    own_code: Annotated[bool, Setting(help="whether MODULE:FUNCTION may be allowed")] = True

    def allows(self, name: str) -> bool:
        """Whether this store trains a model of that name."""
        return name in self.allow or (not is_own(name) and any(fnmatchcase(name, pattern) for pattern in self.allow))

    def problems(self) -> list[str]:
        """What is wrong with the names of users' own code, of which none may be a pattern."""
        own = [name for name in self.allow if is_own(name)]
        forbidden = [f"{name!r} is code of a user's own, and own-code = false" for name in own if not self.own_code]
        return forbidden or [problem for name in own if (problem := problem_with_own(name))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Purposes:
    """What this store computes for a server.

    Attributes:
        train: training.
        evaluate: how many validation photos a model classifies correctly.
        compare: which of several models serves this store best, after the last round.
        closed_form: sums over photos, for an output layer in closed form.
    """

    train: Annotated[bool, Setting(help="training")] = True
    evaluate: Annotated[bool, Setting(help="evaluation on validation photos")] = True
    compare: Annotated[bool, Setting(help="comparison of models after the last round")] = True
    closed_form: Annotated[bool, Setting(help="sums over photos")] = True

    def check(self, broadcast: Broadcast, *, sums: bool = False) -> None:
        """Check what a task is for.

        Args:
            broadcast: the task.
            sums: whether the run's algorithm computes sums over photos.

        Raises:
            PolicyError: the store does not do that.
        """
        is_trained = broadcast.purpose is Purpose.TRAIN
        key = "closed_form" if is_trained and (sums or broadcast.closed_form) else broadcast.purpose.value
        if not getattr(self, key):
            raise PolicyError(f"{_PURPOSES[key]}: {key.replace('_', '-')} = false")


_PURPOSES = {
    "train": "this store does not train", "evaluate": "this store evaluates no models",
    "compare": "this store compares no models", "closed_form": "this store computes no sums over its photos",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """How what leaves this store must be protected.

    Attributes:
        required: the protection that a run must offer: `none`, `sample-dp`, `secagg` or `he`.
        epsilon: with `sample-dp`, maximum ε in a year, over all runs and servers.
        delta: with `sample-dp`, δ of that ε.
        min_cohort: minimum number of stores whose updates the server adds up before it uses them. Only secure
            aggregation and homomorphic encryption can prove that it does.
    """

    required: Annotated[ProtectionName, Setting(help="none, sample-dp, secagg or he")] = "none"
    epsilon: Annotated[float, Setting(help="maximum ε in a year", gt=0)] = 8.0
    delta: Annotated[float, Setting(help="δ of that ε", gt=0, lt=1)] = 1e-5
    min_cohort: Annotated[int, Setting(help="stores whose updates are added up", ge=1)] = 1

    def unmet(self, offer: ProtectionOffer) -> list[str]:
        """Why the protection that a run offers does not suffice; empty if it does."""
        needed = f"required = {self.required!r}"
        if self.required == "none" or self.required == offer.kind in ("secagg", "he"):
            return []
        if self.required == "he":
            return [f"{needed}, and this run does not encrypt updates (--he)"]
        if self.required == "secagg":
            return [f"{needed}, and this run does not mask updates (--secagg)"]
        if offer.kind != "sample-dp":
            return [f"{needed}, and this run adds no noise at the stores (--dp sample)"]
        if not 0 < offer.delta <= self.delta:
            return [f"this run's delta of {offer.delta:g} is not in 0 to delta = {self.delta:g}"]
        return []

    def check_cohort(self, broadcast: Broadcast) -> None:
        """Check how many stores' updates the server says that it adds up.

        Raises:
            PolicyError: they are too few.
        """
        if broadcast.purpose is Purpose.TRAIN and (broadcast.quorum or 1) < self.min_cohort:
            raise PolicyError(
                f"the server may use the updates of {counted(broadcast.quorum or 1, 'store')}: min-cohort = "
                f"{self.min_cohort}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What this store tells besides what training needs.

    Attributes:
        class_names: the names of its class folders, of which the server makes the catalogue.
        example_counts: numbers of photos and steps, and what they can be computed from.
        losses: mean losses of training and evaluation.
        per_product: after the last round, how many validation photos of each product are classified correctly.
    """

    class_names: Annotated[bool, Setting(help="names of class folders")] = True
    example_counts: Annotated[bool, Setting(help="numbers of photos and steps")] = True
    losses: Annotated[bool, Setting(help="losses")] = True
    per_product: Annotated[bool, Setting(help="correct validation photos of each product")] = True

    @property
    def counts_products(self) -> bool:
        """Whether counts by product are told: they name products, by their number, and add up to all photos."""
        return self.per_product and self.class_names and self.example_counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """The server that this store works for.

    Attributes:
        roster_key: the chain's public key, which signs the roster; "" for the one that enrolling gives.
        authorities: SHA-256 fingerprints of the certificate authorities that a server may have; empty for any.
        addresses: HOST:PORT that a server may have; empty for any.
    """

    roster_key: Annotated[str, Setting(help="the chain's public key, from 'fedshelf enroll key'")] = ""
    authorities: Annotated[tuple[str, ...], Setting(help="SHA-256 fingerprints of certificate authorities")] = ()
    addresses: Annotated[tuple[str, ...], Setting(help="HOST:PORT of servers")] = ()

    def problems(self) -> list[str]:
        """What is wrong with the values."""
        from fedshelf.identity.keys import PublicKey  # loads cryptography, which a simulation does not need

        is_key = not self.roster_key or PublicKey(self.roster_key).is_valid
        found = [] if is_key else ["roster-key is not a key as 'fedshelf enroll key' prints it, of 44 characters"]
        return found + [
            f"{text!r} is not a fingerprint of 64 hexadecimal digits, as 'fedshelf privacy explain --server' prints it"
            for text in self.authorities
            if not _FINGERPRINT.fullmatch(_digits(text))
        ] + [
            f"the address {text!r} is not HOST:PORT: write, for example, \"192.168.1.100:8080\""
            for text in self.addresses
            if not (match := _ADDRESS.fullmatch(text)) or not 0 < int(match[1]) < 2**16
        ]  # fmt: skip

    def check(self, address: str, authority: str) -> None:
        """Check a server before anything is sent to it.

        Args:
            address: HOST:PORT.
            authority: SHA-256 fingerprint (hex) of the only certificate authority that the client trusts; "" if it
                trusts several, or does not encrypt.

        Raises:
            PolicyError: the policy does not name it.
        """
        problems = []
        if self.addresses and address.lower() not in [known.lower() for known in self.addresses]:
            problems.append(f"the server {address} is none of addresses = {', '.join(self.addresses)}")
        if self.authorities and authority not in map(_digits, self.authorities):
            found = f"the one with the fingerprint {authority}" if authority else "none alone: give --ca or --token"
            problems.append(f"this client trusts none of the certificate authorities in [server], but {found}")
        if problems:
            raise PolicyError(*problems)


_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/*\[\]]+):([0-9]{1,5})", re.ASCII)
_FINGERPRINT = re.compile("[0-9a-f]{64}")


def _digits(fingerprint: str) -> str:
    """A fingerprint (AB:CD:…) in lower case, without colons."""
    return fingerprint.replace(":", "").lower()
