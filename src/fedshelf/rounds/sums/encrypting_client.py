"""A client whose uploads are encrypted: keys, encryption after training, and decryption of sums.

    EncryptionRequest ─▶ the steps of `privacy.homomorphic.key_messages`
    Broadcast         ─▶ train, and encrypt the upload

Keys are in this process only. A client that has restarted since requests them again with the next round.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedshelf.core.errors import FedShelfError, PolicyError, RefusedError
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    EncryptionReply,
    EncryptionRequest,
    EncryptionStage,
    Failure,
    Purpose,
    ServerMessage,
    Setup,
    Upload,
    Vector,
)
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.homomorphic.ceremony import KeyContext, KeyHolder, KeyMember, StoreKeys, check_requests
from fedshelf.privacy.homomorphic.decryptors import DecryptorRecord
from fedshelf.privacy.homomorphic.key_messages import (
    HeldKeys,
    KeyAnswer,
    KeyDelivery,
    KeyQuery,
    KeyRequests,
    OpenedBy,
    ShownKeys,
    SumRequest,
    WrappedKeys,
    name_of,
)
from fedshelf.privacy.homomorphic.settings import Encryption
from fedshelf.privacy.homomorphic.store import SumDecryptor, UploadEncryptor
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS, RoundContext
from fedshelf.privacy.secure_aggregation.keys import Identities
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSumStore
from fedshelf.rounds.sums.masking_client import task_digest

SUM = "sum"
"""Name of the vector of a message that holds a sum."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncryptionTerms:
    """What a client knows of the encryption of its run.

    Attributes:
        run_id: the run.
        config: digest of its configuration.
        encryption: the settings.
        form: the form of encrypted uploads.
        is_buffered: whether uploads of different rounds are added up, with weights.
    """

    run_id: str
    config: str
    encryption: Encryption
    form: EncryptedForm
    is_buffered: bool


@dataclass(kw_only=True, slots=True)
class _Keys:
    """The keys of a ceremony, or what is there of them.

    Attributes:
        run_id: the run.
        context: of the ceremony.
        holder: generates keys, if this client does.
        request: this client's request, until it is answered.
        held: the keys; None until they have arrived.
        name: of the published keys; empty until they have arrived.
        sent: the newest upload, encrypted.
    """

    run_id: str
    context: KeyContext
    holder: KeyHolder | None = None
    request: KeyMember | None = None
    held: StoreKeys | None = None
    name: bytes = b""
    sent: Upload | None = None


class EncryptingClient:
    """Encrypts what a client sends: call `before`, the client itself unless that has answered, and `after`.

    Args:
        member: returns the client's name.
        terms: returns the terms of the current run; None if its uploads are not encrypted.
        opened_sums: the client's record of the sums that it decrypts.
        decryptors: the client's record of which store decrypts.
        identity: returns the key that signs; None: nothing is signed.
        identities: returns all stores' identity keys; None: the server is believed to name real stores.
        min_cohort: how many members a sum has at least.
    """

    def __init__(
        self, member: Callable[[], str], *, terms: Callable[[], EncryptionTerms | None], opened_sums: OpenedSumStore,
        decryptors: DecryptorRecord, identity: Callable[[], KeyPair | None] = lambda: None,
        identities: Callable[[], Identities | None] = lambda: None, min_cohort: int = LEAST_MEMBERS,
    ) -> None:  # fmt: skip
        self._member = member
        self._terms = terms
        self._opened_sums = opened_sums
        self._decryptors = decryptors
        self._identity = identity
        self._identities = identities
        self._min_cohort = min_cohort
        self._keys: _Keys | None = None

    def before(self, message: ServerMessage) -> ClientMessage | None:
        """Answer a message, if it is one of the exchange, or there are no keys; None: it is for the client."""
        try:
            if isinstance(message, EncryptionRequest):
                return self._reply_to(message)
            terms = self._terms() if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN else None
            if terms is not None:
                self._held(terms)  # before the training, which would be in vain
        except FedShelfError as error:
            key = None if isinstance(message, Setup) else message.key
            return Failure(key=key, reason=str(error), refused=isinstance(error, PolicyError))
        return None

    def after(self, message: ServerMessage, reply: ClientMessage) -> ClientMessage:
        """Encrypt the client's reply to a message, if it is an upload of an encrypted run."""
        terms = self._terms() if isinstance(message, Broadcast) and isinstance(reply, Upload) else None
        if terms is None or not isinstance(message, Broadcast) or not isinstance(reply, Upload):
            return reply
        try:
            keys = self._held(terms)
            if keys.sent is None or keys.sent.key != message.key:  # otherwise it is asked for again
                keys.sent = self._encrypted(terms, keys, message, reply)
        except FedShelfError as error:
            return Failure(key=message.key, reason=str(error))
        return keys.sent

    def _encrypted(self, terms: EncryptionTerms, keys: _Keys, task: Broadcast, upload: Upload) -> Upload:
        form = terms.form
        if keys.held is None:
            raise RefusedError(_NO_KEYS)
        encrypted, others = form.scope.split(form.encode.codes(upload, form.layout))
        context = RoundContext(key=task.key, model=task_digest(task), config=terms.config, sizes=form.scope.sizes)
        encryptor = UploadEncryptor(self._member(), keys.held, form.packing, identity=self._identity())
        sealed = encryptor.encrypt(context, encrypted)
        return form.upload(upload, sealed.vector, sealed.tag, others)

    def _reply_to(self, request: EncryptionRequest) -> EncryptionReply:
        terms, text, vectors = self._terms(), request.content, dict[str, Vector]()
        if terms is None:
            raise RefusedError("this run's uploads are not encrypted")
        if request.key.run_id != terms.run_id:
            raise RefusedError(f"run {request.key.run_id} was never set up at this client")
        content: object
        match request.stage:
            case EncryptionStage.KEYS:
                content = self._show(terms, wire.from_text(text, KeyQuery))
            case EncryptionStage.REQUEST:
                content = self._ask_for(terms, wire.from_text(text, KeyQuery))
            case EncryptionStage.WRAP:
                content = self._wrap(terms, wire.from_text(text, KeyRequests))
            case EncryptionStage.DELIVERY:
                content = self._receive(terms, wire.from_text(text, KeyDelivery))
            case EncryptionStage.DECRYPTION:
                wanted = wire.from_text(text, SumRequest)
                vectors[SUM] = self._decrypted(terms, wanted, request.vectors.get(SUM))
                content = OpenedBy(member=self._member(), key=wanted.key)
        return EncryptionReply(key=request.key, stage=request.stage, content=wire.to_text(content), vectors=vectors)

    def _show(self, terms: EncryptionTerms, query: KeyQuery) -> ShownKeys:
        """Lines 2 to 5 of the ceremony, unless this store has done that before."""
        self._check(terms, query.context)
        if query.context.holder != self._member():
            raise RefusedError(f"this store is asked for the keys that '{query.context.holder}' generates")
        keys = self._current(terms)
        if keys is None or keys.holder is None:
            holder = KeyHolder(query.context, identity=self._identity(), identities=self._identities())
            self._keys = keys = _Keys(
                run_id=terms.run_id, context=query.context, holder=holder, held=holder.keys,
                name=name_of(holder.published),
            )  # fmt: skip
        shown = None if keys.name == query.known or keys.holder is None else keys.holder.published
        return ShownKeys(member=self._member(), context=keys.context, published=shown)

    def _ask_for(self, terms: EncryptionTerms, query: KeyQuery) -> KeyAnswer:
        """Line 1, unless this store has the keys."""
        self._check(terms, query.context)
        keys = self._current(terms)
        if keys is not None and keys.name == query.known:
            return KeyAnswer(member=self._member(), request=None)
        request = KeyMember(
            self._member(), query.context, identity=self._identity(), identities=self._identities()
        )  # fmt: skip
        self._keys = _Keys(run_id=terms.run_id, context=query.context, request=request)
        return KeyAnswer(member=self._member(), request=request.request)

    def _wrap(self, terms: EncryptionTerms, asked: KeyRequests) -> WrappedKeys:
        """Line 6."""
        keys = self._current(terms)
        if keys is None or keys.holder is None:
            raise RefusedError("this store has no keys to hand out: it was restarted")
        check_requests(asked.requests)
        wrapped = {name: keys.holder.wrap(request) for name, request in asked.requests.items()}
        return WrappedKeys(member=self._member(), wrapped=wrapped)

    def _receive(self, terms: EncryptionTerms, delivery: KeyDelivery) -> HeldKeys:
        """Line 7."""
        keys = self._current(terms)
        if keys is None or keys.request is None:
            raise RefusedError("this store has not asked for keys: it was restarted")
        held = keys.request.receive(delivery.published, delivery.wrapped)
        if not terms.encryption.any_decrypts:
            self._decryptors.record(terms.run_id, keys.context.holder)
        keys.held, keys.name, keys.request = held, name_of(delivery.published), None
        return HeldKeys(member=self._member(), keys=keys.name)

    def _decrypted(self, terms: EncryptionTerms, wanted: SumRequest, vector: Vector | None) -> Vector:
        keys, form = self._held(terms), terms.form
        if keys.held is None:
            raise RefusedError(_NO_KEYS)
        if wanted.key.run_id != terms.run_id or not wanted.tags:
            raise RefusedError("the sum to decrypt is of another run, or of no store")
        decryptor = SumDecryptor(
            keys.held, form.packing, opened_sums=self._opened_sums, identities=self._identities(),
            min_cohort=self._min_cohort,
        )  # fmt: skip
        total = form.read_sum(vector)
        if len(wanted.weights) != (len(wanted.tags) if terms.is_buffered else 0):  # the rules differ
            raise RefusedError("the uploads in the sum to decrypt are weighted in another way than this run's")
        if terms.is_buffered:
            weighted = list(zip(wanted.tags, wanted.weights, strict=True))
            return form.decrypted_sum(decryptor.open_buffer(wanted.key, total, weighted))
        context = RoundContext(
            key=wanted.key, model=wanted.tags[0].model, config=terms.config, sizes=form.scope.sizes
        )  # fmt: skip
        return form.decrypted_sum(decryptor.open(context, total, wanted.tags))

    def _check(self, terms: EncryptionTerms, context: KeyContext) -> None:
        """Compare what the server announces with this run's configuration."""
        is_any, keys = terms.encryption.any_decrypts, self._current(terms)
        named = None if is_any else terms.encryption.decryptor or self._decryptors.known(terms.run_id)
        known = replace(
            context, run_id=terms.run_id, config=terms.config, sizes=terms.form.scope.sizes,
            summands=terms.form.packing.summands, holder=named or context.holder, is_shared=is_any,
            attempt=0 if keys is None else keys.context.attempt,
        )  # fmt: skip
        context.check(known)
        if named is None and not is_any and context.holder == self._member():
            self._decryptors.record(terms.run_id, context.holder)

    def _current(self, terms: EncryptionTerms) -> _Keys | None:
        return self._keys if self._keys is not None and self._keys.run_id == terms.run_id else None

    def _held(self, terms: EncryptionTerms) -> _Keys:
        keys = self._current(terms)
        if keys is None or keys.held is None:
            raise RefusedError(_NO_KEYS)
        return keys


_NO_KEYS = "this client has no keys for this run yet: it was restarted, or joined later"
