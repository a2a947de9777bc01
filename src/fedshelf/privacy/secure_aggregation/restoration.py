"""Stage E at the server: secrets are restored as shares arrive, and wrong shares are told apart from right ones.

    for each set of revealed shares:  add it; restore each secret that now has t' shares
    a secret that does not fit:       try other sets of its shares, those without doubtful holders first
    a holder is doubtful:             its share is not on the polynomial of a secret that was restored without it
    a dealer is suspected:            more than t' of its shares have arrived, and no set of them restores its secret

A wrong share is the fault of its holder or of its dealer, which one cannot be told. Shares that are not needed are not
verified.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedshelf.privacy.secure_aggregation.unmasking import off_polynomial, restore


@dataclass
class _Secret:
    fits: Callable[[bytes], bool]
    shares: dict[int, bytes] = field(default_factory=dict)
    is_tried: bool = True


class Restoration:
    """The secrets that take the masks out of one sum.

    Args:
        dealers: by member whose masks are in the sum, whether a secret is its own.
        holders: all members by point.
        needed: how many shares restore a secret (t').

    Attributes:
        secrets: those restored so far, by dealer.
        doubts: by holder, the dealers of whose secrets it has revealed a wrong share.
    """

    def __init__(
        self, dealers: Mapping[str, Callable[[bytes], bool]], holders: Mapping[int, str], needed: int
    ) -> None:  # fmt: skip
        self._needed = needed
        self._holders = holders
        self._missing = {name: _Secret(fits) for name, fits in dealers.items()}
        self.secrets: dict[str, bytes] = {}
        self.doubts: dict[str, list[str]] = {}

    def add(self, point: int, shares: Mapping[str, bytes]) -> None:
        """Add the shares of one holder.

        Args:
            point: the holder's.
            shares: by dealer.
        """
        for name, share in shares.items():
            secret = self._missing.get(name)
            if secret is not None:
                secret.shares[point] = share
                secret.is_tried = len(secret.shares) < self._needed

    def is_complete(self) -> bool:
        """Whether all secrets are restored; tries those that have new shares."""
        for name, secret in list(self._missing.items()):
            if not secret.is_tried:
                secret.is_tried = True
                self._try(name, secret)
        return not self._missing

    def suspects(self, most: int) -> tuple[str, ...]:
        """Dealers whose shares do not restore their secret, if that is not likelier the fault of holders.

        Args:
            most: how many dishonest members are assumed at most.
        """
        found = [name for name, secret in self._missing.items() if len(secret.shares) > self._needed]
        return tuple(found) if len(found) <= most else ()

    @property
    def lacking(self) -> set[str]:
        """Dealers of whose secrets too few shares have arrived."""
        return {name for name, secret in self._missing.items() if len(secret.shares) < self._needed}

    def problem(self) -> str:
        """Why not all secrets are restored, for a message; "" if they are."""
        few = self.lacking
        wrong = [name for name in self._missing if name not in few]
        if few:
            least = min(len(self._missing[name].shares) for name in few)
            return f"too few stores have revealed their shares ({least} of the {self._needed} that restore a secret)"
        if wrong:
            named = ", ".join(f"'{name}'" for name in wrong[:3])
            return f"the shares of the secret of {named} do not restore it: it has dealt wrong ones, or holders lie"
        return ""

    def _try(self, name: str, secret: _Secret) -> None:
        doubtful = {point for point in secret.shares if self._holders[point] in self.doubts}
        found = restore(secret.shares, self._needed, secret.fits, doubtful=doubtful)
        if found is None:
            return
        del self._missing[name]
        self.secrets[name], used = found
        if used != sorted(secret.shares)[: self._needed]:
            for point in off_polynomial(secret.shares, used):
                self.doubts.setdefault(self._holders[point], []).append(name)
