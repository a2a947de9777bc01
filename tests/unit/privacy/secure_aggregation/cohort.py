"""Members and a server that run the stages of secure aggregation, and can be made to leave or misbehave in any."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from fedshelf.core.messages import TaskKey
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.secure_aggregation.client import ClientRound
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS, RoundContext
from fedshelf.privacy.secure_aggregation.keys import Identities, KeyAdvertisement
from fedshelf.privacy.secure_aggregation.masks import Integers
from fedshelf.privacy.secure_aggregation.server import ServerRecord, ServerRound
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum

CONTEXT = RoundContext(
    key=TaskKey(run_id="run", round=3, attempt=0), model="model", config="config", sizes=((16, 37), (32, 3), (64, 5))
)


@dataclass
class OpenedSums:
    """An `OpenedSumStore` in memory; it outlives the `ClientRound`, as a file does."""

    kept: list[OpenedSum] = field(default_factory=list)

    def known(self) -> Sequence[OpenedSum]:
        return tuple(self.kept)

    def record(self, opened: OpenedSum) -> None:
        self.kept.append(opened)


@cache
def identity(name: str) -> KeyPair:
    return KeyPair.generate()


def names_of(count: int) -> tuple[str, ...]:
    return tuple(f"store-{number:03d}" for number in range(count))


def roster_of(names: Iterable[str]) -> Identities:
    return {name: identity(name).public for name in names}


def values(context: RoundContext, seed: int) -> tuple[Integers, ...]:
    """Random integers of the context's sizes."""
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(0, 2**bits, size, dtype=f"u{bits // 8}", endpoint=False) for bits, size in context.sizes)


def added(vectors: Iterable[Sequence[Integers]], context: RoundContext) -> list[Integers]:
    """The sum modulo 2^BITS."""
    total: list[Integers] = [np.zeros(size, f"<u{bits // 8}") for bits, size in context.sizes]
    for each in vectors:
        for into, vector in zip(total, each, strict=True):
            np.add(into, vector, out=into)
    return total


class Cohort:
    """One attempt at a round.

    Args:
        count: members.
        context: the round.
        signed: whether members have identity keys.
        opened_sums: the members' records of opened sums, from a round before.
        min_cohort: see `ClientRound`.
        seed: other values of the members' vectors.
    """

    def __init__(
        self, count: int, *, context: RoundContext = CONTEXT, signed: bool = False,
        opened_sums: Mapping[str, OpenedSums] | None = None, min_cohort: int = LEAST_MEMBERS, seed: int = 0,
    ) -> None:  # fmt: skip
        self.context, self.names = context, names_of(count)
        self.identities = roster_of(self.names) if signed else None
        self.opened_sums = {name: OpenedSums() for name in self.names} if opened_sums is None else opened_sums
        self.clients = {
            name: ClientRound(
                name, context, opened_sums=self.opened_sums[name], identity=identity(name) if signed else None,
                identities=self.identities, min_cohort=min_cohort,
            )
            for name in self.names
        }  # fmt: skip
        self.server = ServerRound(ServerRecord(context=context), identities=self.identities)
        self.plain = {name: values(context, number) for number, name in enumerate(self.names, start=seed)}
        self.masked: dict[str, tuple[Integers, ...]] = {}

    def keys(self, names: Iterable[str] | None = None) -> "Cohort":
        for name in self._or_all(names):
            self.server.add_keys(self.clients[name].advertisement)
        self.roster = self.server.close_keys()
        return self

    def shares(self, names: Iterable[str] | None = None) -> "Cohort":
        for name in self._or_all(names):
            self.server.add_shares(self.clients[name].deal(self.roster))
        self.server.close_shares()
        return self

    def uploads(self, names: Iterable[str] | None = None) -> "Cohort":
        for name in self._or_all(names):
            self.clients[name].receive(self.server.delivery(name))
            vectors = tuple(vector.copy() for vector in self.plain[name])
            upload = self.clients[name].mask(vectors, self.context.model)
            self.server.add_upload(upload)
            self.masked[name] = upload.vectors
        self.survivors = self.server.close_uploads()
        return self

    def signatures(self, names: Iterable[str] | None = None) -> "Cohort":
        for name in self._or_all(names):
            self.server.add_signature(self.clients[name].confirm(self.survivors))
        self.signed = self.server.signatures()
        return self

    def opened(self, names: Iterable[str] | None = None) -> list[Integers]:
        for name in self._or_all(names):
            self.server.add_revealed(self.clients[name].reveal(self.signed))
        total = self.masked_sum()
        self.server.open(total)
        return total

    def resigned(self, shown: KeyAdvertisement) -> KeyAdvertisement:
        """What a dishonest member with that member's identity key shows."""
        return shown if self.identities is None else replace(
            shown, signature=identity(shown.member).sign(shown.content())
        )  # fmt: skip

    def fork(self) -> "Cohort":
        """A copy that goes its own way from here."""
        fork: Cohort = _forked(self)
        fork.clients = {name: _forked(client) for name, client in self.clients.items()}
        fork.opened_sums = {name: OpenedSums(list(store.kept)) for name, store in self.opened_sums.items()}
        for name, client in fork.clients.items():
            client._opened_sums = fork.opened_sums[name]
        fork.server = _forked(self.server)
        return fork

    def masked_sum(self) -> list[Integers]:
        return added((self.masked[name] for name in self.survivors.members), self.context)

    def plain_sum(self) -> list[Integers]:
        return added((self.plain[name] for name in self.survivors.members), self.context)

    def _or_all(self, names: Iterable[str] | None) -> Iterable[str]:
        return self.names if names is None else names


def _forked(one: Any) -> Any:
    """A copy that shares only what does not change."""
    fork = copy.copy(one)
    vars(fork).update({name: type(value)(value) for name, value in vars(one).items() if type(value) in (dict, set)})
    return fork


def equal(left: Iterable[Integers], right: Iterable[Integers]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(left, right, strict=True))
