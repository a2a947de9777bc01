"""The upload pipeline: an ordered list of stages between training and the wire, and its inverse at the server.

    client:  upload ─▶ stage 1 seal ─▶ … ─▶ stage n seal ─▶ wire ─▶ stage n open ─▶ … ─▶ stage 1 open ─▶ validation

Everything that leaves a client is one upload and passes all stages. `problems` checks a combination by its declarations
when a run is configured, so that an unsafe one never starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedshelf.algorithms.base import Algorithm
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Upload
from fedshelf.core.params import Layout
from fedshelf.core.stages import Declaration, Stage
from fedshelf.core.state import ClientState


def problems(stages: Sequence[Stage]) -> list[str]:
    """Validate the order and combination of `stages`.

    Returns:
        All problems, each with its remedy.
    """
    declared = [stage.declares for stage in stages]
    found = [
        f"{one.setting}: there are two stages named {one.name!r}; leave one out"
        for number, one in enumerate(declared)
        if one.name in {other.name for other in declared[:number]}
    ]
    for number, stage in enumerate(declared):
        before, after = declared[:number], declared[number + 1 :]
        found += [
            f"{stage.setting} works on plain vectors, and {one.setting} has encoded them before: put it first"
            for one in before
            if one.encodes and (stage.clips or stage.adds_noise or stage.encodes)
        ]
        if stage.adds_noise:
            found += _problems_with_noise(stage, before, after)
        if stage.masks:
            found += [problem for one in before if one.encodes for problem in _problems_with_masks(one)]
            if not any(one.encodes for one in before):
                found.append(f"{stage.setting} masks integers: set --codec-up modular:BITS before it")
    return found


def _problems_with_noise(
    noise: Declaration, before: Sequence[Declaration], after: Sequence[Declaration]
) -> list[str]:  # fmt: skip
    found = []
    if not any(one.clips for one in before):
        found.append(f"{noise.setting} is calibrated to a norm, and nothing bounds it before: set --clip-norm")
    found += [f"{one.setting} clips after the noise of {noise.setting}: put it first" for one in after if one.clips]
    found += [
        f"{one.setting} needs error feedback, which carries what was clipped and left out into later rounds: the noise "
        f"of {noise.setting} does not cover that. Use a codec without a sparsifier"
        for one in after
        if one.carries_over
    ]
    return found


def _problems_with_masks(codec: Declaration) -> list[str]:
    found = []
    if not (codec.modular and codec.linear):
        found.append(
            f"{codec.setting} does not turn values into integers modulo a power of two, so masks would not cancel: "
            "use modular:BITS"
        )
    if codec.chooses_values:
        found.append(
            f"{codec.setting} lets every client choose which values it sends: masked sums need the same ones from all, "
            "and the choice itself tells of the photos: use modular:BITS alone"
        )
    if codec.compresses:
        found.append(f"{codec.setting}: masked values are random and cannot be made smaller: leave zstd out")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadPipeline:
    """Both ends of the upload pipeline.

    Attributes:
        stages: in the order in which a client applies them.
    """

    stages: tuple[Stage, ...] = ()

    def of(self, algorithm: Algorithm, layout: Layout) -> "UploadPipeline":
        """The stages that uploads of `algorithm` pass: sums over photos pass only those that add them up unseen.

        Args:
            algorithm: the algorithm, for the run's model.
            layout: the model's layout.
        """
        if not algorithm.sums:
            return self
        found = algorithm.vectors(layout).items()
        vectors = {name: (spec.size, getattr(torch, spec.dtype)) for name, spec in found}
        return UploadPipeline(
            stages=tuple(
                stage.of_sums(lambda layout: vectors) if isinstance(stage, EncodeSummand) else stage
                for stage in self.stages
                if isinstance(stage, EncodeSummand) or stage.declares.masks
            )
        )

    @property
    def summand(self) -> EncodeSummand | None:
        """What turns uploads into integers of which only the sum is decoded; None if each is decoded by itself."""
        return next((stage for stage in self.stages if isinstance(stage, EncodeSummand)), None)

    @property
    def is_masked(self) -> bool:
        """Whether the server sees no upload by itself."""
        return any(stage.declares.masks for stage in self.stages)

    @property
    def is_encrypted(self) -> bool:
        """Whether uploads are encrypted, and only their sum is decrypted."""
        return any(stage.declares.encrypts for stage in self.stages)

    @property
    def protections(self) -> tuple[str, ...]:
        """The stages that limit what an upload reveals, as the user enabled them: `clip-norm 1`. No codec is one."""
        declared = (stage.declares for stage in self.stages)
        return tuple(one.setting.removeprefix("--") for one in declared if one.clips or one.adds_noise or one.masks)

    @property
    def masks(self) -> tuple[str, ...]:
        """Those of `protections` that show the server only a sum, which evaluations pass, too."""
        declared = (stage.declares for stage in self.stages)
        return tuple(one.setting.removeprefix("--") for one in declared if one.masks)

    def seal(
        self, upload: Upload, *, client: str, before: ClientState, after: ClientState, layout: Layout
    ) -> tuple[Upload, ClientState]:  # fmt: skip
        """Apply all stages at the client.

        Args:
            upload: the result of training.
            client: the client's name.
            before: the client's state before the round.
            after: the client's state after the round, without the pipeline's part.
            layout: the model's layout.

        Returns:
            The upload to send, and the complete state after the round.
        """
        kept = {}
        for stage in self.stages:
            name = stage.declares.name
            upload, memory = stage.seal(upload, before.pipeline.get(name), client=client, layout=layout)
            if memory is not None:
                kept[name] = memory
        return upload, replace(after, pipeline=kept)

    def open(self, sealed: Upload, layout: Layout) -> Upload:
        """Invert all stages at the server.

        Returns:
            The upload as the algorithm expects it.

        Raises:
            RefusedError: it has another codec than the run's, another size, or inconsistent parts.
        """
        for stage in reversed(self.stages):
            sealed = stage.open(sealed, layout)
            if stage.declares.encrypts:
                return sealed
        if not sealed.is_plain and self.summand is None:
            raise RefusedError("it is compressed: the client's configuration is another")
        return sealed
