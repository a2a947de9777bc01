"""Sums of uploads of different versions, in asynchronous rounds: encrypted or not.

FedBuff multiplies each upload by a weight s that depends on its staleness. A sum of integers needs integers:

    w_i <- max(1, round(16 · s_i));   sum_i w_i · q_i decodes to sum_i w_i · delta_i;   divide by 16

The statistics of normalization are those of the clients, so the public differences between the models that they started
from and the present one are added. The store that decrypts may be at work: the server waits until it has answered.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from fedshelf.algorithms.base import Aggregate
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.core.messages import TaskKey, Upload
from fedshelf.core.ports import Reply
from fedshelf.core.state import OpenRound
from fedshelf.privacy.homomorphic.packing import MOST_WEIGHT
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.rounds.asynchronous.buffer import Entry
from fedshelf.rounds.asynchronous.in_flight import TasksInFlight
from fedshelf.rounds.dispatch import POLL_SECONDS, Arrived, TrafficCounter
from fedshelf.rounds.plan import Context
from fedshelf.rounds.sums.encrypted_uploads import Summand, decrypted_sum, decryptors
from fedshelf.rounds.sums.key_exchange import Dialog, KeyExchange
from fedshelf.rounds.sums.uploads import add_up, aggregate_of


class BufferedSums:
    """The sums of a run.

    Args:
        context: the run.
        encode: encodes uploads as integers.
        tasks: the tasks in flight.
        receive_later: takes what arrives while the server waits for something else.
    """

    def __init__(
        self, context: Context, encode: EncodeSummand, tasks: TasksInFlight, receive_later: Callable[[Arrived], None]
    ) -> None:  # fmt: skip
        self._context = context
        self._encode = encode
        self._tasks = tasks
        self._receive_later = receive_later
        form = context.encrypted_form
        self._keys = None if form is None else KeyExchange(context, context.plan.encryption, form)
        self._with_keys: dict[str, tuple[str, bytes]] = {}  # by store, its address, and the keys that it has
        self._idle: set[str] = set()  # stores whose answer was received to be used later

    @property
    def record(self) -> str:
        """What a restarted server needs to know of encryption."""
        return self._keys.settled if self._keys else ""

    def resume(self, opened: OpenRound | None) -> None:
        """Resume the round that a previous server process had opened."""
        if self._keys is not None:
            self._keys.resume(opened)

    def with_keys(self, names: Iterable[str], key: TaskKey) -> list[str]:
        """Let stores have the keys, if uploads are encrypted.

        Args:
            names: the stores; those at work have theirs.
            key: the round.

        Returns:
            Those that have them.

        Raises:
            RefusedError: there are no keys, because the store that generates them does not answer.
        """
        keys, members, names = self._keys, self._context.membership, list(names)
        if keys is None:
            return names
        holder = keys.choose_holder(members.live())
        if members.address(holder) is None:
            return []
        is_new = not self._has_keys(holder)
        missing = [name for name in names if name not in self._tasks and (is_new or not self._has_keys(name))]
        if is_new or missing:
            dropped: dict[str, str] = {}

            def drop(name: str, reason: str, reply: Reply | None) -> None:
                dropped[name] = reason
                if reply is not None:
                    members.on_failed(name, reason)

            keys.hand_out(self._dialog(key), missing, drop)
            for name in {holder, *missing} - dropped.keys():
                self._with_keys[name] = members.address(name) or "", keys.record.keys
        return [name for name in names if name in self._tasks or self._has_keys(name)]

    def problem_with(self, name: str) -> str:
        """Why the upload of a store cannot be added to others; "" if it can."""
        if self._keys is None or self._with_keys.get(name, ("", b""))[1] == self._keys.record.keys:
            return ""
        return "it is encrypted with keys that are gone: the store that generated them was restarted"

    def aggregate(
        self, uploads: Sequence[tuple[Entry, Upload]], present: Tensor, opened: OpenRound, *, wait: Callable[[], None]
    ) -> tuple[Aggregate, float | None]:  # fmt: skip
        """The aggregate of a full buffer.

        Args:
            uploads: with their entries.
            present: the model [S] that the next version is based on.
            opened: the round.
            wait: called again and again while the server waits for a store that decrypts.

        Returns:
            The aggregate, and the mean loss of training, if any upload has one.

        Raises:
            RefusedError: the sum cannot be decrypted.
        """
        context, encode = self._context, self._encode
        layout, weigh = context.model.layout, context.algorithm.weight
        weights = [max(1, round(MOST_WEIGHT * weigh(upload, entry.staleness))) for entry, upload in uploads]
        if self._keys is None:
            weighted = (
                tuple(part * part.dtype.type(weight) for part in encode.codes(upload, layout))
                for (_, upload), weight in zip(uploads, weights, strict=True)
            )
            total = add_up(encode.grid(layout).zeros(), weighted)
        else:
            summands = [
                Summand(client=entry.client, upload=upload, weight=weight)
                for (entry, upload), weight in zip(uploads, weights, strict=True)
            ]
            context.ports.checkpoints.save_open_round(replace(opened, encryption=wire.to_text(self._keys.record)))
            candidates = self._wait_for_decryptor(self._keys, wait)
            total = decrypted_sum(self._keys, self._dialog(opened.key), summands, candidates, weighted=True)
        self._idle.clear()
        aggregate, loss, _ = aggregate_of(context, encode, total, len(uploads))
        count, delta = layout.num_trainable, aggregate.delta.clone()
        for (entry, _), weight in zip(uploads, weights, strict=True):
            delta[count:] += weight / sum(weights) * (entry.base[count:] - present[count:])
        return replace(aggregate, delta=delta, mean_weight=aggregate.mean_weight / MOST_WEIGHT), loss

    def _wait_for_decryptor(self, keys: KeyExchange, wait: Callable[[], None]) -> list[str]:
        """Wait until a store that decrypts is not at work; return all such stores."""
        context, notice = self._context, self._context.inbox.notice()
        while True:
            found = [name for name in decryptors(context, keys) if name not in self._tasks or name in self._idle]
            if found:
                return found
            context.membership.check_enough_left()
            what = "a store that decrypts" if keys.any_decrypts else f"store '{keys.holder}', which decrypts"
            notice.check(what, live=context.membership.live(), missing=[keys.holder])
            arrived = context.inbox.poll(POLL_SECONDS)
            if arrived is not None:
                self._defer(arrived)
            wait()

    def _defer(self, arrived: Arrived) -> None:
        if isinstance(arrived, Reply):
            self._idle.add(arrived.client)
        self._receive_later(arrived)

    def _dialog(self, key: TaskKey) -> Dialog:
        return Dialog(key=key, traffic=TrafficCounter(), others=self._defer)

    def _has_keys(self, name: str) -> bool:
        if self._keys is None:
            return True
        return self._with_keys.get(name) == (self._context.membership.address(name), self._keys.record.keys)
