"""Differential privacy for each store, by noise on the sum of a round's uploads.

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1 (fixed-denominator
estimator); clipping by quantile: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping",
Algorithm 1.

     1  S <- each live store with probability q, independently
     2  u_i <- u_i · min(1, C/‖u_i‖) for each i in S             all vectors of an upload together
     3  u <- (sum_i u_i + N(0, z² C²)) / m                       m = q · live stores
     4  b <- (sum_i ([‖u_i‖ <= C] - 1/2) + N(0, sigma_b²)) / m + 1/2    only with --clip-norm adaptive
     5  C <- C · exp(-eta · (b - gamma))

Lines 3 and 4 together have the noise multiplier z' of the accounting: z = (z'^-2 - (2 sigma_b)^-2)^(-1/2). A store
moves the sum of line 4 by 1/2; that of [‖u_i‖ <= C] alone, it would move by 1 (the proof of the paper's theorem 1).

Differs from the papers: sigma_b is m/20 as in the paper, but at least z', so that z exists for a small m; b is clamped
to [0, 1], so that its noise cannot change the norm by orders of magnitude. The noise follows from a secret key of the
attempt and from the sum that it is added to: a restarted server that adds up the same uploads repeats the noise, and
never adds the same noise to another sum.

With uploads that are decoded as a sum (`rounds.summed_uploads`), clients do line 2 with the norm that the broadcast
names, and send [‖u_i‖ <= C] - 1/2 as one more number of the sum. Rounding to integers makes C larger by `inflation`
(`compression.unit_ball`). With --noise-at stores, clients add the noise of lines 3 and 4, too (`distributed_dp`).

Under masks, m is the size of the cohort, which is drawn without secrecy: its members learn each other's names, so that
the sampling amplifies nothing, and the accounting is that of q = 1.

Shapes: S shared values, T trainable ones.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fedshelf.core.errors import RefusedError
from fedshelf.core.settings import PRIVACY, Scope, Setting
from fedshelf.privacy.base import Noise, Unit
from fedshelf.privacy.clipping import ADAPTIVE, CLIP_NORM, ClipNorm, in_unit_ball

if TYPE_CHECKING:
    from fedshelf.algorithms.base import Aggregate
    from fedshelf.algorithms.reduce import Parts, Verdict
    from fedshelf.core.messages import Upload

FIRST_NORM = 0.1
SHARE_OF_COHORT = 1 / 20
NoiseAt = Literal["server", "stores"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientDP(Noise):
    """Differential privacy for each store.

    Attributes:
        clip_norm: bound on the norm of an upload (C); adaptive: follows a quantile of the norms.
        clip_quantile: the share of uploads that is not clipped (gamma).
        clip_rate: how fast an adaptive norm changes (eta).
        noise_at: who adds the noise.
    """

    clip_norm: Annotated[ClipNorm, CLIP_NORM] = ADAPTIVE
    clip_quantile: Annotated[float, Setting(key="clip_quantile", gt=0, lt=1, panel=PRIVACY, scope=Scope.SERVER,
        help="Share of uploads that --clip-norm adaptive leaves unclipped.")] = 0.5  # fmt: skip
    clip_rate: Annotated[float, Setting(key="clip_rate", gt=0, panel=PRIVACY, scope=Scope.SERVER,
        help="How fast --clip-norm adaptive changes the norm.")] = 0.2  # fmt: skip
    noise_at: Annotated[NoiseAt, Setting(key="noise_at", panel=PRIVACY, help="Who adds the noise: the server, to the "
        "sum of uploads, or with --secagg each store a share of it, so that the server sees no sum without "
        "noise.")] = "server"  # fmt: skip
    name: ClassVar[str] = "client"
    unit: ClassVar[Unit | None] = "client"


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyMean:
    """The server's half.

    Attributes:
        noise_multiplier: z'.
        clip_norm: C, or the first one.
        is_adaptive: whether the norm changes.
        quantile: gamma.
        rate: eta.
        noise_at: who adds the noise.
        sampling_rate: probability with which a store takes part in a round, if that is secret; 1 if it is not.
    """

    noise_multiplier: float
    clip_norm: float
    is_adaptive: bool = False
    quantile: float = 0.5
    rate: float = 0.2
    noise_at: NoiseAt = "server"
    sampling_rate: float = 1.0

    @classmethod
    def of(cls, protection: ClientDP, noise_multiplier: float, *, sampling_rate: float = 1.0) -> NoisyMean:
        """The server's half of `protection`, with the noise multiplier that it needs."""
        norm = protection.clip_norm
        return cls(
            noise_multiplier=noise_multiplier, is_adaptive=norm == ADAPTIVE,
            clip_norm=norm if isinstance(norm, float | int) else FIRST_NORM,
            quantile=protection.clip_quantile, rate=protection.clip_rate, noise_at=protection.noise_at,
            sampling_rate=sampling_rate,
        )  # fmt: skip

    def deviations(self, expected: float) -> tuple[float, float]:
        """The noise multiplier of the sum (z), and the deviation of the count's noise (sigma_b).

        Args:
            expected: m, the expected number of uploads.
        """
        if not self.is_adaptive:
            return self.noise_multiplier, 0.0
        of_count = max(SHARE_OF_COHORT * expected, self.noise_multiplier)
        if not self.noise_multiplier:
            return 0.0, of_count
        return (self.noise_multiplier**-2 - (2 * of_count) ** -2) ** -0.5, of_count

    def release(
        self, aggregate: Aggregate, within: Within, *, expected: float, clip_norm: float, key: bytes,
        inflation: float = 1.0,
    ) -> tuple[Aggregate, float]:  # fmt: skip
        """Lines 3 to 5. Noise that the stores have added is in the aggregate and in `within`.

        Args:
            aggregate: the plain mean of the clipped uploads.
            within: how many there are, and the sum of line 4.
            expected: m, the expected number of uploads.
            clip_norm: C.
            key: the attempt's secret key.
            inflation: by how much rounding may lengthen a clipped upload.

        Returns:
            The noisy aggregate, and the next norm.
        """
        from fedshelf.privacy.noise import SecretRandom

        deviation, of_count = self.deviations(expected) if self.noise_at == "server" else (0.0, 0.0)
        scale = within.num_uploads / expected
        vectors = {"": aggregate.delta, **aggregate.auxiliary}
        digest = hashlib.sha256(repr((within, expected, clip_norm)).encode())
        for vector in vectors.values():
            digest.update(vector.numpy().tobytes())
        source = SecretRandom(hmac.digest(key, digest.digest(), "sha256"))
        noise = deviation * inflation * clip_norm / expected
        noisy = {
            name: vector * scale + noise * source.normal(len(vector)) if noise else vector * scale
            for name, vector in vectors.items()
        }
        delta = noisy.pop("")
        norm = clip_norm
        if self.is_adaptive:
            total = within.total + of_count * float(source.normal(1))
            share = min(max(total / expected + 0.5, 0.0), 1.0)
            norm = clip_norm * math.exp(-self.rate * (share - self.quantile))
        return replace(aggregate, delta=delta, auxiliary=noisy, num_clients=max(1, round(expected))), norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Within:
    """The sum of line 4, without the server's noise.

    Attributes:
        num_uploads: number of uploads.
        total: sum of 1/2 for each that was not scaled down, and of -1/2 for each that was.
    """

    num_uploads: int
    total: float

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Within:
        """That of uploads which `JointClip` has judged."""
        return cls(num_uploads=len(verdicts), total=sum(-0.5 if verdict.factors else 0.5 for verdict in verdicts))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClippedAtClient:
    """The client's half of line 2, for uploads that are decoded as a sum.

    Attributes:
        clip_norm: C, or adaptive.
        noise_at: who adds the noise.
    """

    clip_norm: ClipNorm
    noise_at: NoiseAt = "server"

    @property
    def protections(self) -> tuple[str, ...]:
        """What limits how much an upload reveals."""
        clip = f"clip-norm {self.clip_norm}"
        return (clip,) if self.noise_at == "server" else (clip, "noise-at stores")

    def apply(self, upload: Upload, named: float | None) -> Upload:
        """Scale an upload into the unit ball, and take from it what noise would have to cover and does not.

        Args:
            upload: plain.
            named: the norm that the broadcast names.

        Raises:
            RefusedError: it names none that can be, or another than the configuration.
        """
        import torch

        from fedshelf.compression.unit_ball import WITHIN
        from fedshelf.privacy.withholding import only_noised

        if named is None or not 0 < named < math.inf or self.clip_norm not in (ADAPTIVE, named):
            raise RefusedError(
                f"the task's clip norm is {'missing' if named is None else f'{named:g}'}, and the run has --clip-norm "
                f"{self.clip_norm}"
            )
        upload, is_within = in_unit_ball(upload, named)
        if self.clip_norm == ADAPTIVE:
            upload = upload.with_vectors(**{WITHIN: torch.tensor([0.5 if is_within else -0.5], dtype=torch.float64)})
        if self.noise_at == "stores":
            upload = replace(only_noised(upload), num_examples=None, num_steps=None)
        return upload


@dataclass(frozen=True, slots=True)
class JointClip:
    """A screen that scales uploads down to a norm (line 2): all parts by one factor.

    Attributes:
        clip_norm: C.
    """

    clip_norm: float

    def __call__(self, parts: Parts) -> list[Verdict]:
        from fedshelf.algorithms.reduce import Verdict, norm

        norms = [math.hypot(*(norm(row) for row in rows)) for rows in zip(*parts.values(), strict=True)]
        return [
            Verdict(factors=dict.fromkeys(parts, self.clip_norm / one)) if one > self.clip_norm else Verdict()
            for one in norms
        ]
