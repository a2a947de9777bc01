"""The chain's identity, in a folder of the server: its key, the stores' authority, the roster, and open tokens.

    chain.key        signs the roster, and certificates of stores
    chain.pem        certificate of the stores' authority
    roster.json      the signed roster
    tokens.json      open tokens; secrets as SHA-256
    local.token      admits clients of the same user on this machine
    audit-NNNN.jsonl the audit log
    ledgers/         the newest head of each store's ledger

The server and `fedshelf enroll` use the folder at the same time. Every change is made under a file lock; the server
notices a changed roster with the next request.
"""

import contextlib
import datetime
import hmac
import json
import threading
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography import x509

from fedshelf.core.errors import IdentityError, IdentityFileError
from fedshelf.identity import certificates, receipts
from fedshelf.identity.audit_log import AuditLog
from fedshelf.identity.countersignatures import LedgerHeads
from fedshelf.identity.keys import KeyPair, PublicKey, passphrase
from fedshelf.identity.roster import MAX_BYTES, Entry, Roster, StoreState
from fedshelf.identity.tokens import Token, digest_of, new_secret
from fedshelf.storage.atomic_files import make_own_folder, translating_os_errors, write_atomically
from fedshelf.storage.lock import file_lock

AUTHORITY_LIFETIME = datetime.timedelta(days=3 * 365)
RENEW_AUTHORITY = datetime.timedelta(days=365)  # before its end, so that every store gets the next one in time
CERTIFICATE_LIFETIME = datetime.timedelta(days=90)
TOKEN_LIFETIME = datetime.timedelta(hours=24)
MAX_NAME_CHARACTERS = 200
UNLIMITED = -1
_ID_DIGITS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenToken:
    """A token that has not been used up.

    Attributes:
        secret: SHA-256 of its secret (hex).
        name: the store that it is for; "" for any.
        uses: how many stores may still use it; `UNLIMITED` for the local token.
        expires: when it expires, in seconds since 1970; 0 for never.
        replaces: whether it may replace the store's key.
    """

    secret: str
    name: str = ""
    uses: int = 1
    expires: float = 0.0
    replaces: bool = False

    @property
    def id(self) -> str:
        """Names the token, and tells nothing about its secret."""
        return self.secret[:_ID_DIGITS]


class Chain:
    """The folder. Thread-safe.

    Args:
        folder: created with mode 0700.
        is_open: whether any key is enrolled on its first use, under a name that nobody has.
        now: the current time.

    Attributes:
        audit: the audit log.
        ledgers: the heads of the stores' ledgers.
        is_open: whether any key is enrolled on its first use.

    Raises:
        RunError: the folder cannot be used.
        IdentityError: a file in it is damaged, or the passphrase is missing.
    """

    def __init__(self, folder: Path, *, is_open: bool = False, now: datetime.datetime | None = None) -> None:
        self._folder = folder
        self.is_open = is_open
        make_own_folder(folder)
        self.audit = AuditLog(folder)
        self._lock = threading.Lock()
        self._roster, self._text, self._seen = Roster(), "", (0, 0, 0)
        with file_lock(folder / "lock"):
            self._keys = self._load_keys()
            self.ledgers = LedgerHeads(folder / "ledgers", self._keys, self.audit)
            self._check_roster()
            self._authority = self._load_authority(now or datetime.datetime.now(datetime.UTC))

    @property
    def key(self) -> PublicKey:
        """The chain's public key, which a store can pin."""
        return self._keys.public

    def receipt(self, fields: Mapping[str, Any]) -> str:
        """Sign what the server states of a round.

        Args:
            fields: the statement; plain values of JSON.

        Returns:
            The receipt (see `receipts`).
        """
        return receipts.signed(fields, self._keys)

    @property
    def authority_file(self) -> Path:
        """The certificate (PEM) of the stores' authority."""
        return self._folder / "chain.pem"

    def roster(self) -> Roster:
        """The current roster.

        Raises:
            RunError: the file cannot be read.
            IdentityError: it is damaged.
        """
        path = self._folder / "roster.json"
        with self._lock, translating_os_errors("read", path):
            try:
                found = path.stat()
            except FileNotFoundError:
                return Roster()
            seen = (found.st_mtime_ns, found.st_ino, found.st_size)
            if seen != self._seen:
                text = path.read_text(encoding="utf-8")
                self._roster, self._text, self._seen = Roster.verified(text, self.key), text, seen
            return self._roster

    def signed_roster(self) -> str:
        """The text of the current roster, for stores.

        Raises:
            RunError: the file cannot be read.
            IdentityError: it is damaged.
        """
        self.roster()
        return self._text

    def renumber(self) -> None:
        """Sign the roster again with the next number, after it was restored from a backup."""
        with file_lock(self._folder / "lock"):
            self._write(self.roster().renumbered())
        self.audit.write_action("roster signed again", roster=self.roster().number)

    def note_server(self, addresses: Sequence[str], authority: str) -> None:
        """Keep what tokens say about the server, for `fedshelf enroll`.

        Args:
            addresses: see `Token.addresses`.
            authority: see `Token.authority`.
        """
        text = json.dumps({"addresses": list(addresses), "authority": authority})
        write_atomically(self._folder / "server.json", text)

    def server(self) -> tuple[tuple[str, ...], str] | None:
        """What `note_server` kept; None if no server has been started."""
        try:
            fields = json.loads((self._folder / "server.json").read_text(encoding="utf-8"))
            return tuple(map(str, fields["addresses"])), str(fields["authority"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def find(self, key: PublicKey) -> Entry | None:
        """The roster's entry of `key`, or None."""
        return self.roster().find(key)

    def add(self, name: str, *, authority: str, addresses: Sequence[str], replaces: bool = False) -> Token:
        """Make a token for one store.

        Args:
            name: the store's name.
            authority: see `Token.authority`.
            addresses: see `Token.addresses`.
            replaces: whether the token replaces the key of an enrolled store.

        Returns:
            The token.

        Raises:
            IdentityError: the name is not possible, or is enrolled already (or is not, with `replaces`).
        """
        _check_name(name)
        enrolled = self.roster().active(name) is not None
        if enrolled and not replaces:
            raise IdentityError(
                f"'{name}' is enrolled already: 'fedshelf enroll rotate' makes a token for a new key of it, 'fedshelf "
                "enroll revoke' ends the old one at once"
            )
        if replaces and not enrolled:
            raise IdentityError(f"'{name}' is not enrolled: make its token with 'fedshelf enroll add'")
        return self._open_token(name, 1, authority, addresses, replaces=replaces)

    def invite(self, count: int, *, authority: str, addresses: Sequence[str]) -> Token:
        """Make a token that `count` stores may use, each with a name of its own."""
        return self._open_token("", count, authority, addresses)

    def revoke(self, name: str) -> None:
        """End the store's key at once, and its open tokens.

        Raises:
            IdentityError: there is no such store.
        """
        with file_lock(self._folder / "lock"):
            roster, tokens = self.roster(), self._tokens()
            kept = [token for token in tokens if token.name != name]
            if roster.active(name) is None and len(kept) == len(tokens):
                past = [entry.since for entry in roster.entries if entry.name == name]
                problem = f"was revoked on {past[-1]} already" if past else "is not enrolled"
                raise IdentityError(f"'{name}' {problem}: 'fedshelf enroll list' shows all stores")
            self._write_tokens(kept)
            if roster.active(name) is not None:
                self._write(roster.without(name, _now_text()))
        self.audit.write_action("revoked", store=name)

    def open_tokens(self) -> list[OpenToken]:
        """The tokens that stores may still use, without the one for clients on this machine.

        Raises:
            IdentityError: their file is damaged.
        """
        return [token for token in self._tokens() if token.uses != UNLIMITED]

    def cancel(self, ids: Collection[str] | None) -> list[OpenToken]:
        """End open tokens.

        Args:
            ids: see `OpenToken.id`; None for all.

        Returns:
            The tokens that were ended.

        Raises:
            IdentityError: an id is not that of an open token; then none was ended.
        """
        with file_lock(self._folder / "lock"):
            found = [token for token in self.open_tokens() if ids is None or token.id in ids]
            if unknown := set(ids or ()) - {token.id for token in found}:
                raise IdentityError(
                    f"no open token has the id {', '.join(sorted(unknown))}: 'fedshelf enroll tokens' lists all"
                )
            self._write_tokens([token for token in self._tokens() if token not in found])
        for token in found:
            self.audit.write_action("token ended", id=token.id, store=token.name or None)
        return found

    def enroll(self, secret: str, name: str, request: str) -> tuple[Entry, x509.Certificate]:
        """Admit a store that holds a token.

        Args:
            secret: the token's secret; "" for none.
            name: the name that the store asks for.
            request: its signing request (PEM).

        Returns:
            Its entry in the roster, and its certificate.

        Raises:
            IdentityError: the token is unknown, used or expired, the name is taken or not possible, or the request is
                invalid. The store is told the message.
        """
        public, key = certificates.requested_key(request)
        with file_lock(self._folder / "lock"):
            tokens, roster = self._tokens(), self.roster()
            known = roster.find(key)
            if known is not None and known.state is StoreState.ACTIVE:  # the answer to its first request was lost
                return known, self._issue(public, known.name)
            token = _match(tokens, secret) if secret else OpenToken(secret="", uses=UNLIMITED)
            if token is None or (not secret and not self.is_open):
                raise IdentityError(
                    "the token is unknown, used, or expired: ask headquarters for a new one ('fedshelf enroll add')"
                    if secret
                    else "this server admits enrolled stores only: get a token ('fedshelf enroll add' at the server), "
                    "and give it with --token"
                )
            name = token.name or name
            _check_name(name)
            holder = roster.active(name)
            if not token.name and holder is None and any(entry.name == name for entry in roster.entries):
                raise IdentityError(
                    f"'{name}' was revoked: a token of its own ('fedshelf enroll add' at the server) lets it back in"
                )
            if known is not None:
                raise IdentityError("this key was enrolled before, until it was revoked")
            if holder is not None and not token.replaces:
                raise IdentityError(
                    f"a store named '{name}' is enrolled with another key: give this store another --name, or, if it "
                    "lost its key, use a token of 'fedshelf enroll rotate'"
                )
            roster = roster.with_key(name, key, _now_text())
            if len(roster.signed(self._keys)) > MAX_BYTES // 2:
                raise IdentityFileError(f"the roster has {len(roster.entries):,} entries and is full")
            self._write(roster)
            if token.uses != UNLIMITED:
                self._write_tokens([t for t in (_used(t) if t == token else t for t in tokens) if t.uses])
        entry = roster.find(key)
        if entry is None:
            raise IdentityFileError("the roster was changed meanwhile: try again")
        certificate = self._issue(public, name)
        self.audit.write("enrolled", store=name, key=key.text, by="token" if secret else "open admission")
        return entry, certificate

    def renew(self, key: PublicKey, request: str) -> x509.Certificate:
        """Issue the next certificate for an enrolled key.

        Raises:
            IdentityError: the request is invalid, or not for this key, or the key is not active.
        """
        public, requested = certificates.requested_key(request)
        entry = self.find(key)
        if requested != key or entry is None or entry.state is not StoreState.ACTIVE:
            raise IdentityError("a certificate is renewed for the same, active key only")
        self.audit.write("renewed", store=entry.name, key=key.text)
        return self._issue(public, entry.name)

    def local_token(self) -> str:
        """The secret that admits clients of this user on this machine, written to `local.token`."""
        path = self._folder / "local.token"
        with file_lock(self._folder / "lock"), translating_os_errors("read", path):
            secret = path.read_text(encoding="ascii") if path.exists() else new_secret()
            tokens = self._tokens()
            if _match(tokens, secret) is None:
                self._write_tokens([*tokens, OpenToken(secret=digest_of(secret), uses=UNLIMITED)])
                write_atomically(path, secret)
            return secret

    def _open_token(
        self, name: str, uses: int, authority: str, addresses: Sequence[str], *, replaces: bool = False
    ) -> Token:  # fmt: skip
        secret, expires = new_secret(), datetime.datetime.now(datetime.UTC) + TOKEN_LIFETIME
        token = OpenToken(
            secret=digest_of(secret), name=name, uses=uses, expires=expires.timestamp(), replaces=replaces
        )  # fmt: skip
        with file_lock(self._folder / "lock"):
            kept = [
                t for t in self._tokens() if not name or t.name != name
            ]  # a new token replaces the store's last one
            self._write_tokens([*kept, token])
        rotates = True if replaces else None
        self.audit.write_action("token made", store=name or None, uses=uses, id=token.id, replaces_key=rotates)
        return Token(addresses=tuple(addresses), authority=authority, secret=secret, expires=expires, name=name)

    def _issue(self, public: Any, name: str) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        start = max(now - certificates.BACKDATED, self._authority.not_valid_before_utc)
        return certificates.issue(
            self._authority, self._keys, public, name, start=start, end=now + CERTIFICATE_LIFETIME
        )  # fmt: skip

    def _load_keys(self) -> KeyPair:
        path = self._folder / "chain.key"
        if path.exists():
            return KeyPair.load(path, passphrase=passphrase())
        if (self._folder / "roster.json").exists():
            raise IdentityFileError(
                f"'{path}' is missing, but '{self._folder}' has enrolled stores: restore it from a backup. Without it, "
                "move the folder away and enroll every store again"
            )
        keys = KeyPair.generate()
        keys.save(path, passphrase=passphrase())
        return keys

    def _check_roster(self) -> None:
        """Check that the roster is whole, or that there never was one.

        Raises:
            IdentityFileError: it is damaged or missing. Without it, revoked stores could come back.
        """
        path = self._folder / "roster.json"
        if not path.exists() and any(event["event"] == "enrolled" for event in self.audit.events()):
            raise IdentityFileError(
                f"'{path}' is missing, but stores were enrolled ('fedshelf audit-log' names them): restore it from a "
                "backup, and run 'fedshelf enroll renumber'. Without it, move the folder away and enroll every store "
                "again"
            )
        try:
            self.roster()
        except IdentityFileError as error:
            raise IdentityFileError(f"'{path}': {error}, and run 'fedshelf enroll renumber'") from error

    def _load_authority(self, now: datetime.datetime) -> x509.Certificate:
        path = self.authority_file
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = x509.load_pem_x509_certificate(path.read_bytes())
            if found.not_valid_before_utc <= now < found.not_valid_after_utc - RENEW_AUTHORITY:
                return found
        made = certificates.authority(
            self._keys,
            certificates.subject("FedShelf stores"),
            start=now - certificates.BACKDATED,
            end=now + AUTHORITY_LIFETIME,
        )
        write_atomically(path, certificates.pem(made))
        return made

    def _tokens(self) -> list[OpenToken]:
        """Open tokens that have not expired."""
        path, now = self._folder / "tokens.json", datetime.datetime.now(datetime.UTC).timestamp()
        try:
            with translating_os_errors("read", path):
                text = path.read_text(encoding="utf-8") if path.exists() else "[]"
            tokens = [OpenToken(**fields) for fields in json.loads(text)]
        except (ValueError, TypeError, RecursionError) as error:
            raise IdentityFileError(f"'{path}' is damaged: delete it, and make new tokens") from error
        return [token for token in tokens if not token.expires or token.expires > now]

    def _write_tokens(self, tokens: Sequence[OpenToken]) -> None:
        fields = [{name: getattr(token, name) for name in OpenToken.__slots__} for token in tokens]
        write_atomically(self._folder / "tokens.json", json.dumps(fields, indent=1) + "\n")

    def _write(self, roster: Roster) -> None:
        write_atomically(self._folder / "roster.json", roster.signed(self._keys))


def _match(tokens: Sequence[OpenToken], secret: str) -> OpenToken | None:
    digest = digest_of(secret)
    matches = [token for token in tokens if hmac.compare_digest(token.secret, digest)]
    return matches[0] if matches else None


def _used(token: OpenToken) -> OpenToken:
    return replace(token, uses=token.uses - 1)


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME_CHARACTERS or name != name.strip():
        raise IdentityError(f"a store's name has 1 to {MAX_NAME_CHARACTERS} characters, and no blank at either end")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise IdentityError("a store's name has no line break and no control character")


def _now_text() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
