"""Validation of messages before any part of them is used: a server's broadcasts, a client's replies.

Shapes: S shared values.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedshelf.algorithms.base import Candidates, VectorSpec
from fedshelf.algorithms.reduce import norm, quick_norm
from fedshelf.core import text
from fedshelf.core.errors import RefusedError
from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.messages import (
    AUXILIARY,
    DELTA,
    Broadcast,
    CandidateScore,
    Comparison,
    Evaluation,
    Failure,
    Purpose,
    TaskKey,
    Upload,
)
from fedshelf.core.params import Layout
from fedshelf.core.ports import Received, Reply
from fedshelf.data.product_tree import ProductTree
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.rounds.pipeline import UploadPipeline

MAX_REASON_CHARACTERS = 2000  # of text sent by a client, which is recorded and displayed
BLOCK = 1 << 20  # values checked at once
MAX_NUMBER = 10**9  # of rounds, attempts and steps; far more than any run has


def check_broadcast(broadcast: Broadcast, layout: Layout) -> None:
    """Refuse a task that does not fit the model, or whose numbers make no sense.

    Args:
        broadcast: the task, with a plain model.
        layout: the client's layout.

    Raises:
        RefusedError: names the first problem.
    """
    if len(broadcast.params) != layout.num_shared:
        raise RefusedError(f"the model has {len(broadcast.params):,} values, not {layout.num_shared:,}")
    if doubles := [name for name, vector in broadcast.auxiliary.items() if vector.dtype != torch.float32]:
        raise RefusedError(f"its vectors {doubles} are not float32")
    if broadcast.purpose is Purpose.TRAIN:
        wrong = [name for name, vector in broadcast.auxiliary.items() if len(vector) != layout.num_trainable]
        if wrong:
            raise RefusedError(f"its vectors {wrong} do not have the {layout.num_trainable:,} trainable values")
    for name, number, least in (
        ("round", broadcast.key.round, 0), ("attempt", broadcast.key.attempt, 0),
        ("number of steps", broadcast.num_steps, 1), ("number of rounds", broadcast.num_rounds, 1),
    ):  # fmt: skip
        if number is not None and not least <= number <= MAX_NUMBER:
            raise RefusedError(f"its {name} is {number:,}, not in {least} to {MAX_NUMBER:,}")
    if not 0 <= broadcast.client_lr < math.inf:  # also refuses NaN
        raise RefusedError(f"its learning rate is {broadcast.client_lr}")


def check_key(upload: Upload, key: TaskKey) -> None:
    """Refuse an upload that answers another task.

    Raises:
        RefusedError: it does.
    """
    if upload.key != key:
        raise RefusedError(
            f"it is for {_describe(upload.key)}, and the open one is {_describe(key)}: stale or of another run"
        )


def check_upload(
    upload: Upload, *, key: TaskKey, layout: Layout, vectors: Mapping[str, VectorSpec], sums: bool = False
) -> None:  # fmt: skip
    """Refuse an upload that answers another task, has another shape, or makes impossible claims.

    Args:
        upload: the upload, decoded.
        key: the open task.
        layout: the server's layout.
        vectors: the vectors that the algorithm declares.
        sums: whether they are sums over photos, which may be of no photo.

    Raises:
        RefusedError: names the first problem.
    """
    check_key(upload, key)
    if upload.delta.numel() != vectors[DELTA].size:
        raise RefusedError(
            f"its delta has shape ({upload.delta.numel()},), the server's layout ({vectors[DELTA].size},): the "
            "client's model or catalogue is another; start 'fedshelf client' again"
        )
    auxiliary = {name.removeprefix(AUXILIARY): spec for name, spec in vectors.items() if name.startswith(AUXILIARY)}
    if set(upload.auxiliary) != set(auxiliary):
        raise RefusedError(
            f"it carries the vectors {sorted(upload.auxiliary)}, the algorithm declares {sorted(auxiliary)}"
        )
    wrong = [
        f"{name} ({vector.numel():,} {vector.dtype} values, not {auxiliary[name].size:,} of {auxiliary[name].dtype})"
        for name, vector in upload.auxiliary.items()
        if (vector.numel(), str(vector.dtype)) != (auxiliary[name].size, f"torch.{auxiliary[name].dtype}")
    ]
    if wrong:
        raise RefusedError(f"its vectors do not have the size that the algorithm declares: {', '.join(wrong)}")
    num_steps = upload.num_steps or 0
    if upload.weight < (not sums) or num_steps < 0:
        raise RefusedError(f"it claims {text.counted(upload.weight, 'example')} in {text.counted(num_steps, 'step')}")
    metrics = (upload.train_loss or 0.0, upload.seconds or 0.0, upload.client_lr or 0.0)
    if not all(math.isfinite(metric) for metric in metrics):
        raise RefusedError(
            f"its metrics are not finite (train_loss {upload.train_loss}, seconds {upload.seconds}, "
            f"client_lr {upload.client_lr})"
        )


def norm_of_finite(upload: Upload, layout: Layout) -> float:
    """The norm of an upload's trainable part.

    Args:
        upload: the upload, decoded, of valid sizes.
        layout: the server's layout.

    Raises:
        RefusedError: a value of the upload is NaN or infinite; names the tensor that it is in.
    """
    trainable, statistics = upload.delta[: layout.num_trainable], upload.delta[layout.num_trainable :]
    quick = quick_norm(trainable)
    is_finite = math.isfinite(quick)  # then so is each value, which saves a second pass
    for name, start, vector in (
        *(() if is_finite else (("delta", 0, trainable),)), ("delta", layout.num_trainable, statistics),
        *((name, 0, vector) for name, vector in upload.auxiliary.items()),
    ):  # fmt: skip
        bad = first_not_finite(vector)
        if bad is not None:
            where = f" in tensor {layout.at(start + bad).name!r}" if name == "delta" else ""
            raise RefusedError(
                f"its {name} holds {vector[bad].item()}{where}; training diverged, or the data is damaged"
            )
    return quick if is_finite else norm(trainable)


def check_comparison(comparison: Comparison, *, key: TaskKey, num_validation: int) -> None:
    """Refuse a comparison that answers another task or makes impossible claims.

    Args:
        comparison: the comparison.
        key: the open task.
        num_validation: the validation photos that the client joined with.

    Raises:
        RefusedError: names the first problem.
    """
    if comparison.key != key:
        raise RefusedError("it is for other work")
    if comparison.num_validation is not None and comparison.num_validation != num_validation:
        raise RefusedError(
            f"it was chosen on {text.counted(comparison.num_validation, 'validation photo')}, the client joined with "
            f"{num_validation}"
        )
    for candidate, accuracy in comparison.accuracies.items():
        if not 0 <= accuracy <= 1:  # also refuses NaN
            raise RefusedError(f"it claims an accuracy of {accuracy} for the {candidate.value} model")
    if comparison.accuracies and comparison.best is not None and comparison.best not in comparison.accuracies:
        raise RefusedError(f"it keeps the {comparison.best.value} model, and says nothing of how that does")


def problem_with_scores(evaluation: Evaluation, candidates: Candidates) -> str:
    """Why the scores of candidates are not used; empty if they are.

    Args:
        evaluation: the client's reply.
        candidates: the models that it was asked to score.
    """
    scores = evaluation.candidates
    if [len(score.losses) for score in scores] != [candidates.num_losses] * candidates.num_models:
        return f"it has {text.counted(len(scores), 'score')} for {text.counted(candidates.num_models, 'model')}"
    if any(score.num_correct > evaluation.num_examples for score in scores):
        return "it claims more right answers than photos"
    if any(loss < 0 for score in scores for loss in score.losses):
        return "it claims a loss below zero"
    return ""


def summed_scores(scores: Iterable[tuple[Sequence[CandidateScore], float]]) -> tuple[CandidateScore, ...]:
    """The scores of candidates over all clients.

    Args:
        scores: those of each client, and its weight: 1, or less if it claims too many photos.
    """
    rows, weights = zip(*scores, strict=True)
    return tuple(
        CandidateScore(
            num_correct=int(sum(weight * score.num_correct for weight, score in zip(weights, of_one, strict=True))),
            losses=tuple(
                math.fsum(weight * loss for weight, loss in zip(weights, losses, strict=True))
                for losses in zip(*(score.losses for score in of_one), strict=True)
            ),
        )
        for of_one in zip(*rows, strict=True)
    )


def cap_examples(upload: Upload, most: int) -> Upload:
    """Bound the weight that an upload claims to `most`: a hostile client may claim any number of photos."""
    return replace(upload, num_examples=most) if upload.weight > most else upload


def first_not_finite(vector: Tensor) -> int | None:
    """The index of the first value that is NaN or infinite; None if there is none."""
    for start in range(0, vector.numel(), BLOCK):
        block = vector[start : start + BLOCK]
        # If any value is not finite (NaN included), the extremes are not, and they cost a tenth of `isfinite`.
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(block)):
            return start + int(torch.isfinite(block).logical_not().nonzero()[0])
    return None


def _describe(key: TaskKey) -> str:
    return f"round {key.round}, attempt {key.attempt + 1} of run {key.run_id}"


class ValidUpload(NamedTuple):
    """An upload that may be used.

    Attributes:
        upload: the upload.
        norm: the norm of its trainable part; None if masks hide it.
    """

    upload: Upload
    norm: float | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UploadValidator:
    """Validates uploads of this run.

    Attributes:
        uploads: stages that uploads have passed.
        layout: the model's layout.
        vectors: the vectors that the algorithm declares.
        max_examples: upper bound on the weight that one client may claim.
        sums: whether the vectors are sums over photos, which cannot be given less weight.
        encrypted: the form of encrypted uploads; None if they are not encrypted.
    """

    uploads: UploadPipeline
    layout: Layout
    vectors: Mapping[str, VectorSpec]
    max_examples: int
    sums: bool = False
    encrypted: EncryptedForm | None = None

    def validate(
        self, reply: Reply, key: TaskKey, checked: Callable[[Upload], Upload] = lambda upload: upload
    ) -> ValidUpload | Participation:
        """Open and validate the upload in `reply`.

        Args:
            reply: the client's reply.
            key: the open task.
            checked: refuses an upload whose values make no sense to the algorithm.

        Returns:
            The upload that answers the task `key`, or a record of why it cannot be used.
        """
        message = reply.message
        if isinstance(message, Failure):
            status = ClientStatus.REFUSED if message.refused else ClientStatus.FAILED
            return Participation(client=reply.client, status=status, reason=message.reason)
        if not isinstance(message, Upload):
            reason = reply.reason or "it answered a training task with something else than an upload"
            return Participation(client=reply.client, status=ClientStatus.REFUSED, reason=reason)
        try:
            upload = self.uploads.open(message, self.layout)
            if self.uploads.summand is not None:  # values are known in the sum alone
                check_key(upload, key)
                if self.encrypted is not None:
                    self.encrypted.opened(upload, reply.client)
                return ValidUpload(upload, None)
            check_upload(upload, key=key, layout=self.layout, vectors=self.vectors, sums=self.sums)
            norm = self.norm(upload)
            if self.sums and upload.weight > self.max_examples:
                raise RefusedError(
                    f"its sums are of {text.counted(upload.weight, 'photo')}, more than --max-examples "
                    f"{self.max_examples:,}"
                )
            upload = checked(upload)
        except RefusedError as error:
            reason = str(error)[:MAX_REASON_CHARACTERS]
            return Participation(client=reply.client, status=ClientStatus.REFUSED, reason=reason)
        return ValidUpload(cap_examples(upload, self.max_examples), norm)

    def norm(self, upload: Upload) -> float | None:
        """The norm of an upload's trainable part; None if masks hide it.

        Raises:
            RefusedError: a value of the upload is not finite.
        """
        return None if self.uploads.summand is not None else norm_of_finite(upload, self.layout)


def counted(name: str, upload: Upload, *, staleness: int | None = None, number: int = 0) -> Participation:
    """The record of a counted upload."""
    return Participation(
        client=name, status=ClientStatus.COUNTED, num_examples=upload.num_examples, train_loss=upload.train_loss,
        seconds=upload.seconds, num_steps=upload.num_steps, batch_size=upload.batch_size, client_lr=upload.client_lr,
        staleness=staleness, number=number,
    )  # fmt: skip


def source_of(reply: Reply, upload: Upload) -> Received | None:
    """The file that holds the vectors of `upload`; None if they were modified after arrival."""
    message = reply.message
    return reply.source if isinstance(message, Upload) and message.vectors is upload.vectors else None


def problem_with_evaluation(
    reply: Reply, key: TaskKey, num_validation: int, tree: ProductTree | None = None
) -> str:  # fmt: skip
    """Validate the reply to an evaluation.

    Args:
        reply: the client's reply.
        key: the open task.
        num_validation: the validation photos that the client joined with.
        tree: the product tree, if the client was asked to count by product.

    Returns:
        Why the reply is not used; empty if it is.
    """
    message = reply.message
    if isinstance(message, Failure):
        return message.reason
    if not isinstance(message, Evaluation):
        return reply.reason or "it is something else"
    if message.key != key:
        return "it is for other work"
    if not 0 <= message.num_correct <= message.num_examples:
        return f"it claims {message.num_correct} right answers of {message.num_examples}"
    if message.num_examples != num_validation:
        return f"its number of photos is {message.num_examples}, not {num_validation} as when the client joined"
    return _problem_with_counts(message, tree)


def _problem_with_counts(evaluation: Evaluation, tree: ProductTree | None) -> str:
    products, levels = evaluation.products, evaluation.levels
    if not products and not levels:  # not asked for, or withheld
        return ""
    if tree is None:
        return "it counts by product, and was not asked to"
    indices = [product.index for product in products]
    if indices != sorted(set(indices)) or (indices and indices[-1] >= len(tree.paths)):
        return f"it counts products twice, in another order, or beyond the {text.counted(len(tree.paths), 'product')}"
    wrong = next((product for product in products if not product.correct <= product.total or not product.total), None)
    if wrong:
        return f"it claims {wrong.correct} right answers of {wrong.total} for product {wrong.index}"
    sums = (sum(product.correct for product in products), sum(product.total for product in products))
    if sums != (evaluation.num_correct, evaluation.num_examples):
        return (
            f"its products add up to {sums[0]} right answers of {sums[1]}, not {evaluation.num_correct} of "
            f"{evaluation.num_examples}"
        )
    bounds = (evaluation.num_examples, *levels, evaluation.num_correct)
    if len(levels) != tree.depth or levels[-1] != evaluation.num_correct or list(bounds) != sorted(bounds)[::-1]:
        return f"its counts by level are {list(levels)}, for {text.counted(tree.depth, 'level')}"
    return ""
