"""What becomes of an answer to a training task before anything of it is used: opened, checked, bounded."""

from dataclasses import dataclass

from fedshelf.core.errors import RefusedError
from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.messages import CompressedUpload, Evaluation, Failure, TaskKey, Upload
from fedshelf.core.params import Layout
from fedshelf.core.ports import Received
from fedshelf.rounds.inbox import Answer
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.validation import cap_examples, check_upload


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ValidUpload:
    """An upload that may be spooled; `source` is the file that its vectors lie in, if they came in one."""

    upload: Upload
    source: Received | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UploadValidator:
    """Knows what an upload of this run must be. `auxiliary` names the vectors that the algorithm declares."""

    uploads: UploadPipeline
    layout: Layout
    auxiliary: tuple[str, ...]
    max_examples: int

    def examine(self, answer: Answer, key: TaskKey) -> ValidUpload | Participation:
        """The upload that answers the task `key`, or why there is none that can be used."""
        message = answer.message
        if isinstance(message, Failure):
            return Participation(client=answer.client, status=ClientStatus.FAILED, reason=message.reason)
        if not isinstance(message, Upload | CompressedUpload):
            reason = answer.reason or "it answered a training task with something else than an upload"
            return Participation(client=answer.client, status=ClientStatus.REFUSED, reason=reason)
        try:
            upload = self.uploads.open(message, self.layout)
            check_upload(upload, key=key, layout=self.layout, auxiliary=self.auxiliary)
        except RefusedError as error:
            return Participation(client=answer.client, status=ClientStatus.REFUSED, reason=str(error))
        source = answer.source if isinstance(message, Upload) else None  # the file of an encoded one is of no more use
        return ValidUpload(upload=cap_examples(upload, self.max_examples), source=source)


def counted(name: str, upload: Upload, *, staleness: int | None = None, number: int = 0) -> Participation:
    """What is recorded of an upload that counts."""
    return Participation(
        client=name, status=ClientStatus.COUNTED, num_examples=upload.num_examples, train_loss=upload.train_loss,
        seconds=upload.seconds, num_steps=upload.num_steps, batch_size=upload.batch_size, client_lr=upload.client_lr,
        staleness=staleness, number=number,
    )  # fmt: skip


def problem_with_evaluation(answer: Answer, key: TaskKey, num_validation: int) -> str:
    """Why an answer to the evaluation `key` is not used; empty if it is. The client came with so many photos for it."""
    message = answer.message
    if isinstance(message, Failure):
        return message.reason
    if not isinstance(message, Evaluation):
        return answer.reason or "it is something else"
    if message.key != key:
        return "it is for other work"
    if not 0 <= message.num_correct <= message.num_examples:
        return f"it claims {message.num_correct} of {message.num_examples} photos to be right"
    if message.num_examples != num_validation:
        return f"it is of {message.num_examples} photos, not of those that the client came with"
    return ""
