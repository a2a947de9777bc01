"""A store's side: its key, its certificate and what it knows of the server, in its state directory.

keys/store.key         the private key, made here
keys/store.pem         its certificate, renewed from time to time
keys/authority.pem     the server's authority; missing if the server's certificate comes from another one
keys/enrollment.json   the name under which it is enrolled, and the chain's key
keys/roster.json       the newest roster, signed by the chain's key
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedshelf.core.errors import IdentityError, RosterError
from fedshelf.core.text import printable
from fedshelf.identity.keys import KeyPair, PublicKey
from fedshelf.identity.roster import Roster
from fedshelf.storage.atomic_files import make_folder, translating_os_errors, write_atomically, write_together

RENEW_BEFORE = datetime.timedelta(days=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrollment:
    """What enrolling gave a store.

    Attributes:
        name: the store's name.
        chain: the chain's key.
        certificate: the store's certificate (PEM).
        authority: the certificate of the server's authority (PEM); "" if there is none to pin.
        token: digest of the token that it enrolled with; "" for none.
    """

    name: str
    chain: PublicKey
    certificate: str
    authority: str
    token: str = ""


class StoreKeys:
    """The folder.

    Args:
        folder: created when it is needed.
        pin: the only chain's key to accept; None for the one that enrolling gives.
    """

    def __init__(self, folder: Path, *, pin: PublicKey | None = None) -> None:
        self._folder = folder
        self._pin = pin
        self._keys: KeyPair | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether only one chain's key is accepted."""
        return self._pin is not None

    @property
    def key_file(self) -> Path:
        """The private key (PEM)."""
        return self._folder / "store.key"

    @property
    def certificate_file(self) -> Path:
        """The certificate (PEM)."""
        return self._folder / "store.pem"

    @property
    def authority_file(self) -> Path | None:
        """The server's authority (PEM), if it is known."""
        path = self._folder / "authority.pem"
        return path if path.exists() else None

    def pair(self) -> KeyPair:
        """The enrolled key pair.

        Raises:
            RunError: the key cannot be read.
            IdentityError: the key is damaged.
        """
        if self._keys is None:
            self._keys = KeyPair.load(self.key_file)
        return self._keys

    def next_pair(self) -> KeyPair:
        """The key pair to enroll with: kept until the server has answered, in case its answer is lost.

        Raises:
            RunError: the folder cannot be used.
            IdentityError: the key is damaged.
        """
        path = self._folder / "next.key"
        if path.exists() and not (self.key_file.exists() and path.read_bytes() == self.key_file.read_bytes()):
            return KeyPair.load(path)
        make_folder(self._folder)
        keys = KeyPair.generate()
        keys.save(path)
        return keys

    def enrollment(self) -> Enrollment | None:
        """What enrolling gave, or None if this store has not been enrolled.

        Raises:
            RunError: a file cannot be read.
            IdentityError: a file is damaged.
        """
        path = self._folder / "enrollment.json"
        with translating_os_errors("read", path):
            if not (path.exists() and self.key_file.exists() and self.certificate_file.exists()):
                return None
            authority = self.authority_file
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
                return Enrollment(
                    name=str(fields["name"]), chain=PublicKey(str(fields["chain"])),
                    certificate=self.certificate_file.read_text(encoding="ascii"),
                    authority=authority.read_text(encoding="ascii") if authority else "",
                    token=str(fields.get("token", "")),
                )  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                raise IdentityError(f"'{path}' is damaged: delete it, and give a new token with --token") from error

    def check_chain(self, chain: PublicKey) -> None:
        """Check the chain's key that a server shows against the one that the policy names.

        Raises:
            RosterError: it is another one.
        """
        if self._pin is not None and chain != self._pin:
            raise RosterError(
                f"the chain's key at this server is {printable(chain.text)[:44]}, and this store's policy accepts "
                f"{self._pin.text} only (roster-key): check --server-address, and ask headquarters whether its key has "
                "changed"
            )

    def roster(self) -> Roster | None:
        """The newest roster that this store has accepted; None if there is none.

        Raises:
            RunError: the file cannot be read.
            IdentityError: the file is damaged.
        """
        enrollment, path = self.enrollment(), self._folder / "roster.json"
        with translating_os_errors("read", path):
            if enrollment is None or not path.exists():
                return None
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            return Roster.verified(text, enrollment.chain)
        except IdentityError as error:
            raise IdentityError(
                f"'{path}' is damaged: if this store's disk was damaged, delete it, and the server sends it again"
            ) from error

    def accept(self, text: str) -> Roster:
        """Check the roster that a server shows, and keep it.

        Args:
            text: from the server.

        Returns:
            The roster.

        Raises:
            RosterError: it is not signed by the chain's key, older than the one before, or does not have this store.
            RunError: the file cannot be read or written.
            IdentityError: this store is not enrolled, or a file of it is damaged.
        """
        enrollment, last, path = self.enrollment(), self.roster(), self._folder / "roster.json"
        if enrollment is None:
            raise IdentityError("this store is not enrolled: get a token, and give it with --token")
        self.check_chain(enrollment.chain)
        try:
            shown = Roster.verified(text, enrollment.chain)
        except IdentityError as error:
            raise RosterError(
                "the server shows a roster that is not signed by this chain's key: somebody else may be answering, or "
                "its home was altered; ask headquarters"
            ) from error
        if last is not None and (shown.number < last.number or (shown.number == last.number and shown != last)):
            what = "an older roster than" if shown.number < last.number else "two rosters with the number of"
            raise RosterError(
                f"the server shows {what} number {last.number}, which this store has seen: ask headquarters whether "
                "the server was restored from a backup ('fedshelf enroll renumber')"
            )
        if shown.keys().get(enrollment.name) != self.pair().public:
            raise RosterError(
                f"the server's roster does not have this store's key as that of '{printable(enrollment.name)}': other "
                "stores would not trust it; ask headquarters for a new token ('fedshelf enroll rotate')"
            )
        if shown != last:
            write_atomically(path, text)
        return shown

    def save(self, enrollment: Enrollment, keys: KeyPair) -> None:
        """Save what enrolling or renewing gave. With another chain's key, the roster begins anew.

        Args:
            enrollment: what the server answered.
            keys: the keys that it is for.

        Raises:
            RosterError: the chain's key is not the one that the policy names.
            RunError: a file cannot be written.
        """
        self.check_chain(enrollment.chain)
        before = self.enrollment()
        if before is None or before.chain != enrollment.chain:
            with translating_os_errors("delete", self._folder):
                (self._folder / "roster.json").unlink(missing_ok=True)
        text = json.dumps({"name": enrollment.name, "chain": enrollment.chain.text, "token": enrollment.token}) + "\n"
        files: dict[Path, bytes | str] = {self.key_file: keys.pem(), self.certificate_file: enrollment.certificate}
        if enrollment.authority:
            files[self._folder / "authority.pem"] = enrollment.authority
        write_together({**files, self._folder / "enrollment.json": text})
        (self._folder / "next.key").unlink(missing_ok=True)
        self._keys = keys

    def must_renew(self, now: datetime.datetime) -> bool:
        """Whether the certificate ends soon."""
        try:
            certificate = x509.load_pem_x509_certificate(self.certificate_file.read_bytes())
        except (OSError, ValueError):
            return True
        return certificate.not_valid_after_utc - now < RENEW_BEFORE
