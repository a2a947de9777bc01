"""The buffer of uploads for the next version, in asynchronous rounds.

Uploads are spooled as they arrive and aggregated in the order of client names. One client may have several in a buffer.
In the spool, each is stored under the key of the version that it contributes to, with its index among the client's
uploads as the attempt, so that a restarted server finds them all.

Shapes: S shared values, T shared trainable values.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from fedshelf.algorithms.aggregation import capped, combine, outliers
from fedshelf.algorithms.base import Aggregate, Algorithm
from fedshelf.algorithms.reduce import Aggregator, Verdict
from fedshelf.core.errors import RefusedError
from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.messages import TaskKey, Upload
from fedshelf.core.params import Layout
from fedshelf.core.ports import Received, Spool
from fedshelf.rounds.validation import counted


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """One upload in the buffer.

    Attributes:
        client: the client that sent it.
        number: its index among the client's uploads in this buffer.
        task: the task that it answers.
        staleness: versions made since the task's model.
        base: the model [S] that training started from.
        record: the client's part in the round.
    """

    client: str
    number: int
    task: TaskKey
    staleness: int
    base: Tensor
    record: Participation


class UploadBuffer:
    """Collects the uploads for one version at a time.

    Args:
        spool: stores the uploads.
        layout: the model's layout.
        run_id: the run.
    """

    def __init__(self, *, spool: Spool, layout: Layout, run_id: str) -> None:
        self._spool = spool
        self._layout = layout
        self._run_id = run_id
        self._version = 0
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, version: int, model_at: Callable[[int], Tensor | None]) -> None:
        """Start collecting for `version`, with the uploads that a previous server process left in the spool, if any.

        Args:
            version: the version that the uploads contribute to.
            model_at: returns the model after a number of versions, as clients had it; None if it is lost.
        """
        self._version, self._entries = version, []
        number = 0
        while names := self._spool.names(self._key(number)):
            for name in names:
                try:
                    upload = self._spool.get(self._key(number), name)
                except RefusedError:  # the spool has said why
                    continue
                base = model_at(upload.key.round - 1) if isinstance(upload, Upload) else None
                if isinstance(upload, Upload) and base is not None:
                    self._enter(name, number, upload, base)
            number += 1

    def add(self, client: str, upload: Upload, base: Tensor, source: Received | None = None) -> Entry:
        """Add an upload.

        Args:
            client: the client that sent it.
            upload: the upload.
            base: the model [S] that training started from.
            source: the file that holds the upload.

        Returns:
            Its entry in the buffer.
        """
        number = 1 + max((entry.number for entry in self._entries if entry.client == client), default=-1)
        self._spool.put(self._key(number), client, upload, source)
        return self._enter(client, number, upload, base)

    def staleness(self, task: TaskKey) -> int:
        """Number of versions made since the model of `task`."""
        return self._version - task.round

    def num_answered(self, client: str, round: int) -> int:
        """Number of uploads in this buffer from `client` that were trained on the model before `round`."""
        return sum(entry.client == client and entry.task.round == round for entry in self._entries)

    def newest(self) -> Mapping[str, TaskKey]:
        """By client, the newest task answered in this buffer."""
        return {entry.client: entry.task for entry in sorted(self._entries, key=lambda entry: entry.number)}

    def records(self) -> list[Participation]:
        """The records of the uploads, ordered by name and number."""
        return [entry.record for entry in self._ordered()]

    def drop_unreadable(self) -> dict[str, str]:
        """Drop the clients of which an upload can no longer be read; return the reason by client."""
        found = {}
        for entry in self._entries:
            try:
                self._upload(entry)
            except RefusedError as error:
                found[entry.client] = str(error)
        self._drop(found)
        return found

    def drop_all(self) -> None:
        """Drop all uploads."""
        self._entries = []

    def uploads(self) -> list[tuple[Entry, Upload]]:
        """The uploads with their entries, ordered by name and number."""
        return [(entry, self._upload(entry)) for entry in self._ordered()]

    def drop_outliers(self) -> dict[str, str]:
        """Drop the clients whose uploads stand out, or all if none does; return the reason by client."""
        entries = self._ordered()
        clients = [entry.client for entry in entries]
        found = outliers([self._upload(entry) for entry in entries], clients, self._layout.num_trainable)
        self._drop(found or clients)
        return found

    def combine(
        self, algorithm: Algorithm, aggregator: Aggregator, present: Tensor, *, relative: bool,
        num_train: Mapping[str, int] = MappingProxyType({}),
    ) -> Aggregate:  # fmt: skip
        """Aggregate the uploads.

        Args:
            algorithm: weights the uploads.
            aggregator: aggregates them.
            present: the model [S] that the next version is based on.
            relative: use each client's difference to `present` instead of to its own base. Batch-norm statistics always
                use it: they track the photos, and a sum of stale differences would oscillate around the true value.
            num_train: by live client, its training photos, against which claims of weight are capped.

        Returns:
            The aggregate of all uploads, with capped weights.
        """
        entries = self._ordered()
        uploads = [self._upload(entry) for entry in entries]
        most = {entry.client: upload.weight for entry, upload in zip(entries, uploads, strict=True)}
        others = [count for name, count in num_train.items() if name not in most]
        most = dict(zip(most, capped(list(most.values()), others), strict=True))
        claims = [min(u.weight, most[entry.client]) for u, entry in zip(uploads, entries, strict=True)]
        uploads = [replace(upload, num_examples=most) for upload, most in zip(uploads, claims, strict=True)]
        if relative:
            uploads = [
                upload.with_vectors(delta=upload.delta + (entry.base - present))
                for upload, entry in zip(uploads, entries, strict=True)
            ]
        count = self._layout.num_trainable
        statistics = None
        if not relative and self._layout.num_shared > count:
            statistics = [
                upload.delta[count:] + (entry.base[count:] - present[count:])
                for upload, entry in zip(uploads, entries, strict=True)
            ]
        weights = [algorithm.weight(u, staleness=entry.staleness) for u, entry in zip(uploads, entries, strict=True)]
        aggregate, verdicts = combine(uploads, weights, aggregator, num_trainable=count, statistics=statistics)
        self._entries = [_judged(*judged) for judged in zip(entries, claims, verdicts, strict=True)]
        return aggregate

    def _enter(self, client: str, number: int, upload: Upload, base: Tensor) -> Entry:
        staleness = self.staleness(upload.key)
        entry = Entry(
            client=client, number=number, task=upload.key, staleness=staleness, base=base,
            record=counted(client, upload, staleness=staleness, number=number),
        )  # fmt: skip
        self._entries.append(entry)
        return entry

    def _ordered(self) -> list[Entry]:
        return sorted(self._entries, key=lambda entry: (entry.client, entry.number))

    def _drop(self, clients: Container[str]) -> None:
        self._entries = [entry for entry in self._entries if entry.client not in clients]

    def _upload(self, entry: Entry) -> Upload:
        upload = self._spool.get(self._key(entry.number), entry.client)
        if not isinstance(upload, Upload):
            raise RefusedError("what was received of it is no upload any more")
        return upload

    def _key(self, number: int) -> TaskKey:
        return TaskKey(run_id=self._run_id, round=self._version, attempt=number)


def _judged(entry: Entry, num_examples: int, verdict: Verdict) -> Entry:
    status = ClientStatus.REFUSED if verdict.left_out else entry.record.status
    told = None if entry.record.num_examples is None else num_examples
    return replace(entry, record=replace(entry.record, status=status, num_examples=told, reason=verdict.reason))
