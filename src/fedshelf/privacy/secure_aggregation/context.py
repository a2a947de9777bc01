"""What a round of secure aggregation is bound to, and the rules of its size."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import MaskedPurpose, TaskKey
from fedshelf.core.text import counted

LEAST_MEMBERS = 3
"""Fewer members of a sum are refused: of two, each could compute the other's part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundContext:
    """The server's announcement of a round. All keys, shares and masks are bound to it.

    Attributes:
        key: the run, round and attempt.
        model: digest of the model that is sent, and of what else the computation starts from.
        config: digest of the run's configuration.
        sizes: bits and number of values of each vector of an upload.
        threshold: members whose shares open the sum; None: more than two thirds of the roster.
        purpose: what is summed.
    """

    key: TaskKey
    model: str
    config: str
    sizes: tuple[tuple[int, int], ...]
    threshold: int | None = None
    purpose: MaskedPurpose = MaskedPurpose.TRAIN

    @property
    def digest(self) -> bytes:
        """Identifies the context."""
        sizes = [number for pair in self.sizes for number in pair]
        key = self.key
        return digest(
            "round", self.purpose.value, key.run_id, key.round, key.attempt, self.model, self.config,
            self.threshold or 0, *sizes,
        )  # fmt: skip

    def check(
        self, *, run_id: str, config: str, sizes: tuple[tuple[int, int], ...], threshold: int | None
    ) -> None:  # fmt: skip
        """Compare with what a client knows itself.

        Args:
            run_id: the run that it takes part in.
            config: digest of the configuration that it was set up with.
            sizes: those of its uploads.
            threshold: that of the configuration.

        Raises:
            RefusedError: something differs.
        """
        found = {"run": self.key.run_id, "config": self.config, "sizes": self.sizes, "threshold": self.threshold}
        known = {"run": run_id, "config": config, "sizes": sizes, "threshold": threshold}
        others = [name for name, value in known.items() if found[name] != value]
        if others:
            raise RefusedError(f"the server asks for a masked sum with another {', '.join(others)} than this run's")


def threshold_of(num_members: int, asked: int | None) -> int:
    """How many members open the sum.

    Args:
        num_members: members of the roster.
        asked: what the run sets; None: more than two thirds.

    Raises:
        RefusedError: there are too few members, or half of them could open a second sum.
    """
    if num_members < LEAST_MEMBERS:
        raise RefusedError(f"secure aggregation needs at least {LEAST_MEMBERS} stores: the round has {num_members}")
    threshold = 2 * num_members // 3 + 1 if asked is None else asked
    if threshold > num_members:
        raise RefusedError(
            f"the round has {counted(num_members, 'store')}, and its threshold is {threshold}: wait for more, or lower "
            "--secagg-threshold"
        )
    if threshold < LEAST_MEMBERS:
        raise RefusedError(
            f"with a threshold of {threshold}, a sum of two stores could be opened: raise --secagg-threshold to at "
            f"least {LEAST_MEMBERS}"
        )
    if 2 * threshold <= num_members:
        raise RefusedError(
            f"with a threshold of {threshold} of {counted(num_members, 'store')}, two halves could open two sums: "
            f"raise --secagg-threshold to at least {num_members // 2 + 1}"
        )
    return threshold


def threshold_among(num_holders: int, threshold: int, num_members: int) -> int:
    """How many of a secret's shares restore it: the threshold if all members hold some, else more than half."""
    return threshold if num_holders == num_members else num_holders // 2 + 1


def packed(purpose: str, *fields: str | bytes | int) -> bytes:
    """Encode fields for signing or hashing; no other fields or purpose have the same encoding."""
    parts = [f"fedshelf secagg {purpose} 1\n".encode()]
    for value in fields:
        content = value if isinstance(value, bytes) else str(value).encode()
        parts += [len(content).to_bytes(4, "big"), content]
    return b"".join(parts)


def digest(purpose: str, *fields: str | bytes | int) -> bytes:
    """SHA-256 of `packed` fields."""
    return hashlib.sha256(packed(purpose, *fields)).digest()


def digest_of_names(names: Iterable[str]) -> bytes:
    """The digest of a list of names."""
    return digest("names", *names)
