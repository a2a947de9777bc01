"""The server's part in handing out the keys of homomorphic encryption. It sees public keys and ciphertexts only.

    holder ─▶ keys (if the server knows them: nothing)    each store ─▶ request (if it has the keys: nothing)
    requests ─▶ holder ─▶ wrapped keys ─▶ each store

This happens before the first round, and with each later one for stores that have joined or were restarted since. A
holder that was restarted generates new keys; then all stores request them.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import (
    EncryptionReply,
    EncryptionRequest,
    EncryptionStage,
    TaskKey,
    Vector,
)
from fedshelf.core.ports import Reply
from fedshelf.core.state import OpenRound
from fedshelf.privacy.homomorphic.ceremony import KeyContext, KeyRequest, PublishedKeys
from fedshelf.privacy.homomorphic.key_messages import (
    HeldKeys,
    KeyAnswer,
    KeyDelivery,
    KeyQuery,
    KeyRequests,
    ShownKeys,
    WrappedKeys,
    name_of,
)
from fedshelf.privacy.homomorphic.settings import Encryption
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.rounds.dispatch import Arrived, Patience, Traffic
from fedshelf.rounds.plan import Context
from fedshelf.rounds.sums.masking_stages import AT_LEAST_SECONDS, FACTOR, content_of

logger = logging.getLogger(__name__)

OWN_ATTEMPTS = 1_000_000
"""Attempts from this number on are those of the exchange, so that no answer to a training matches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncryptionRecord:
    """What a restarted server needs of a round.

    Attributes:
        decryptor: the store that generates the keys, and decrypts unless every store may.
        keys: name of the published keys that uploads are encrypted with; empty as long as none are.
        members: whose uploads are in the sum, once that is fixed.
        weights: of their uploads, if they are weighted.
    """

    decryptor: str
    keys: bytes
    members: tuple[str, ...] = ()
    weights: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dialog:
    """How a round talks with stores.

    Attributes:
        key: the round's task.
        traffic: updated with what is sent and received.
        others: called with replies to other work; None: they are dropped.
    """

    key: TaskKey
    traffic: Traffic
    others: Callable[[Arrived], None] | None = None


class KeyExchange:
    """The keys of a run.

    Args:
        context: the run.
        encryption: the settings.
        form: the form of encrypted uploads.
    """

    def __init__(self, context: Context, encryption: Encryption, form: EncryptedForm) -> None:
        self.form = form
        self.any_decrypts = encryption.any_decrypts
        self._context = context
        self._named = None if encryption.any_decrypts else encryption.decryptor
        self._holder = self._named or ""
        self._ceremony: KeyContext | None = None
        self._published: PublishedKeys | None = None

    @property
    def holder(self) -> str:
        """The store that generates the keys; "" if none has yet."""
        return self._holder

    @property
    def record(self) -> EncryptionRecord:
        """The record of a round with the current keys."""
        return EncryptionRecord(
            decryptor=self._holder, keys=b"" if self._published is None else name_of(self._published)
        )

    @property
    def settled(self) -> str:
        """What has to be saved before the next round has any keys: who decrypts. "" if that is open."""
        return wire.to_text(EncryptionRecord(decryptor=self._holder, keys=b"")) if self._holder else ""

    def resume(self, opened: OpenRound | None) -> EncryptionRecord | None:
        """The record of a round that a previous server process had opened; None if it had not come so far."""
        if opened is None or not opened.encryption:
            return None
        record = wire.from_text(opened.encryption, EncryptionRecord)
        self._holder = self._named or record.decryptor
        return record

    def choose_holder(self, live: Iterable[str]) -> str:
        """Choose the store that generates the keys, unless it is settled.

        Args:
            live: stores that are there.
        """
        names = sorted(live)
        is_gone = self.any_decrypts and self._holder not in names
        if names and (not self._holder or is_gone):
            if not self.any_decrypts:
                logger.warning(
                    "the store '%s', the first by name, decrypts the sums of this run, and has to be there in each "
                    "round. Choose another one with --he-decryptor", names[0],
                )  # fmt: skip
            self._holder = names[0]
        return self._holder

    def hand_out(
        self, dialog: Dialog, names: Iterable[str], drop: Callable[[str, str, Reply | None], None]
    ) -> None:  # fmt: skip
        """Let stores have the keys.

        Args:
            dialog: with the stores.
            names: the stores.
            drop: called with a store that does not get the keys, and why.

        Raises:
            RefusedError: there are no keys, because the store that generates them does not answer.
        """
        known = b"" if self._published is None else name_of(self._published)
        query = KeyQuery(context=self._context_of(dialog.key.round), known=known)
        shown: ShownKeys = self._ask_holder(dialog, EncryptionStage.KEYS, query, ShownKeys)
        if shown.published is not None:
            if shown.context != replace(query.context, attempt=shown.context.attempt):
                raise RefusedError(f"the keys of '{self._holder}' are for another run or configuration")
            self._ceremony, self._published = shown.context, shown.published
        if self._ceremony is None or self._published is None:
            raise RefusedError(f"the store '{self._holder}' has shown no keys")
        requests: dict[str, KeyRequest] = {}

        def on_answer(answer: KeyAnswer) -> None:
            if answer.request is not None:
                requests[answer.member] = answer.request

        query = KeyQuery(context=self._ceremony, known=name_of(self._published))
        self.ask(
            dialog, {name: query for name in names if name != self._holder}, EncryptionStage.REQUEST, KeyAnswer,
            on_answer, drop,
        )  # fmt: skip
        if not requests:
            return
        asked = KeyRequests(requests=requests)
        wrapped: WrappedKeys = self._ask_holder(dialog, EncryptionStage.WRAP, asked, WrappedKeys)
        deliveries = {
            name: KeyDelivery(context=self._ceremony, published=self._published, wrapped=wrapped.wrapped[name])
            for name in requests.keys() & wrapped.wrapped.keys()
        }
        self.ask(dialog, deliveries, EncryptionStage.DELIVERY, HeldKeys, lambda held: None, drop)

    def _context_of(self, number: int) -> KeyContext:
        plan, packing = self._context.plan, self.form.packing
        return KeyContext(
            run_id=plan.run_id, config=plan.config_digest, attempt=number, sizes=self.form.scope.sizes,
            summands=packing.summands, holder=self._holder, is_shared=self.any_decrypts,
        )  # fmt: skip

    def _ask_holder(self, dialog: Dialog, stage: EncryptionStage, message: object, kind: type[Any]) -> Any:
        """Ask the store that generates the keys."""
        found: list[Any] = []
        problems = ["no answer in time"]
        self.ask(
            dialog, {self._holder: message}, stage, kind, found.append,
            lambda name, reason, reply: problems.append(reason),
        )  # fmt: skip
        if not found:
            raise RefusedError(f"the store '{self._holder}', which generates the keys: {problems[-1]}")
        return found[0]

    def ask(
        self, dialog: Dialog, messages: Mapping[str, object], stage: EncryptionStage, kind: type[Any],
        add: Callable[[Any], None], drop: Callable[[str, str, Reply | None], None], *,
        vectors: Mapping[str, Vector] | None = None, add_vectors: Callable[[Mapping[str, Vector]], None] | None = None,
    ) -> None:  # fmt: skip
        """Send stores the message of one step, and wait for their answers.

        Args:
            dialog: with the stores.
            messages: by store.
            stage: the step.
            kind: the class of an answer.
            add: takes an answer.
            drop: called with a store that does not answer as it should, why, and its reply.
            vectors: those of all messages.
            add_vectors: takes the vectors of an answer.
        """
        context, waiting = self._context, set(messages)
        key = replace(dialog.key, attempt=OWN_ATTEMPTS + dialog.key.attempt)
        patience = Patience(len(waiting), factor=FACTOR, at_least=AT_LEAST_SECONDS, timer=context.timer)

        def request(name: str) -> EncryptionRequest:
            return EncryptionRequest(
                key=key, stage=stage, content=wire.to_text(messages[name]), vectors=dict(vectors or {})
            )

        def on_reply(reply: Reply) -> None:
            waiting.discard(reply.client)
            patience.on_reply()
            try:
                found, message = content_of(reply, EncryptionReply, stage, kind), reply.message
                if add_vectors is not None and isinstance(message, EncryptionReply):
                    add_vectors(message.vectors)
                add(found)
            except RefusedError as error:
                drop(reply.client, str(error), reply)

        context.dispatcher.dispatch(
            sorted(waiting), key, request, on_reply, seconds=context.plan.rounds.timeout, traffic=dialog.traffic,
            enough=patience.is_over, others=dialog.others,
        )  # fmt: skip
        for name in sorted(waiting):
            there = context.membership.address(name) is not None
            drop(name, "no answer in time" if there else context.membership.absence(name), None)
