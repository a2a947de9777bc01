"""Sums of encrypted uploads: added up at the server, decrypted by a store.

    keys ─▶ train, encrypted uploads ─▶ add up ─▶ decryption ─▶ decode ─▶ aggregate

Whose uploads are in the sum is saved before it is sent to be decrypted, and the uploads are in the spool: a restarted
server has the same ciphertext decrypted, or none of this attempt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedshelf.algorithms.base import Aggregate
from fedshelf.compression.upload_grid import Integers
from fedshelf.core.errors import RefusedError
from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.messages import EncryptionStage, Failure, Upload, Vector
from fedshelf.core.ports import Reply
from fedshelf.core.state import OpenRound
from fedshelf.core.text import counted
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum
from fedshelf.privacy.homomorphic.key_messages import OpenedBy, SumRequest
from fedshelf.privacy.homomorphic.sum_check import SealedTag
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from fedshelf.rounds.plan import Context
from fedshelf.rounds.round_progress import RoundProgress
from fedshelf.rounds.sums.encrypting_client import SUM
from fedshelf.rounds.sums.key_exchange import Dialog, EncryptionRecord, KeyExchange
from fedshelf.rounds.sums.uploads import add_up, aggregate_of


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Summand:
    """An upload that is to be added up.

    Attributes:
        client: who sent it.
        upload: it, encrypted.
        weight: by which it is multiplied.
    """

    client: str
    upload: Upload
    weight: int = 1


def decrypted_sum(
    keys: KeyExchange, dialog: Dialog, summands: Sequence[Summand], candidates: Iterable[str], *, weighted: bool
) -> tuple[Integers, ...]:  # fmt: skip
    """The sum of encrypted uploads.

    Args:
        keys: of the run.
        dialog: with the stores.
        summands: the uploads.
        candidates: stores that may decrypt, in the order in which they are asked.
        weighted: whether the uploads are weighted, and of different rounds.

    Returns:
        The sums of codes.

    Raises:
        RefusedError: an upload is malformed, or no store decrypts the sum.
    """
    form, tags = keys.form, list[SealedTag]()
    encrypted, others = EncryptedSum(packing=form.packing), None
    for number, one in enumerate(summands):
        vector, tag, plain = form.opened(one.upload, one.client)
        encrypted.add(f"{one.client}, number {number}" if weighted else one.client, vector, weight=one.weight)
        plain = tuple(part * part.dtype.type(one.weight) for part in plain)
        others = plain if others is None else add_up(others, [plain])
        tags.append(tag)
    if others is None:
        raise RefusedError("there is no upload to decrypt")
    weights = tuple(one.weight for one in summands) if weighted else ()
    request, total = SumRequest(key=dialog.key, tags=tuple(tags), weights=weights), encrypted.total()
    problems: list[str] = []
    found: list[tuple[Integers, ...]] = []

    def drop(name: str, reason: str, reply: Reply | None) -> None:
        problems.append(f"'{name}': {reason}")

    def read(vectors: Mapping[str, Vector]) -> None:
        found.append(form.read_decrypted(vectors.get(SUM)))

    for name in candidates:
        keys.ask(
            dialog, {name: request}, EncryptionStage.DECRYPTION, OpenedBy, lambda opened: None, drop,
            vectors={SUM: form.sum_to_decrypt(total)}, add_vectors=read,
        )  # fmt: skip
        if found:
            return form.scope.join(found[0], others)
    raise RefusedError(f"the sum was not decrypted: {'; '.join(problems) or 'no store that decrypts is there'}")


class EncryptedRound:
    """The encryption of one attempt at a round.

    Args:
        context: the run.
        keys: of the run.
        progress: the replies; updated with members that get no keys.
        opened: the attempt.
    """

    def __init__(self, context: Context, keys: KeyExchange, progress: RoundProgress, opened: OpenRound) -> None:
        self._context = context
        self._keys = keys
        self._progress = progress
        self._opened = opened
        self._record = keys.resume(opened)
        self._dialog = Dialog(key=opened.key, traffic=progress)

    @property
    def is_closed(self) -> bool:
        """Whether it is fixed whose uploads are added up."""
        return self._record is not None and bool(self._record.members)

    def begin(self) -> None:
        """Let the members that have not replied have the keys, unless a previous server process has closed the round.

        Raises:
            RefusedError: there are no keys, or those of the uploads that have arrived are gone.
        """
        keys = self._keys
        if self.is_closed:
            return
        keys.choose_holder(self._context.membership.live() or self._opened.live)
        self._wait_for(keys.holder)
        keys.hand_out(self._dialog, self._progress.pending(), self._drop)
        if self._record is not None and self._record.keys not in (b"", keys.record.keys):
            raise RefusedError(f"the store '{keys.holder}' was restarted, and the keys of this round are gone")
        self._save(keys.record)

    def aggregate(self, uploads: Mapping[str, Upload]) -> tuple[Aggregate, float | None]:
        """The aggregate of the uploads.

        Args:
            uploads: by client.

        Returns:
            The aggregate, and the mean loss of training, if any upload has one.

        Raises:
            RefusedError: the sum cannot be decrypted, or the weights add up to nothing.
        """
        keys, members = self._keys, tuple(sorted(uploads))
        if self._record is not None and self._record.members:
            members = self._record.members
        if len(members) < LEAST_MEMBERS:
            raise RefusedError(
                f"homomorphic encryption needs at least {LEAST_MEMBERS} stores: the sum is of "
                f"{counted(len(members), 'store')}"
            )
        if missing := [name for name in members if name not in uploads]:
            raise RefusedError(f"the upload of {missing[0]} can no longer be read from the server's disk")
        self._save(replace(self._record or keys.record, members=members))
        summands = [Summand(client=name, upload=uploads[name]) for name in members]
        if not keys.any_decrypts:
            self._wait_for(keys.holder)
        total = decrypted_sum(keys, self._dialog, summands, decryptors(self._context, keys), weighted=False)
        aggregate, loss, _ = aggregate_of(self._context, keys.form.encode, total, len(members))
        return aggregate, loss

    def _save(self, record: EncryptionRecord) -> None:
        if record != self._record:
            self._record, self._opened = record, replace(self._opened, encryption=wire.to_text(record))
            self._context.ports.checkpoints.save_open_round(self._opened)

    def _wait_for(self, name: str) -> None:
        """Wait for the store without which the round cannot go on.

        Raises:
            RefusedError: it is excluded.
        """
        members = self._context.membership

        def is_over() -> bool:
            members.check_enough_left()
            return members.address(name) is not None or name in members.excluded()

        self._context.inbox.wait(is_over, f"store '{name}', which decrypts", lambda: [name])
        if name in members.excluded():
            raise RefusedError(f"the store '{name}', which decrypts, is excluded: {members.excluded()[name]}")

    def _drop(self, name: str, reason: str, reply: Reply | None) -> None:
        failure = reply.message if reply is not None and isinstance(reply.message, Failure) else None
        status = ClientStatus.REFUSED if failure is not None and failure.refused else ClientStatus.FAILED
        said = f"homomorphic encryption, keys: {reason}"
        self._progress.members[name] = Participation(client=name, status=status, reason=said)
        if reply is not None:
            self._context.membership.on_failed(
                name, reason, will_repeat=failure is not None and failure.will_repeat
            )  # fmt: skip


def decryptors(context: Context, keys: KeyExchange) -> list[str]:
    """The stores that may decrypt, in the order in which they are asked."""
    others = [name for name in context.membership.live() if name != keys.holder] if keys.any_decrypts else []
    return [keys.holder, *others] if context.membership.address(keys.holder) is not None else others
