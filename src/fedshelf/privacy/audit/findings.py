"""What an audit found, and what it cannot find."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from fedshelf.privacy.audit.empirical_epsilon import EmpiricalEpsilon
from fedshelf.privacy.audit.membership import LikelihoodRatioAttack
from fedshelf.privacy.audit.rare_products import RareProduct

ModelRole = Literal["run", "probe"]
"""The run's own model, or one on which the attack is known to work."""

UNPROTECTED = (
    "When the store answers, and how long it takes: this tells of its opening hours, its machine, and roughly of how "
    "many photos it has.",
    "How large its messages are: with a codec of variable size, the size depends on the update.",
    "In which rounds the store takes part, and that it takes part at all.",
    "The names of its products, if its policy lets it name them.",
    "What the final model may have memorized. Everyone who gets the model can attack it, as long as it exists. Only "
    "noise (--dp) bounds what is to be found.",
    "Everything that left before, in other runs: the ledger lists it.",
)  # fmt: skip
"""What no protection of an update covers."""

ASSUMPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "gradient inversion": (
        "The attacker reads one upload, made by a single step on the shown photos alone, and knows model, settings and "
        "labels. A round has many steps on many photos, which hides more, but not by a guarantee.",
        "One start, and one weight of smoothness for each model (probe 0.003, the run's own 0.1). Another attack may "
        "find more. A failed attack proves nothing.",
        "The probe is a small net without ReLU, pooling, and normalization, on photos of 32 pixels, with plain SGD of "
        "momentum 0. It shows what a protection withstands where the attack works.",
        "SSIM of 1 is the photo itself. The report states what another photo of the same store reaches.",
    ),
    "label inference": (
        "The upload is of a single step, and the output layer is linear and leaves the store.",
        "With more steps or larger batches, counts become rougher.",
        "Noise on each photo hides which product one photo shows. The mix of a whole batch may still show.",
    ),
    "canaries": (
        "Canaries are photos of the store with wrong labels, so that they stand out. True photos are harder to find.",
        "The attacker reads the upload of one round and knows the model, and each photo and canary that may be in it, "
        "but not which canaries are. Its gradients are those at the start of the round.",
        "The bound holds with 95 % confidence. It is a lower bound: true ε may be far larger, and the ceiling is the "
        "most that so many canaries can show.",
    ),
    "canary stores": (
        "The attacker reads the noisy mean of one round in which every store takes part, and knows what each canary "
        "would upload. The server adds the noise as it should: a curious server sees the uploads without it.",
        "Canaries have the largest norm that the bound allows. Uploads of stores are harder to find.",
    ),
    "LiRA": (
        "The attacker knows the store's photos, but not which half was trained on, and trains many heads to compare.",
        "The attack sees the store's head after one round, in the clear.",
    ),
})  # fmt: skip
"""By attack: what it assumes, and its limits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """The outcome of one gradient inversion.

    Attributes:
        model: the model that was attacked.
        protection: what had been done to the update.
        ssim: mean similarity of the photos and their reconstructions.
        psnr: mean peak signal-to-noise ratio (dB).
        distance: cosine distance of the gradients that remained.
        steps: iterations.
        seconds: duration of the attack.
        originals: [B, 3, H, W]: the photos as they were trained on, with values from 0 to 1.
        pictures: [B, 3, H, W]: the reconstructions.
    """

    model: ModelRole
    protection: str
    ssim: float
    psnr: float
    distance: float
    steps: int
    seconds: float
    originals: Tensor
    pictures: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFinding:
    """The outcome of one label inference.

    Attributes:
        model: the model that was attacked.
        protection: what had been done to the update.
        num_photos: photos of the step.
        num_right: labels that were inferred.
        chance: share of labels that the attack gets right if the gradient is random.
        features_error: relative error of the photo's features, read off the same gradient; None for several photos.
    """

    model: ModelRole
    protection: str
    num_photos: int
    num_right: int
    chance: float
    features_error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryFinding:
    """The outcome of one audit with canaries.

    Attributes:
        model: the model that was trained.
        protection: what had been done to the update.
        found: the empirical ε.
        accounted: ε of the round by the accountant; infinite without noise.
    """

    model: ModelRole
    protection: str
    found: EmpiricalEpsilon
    accounted: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipFinding:
    """The outcome of one LiRA.

    Attributes:
        protection: what had been done to the update.
        found: the outcome.
    """

    protection: str
    found: LikelihoodRatioAttack


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditReport:
    """All that an audit found.

    Attributes:
        store: the store whose photos were used.
        run_id: the run.
        model: the model, and where its values come from.
        settings: the run's settings that matter, in words.
        reconstructions: gradient inversions.
        chance_ssim: mean similarity of an attacked photo of the probe's size and other photos of the store.
        labels: label inferences.
        canaries: audits with canaries.
        store_canaries: the audit of the server's noise, of a run with --dp client.
        membership: LiRA.
        rare_products: products of few stores; None if it is not known which store sells what.
        least_stores: number of stores below which a product is rare.
        left_out: what was not attacked, with the reason, in sentences.
    """

    store: str
    run_id: str
    model: str
    settings: str
    reconstructions: tuple[Reconstruction, ...]
    chance_ssim: float
    labels: tuple[LabelFinding, ...]
    canaries: tuple[CanaryFinding, ...]
    store_canaries: tuple[CanaryFinding, ...]
    membership: tuple[MembershipFinding, ...]
    rare_products: tuple[RareProduct, ...] | None
    least_stores: int
    left_out: tuple[str, ...] = field(default=())

    def to_record(self) -> dict[str, Any]:
        """The report as JSON values, without its pictures."""
        hidden = ("originals", "pictures")
        return {
            "store": self.store, "run": self.run_id, "model": self.model, "settings": self.settings,
            "reconstructions": [
                {key: value for key, value in vars(one).items() if key not in hidden} for one in self.reconstructions
            ],
            "chance_ssim": self.chance_ssim,
            "labels": [asdict(one) for one in self.labels],
            "canaries": [asdict(one) for one in self.canaries],
            "store_canaries": [asdict(one) for one in self.store_canaries],
            "membership": [asdict(one) for one in self.membership],
            "rare_products": None if self.rare_products is None else [asdict(one) for one in self.rare_products],
            "least_stores": self.least_stores, "left_out": list(self.left_out), "unprotected": list(UNPROTECTED),
            "assumptions": {attack: list(sentences) for attack, sentences in ASSUMPTIONS.items()},
        }  # fmt: skip
