"""The messages of homomorphic encryption between the server and the stores, besides training.

    keys        server -> holder   KeyQuery        ->  ShownKeys: new keys, or those that it has generated before
    request     server -> store v  KeyQuery        ->  KeyAnswer: a request, or that the store has these keys
    wrap        server -> holder   KeyRequests     ->  WrappedKeys
    delivery    server -> store v  KeyDelivery     ->  HeldKeys
    decryption  server -> a store  SumRequest, sum ->  OpenedBy, decrypted sum

A store has keys in memory only. So each round begins with the first two, which are small if all have their keys.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedshelf.core.messages import TaskKey
from fedshelf.privacy.homomorphic.ceremony import KeyContext, KeyRequest, PublishedKeys
from fedshelf.privacy.homomorphic.sum_check import SealedTag


def name_of(published: PublishedKeys) -> bytes:
    """Identifies published keys."""
    return hashlib.sha256(published.content).digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyQuery:
    """Which keys the server knows.

    Attributes:
        context: of the ceremony; a new one, if the holder has no keys.
        known: name of the published keys that the server has; empty if it has none.
    """

    context: KeyContext
    known: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownKeys:
    """What the holder has generated.

    Attributes:
        member: the holder.
        context: of the ceremony.
        published: what it shows to all; None if the server knows it.
    """

    member: str
    context: KeyContext
    published: PublishedKeys | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyAnswer:
    """Whether a store has the keys.

    Attributes:
        member: the store.
        request: for the keys; None if it has them.
    """

    member: str
    request: KeyRequest | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRequests:
    """Requests for the holder.

    Attributes:
        requests: by store.
    """

    requests: Mapping[str, KeyRequest]


@dataclass(frozen=True, kw_only=True, slots=True)
class WrappedKeys:
    """The holder's answer to requests.

    Attributes:
        member: the holder.
        wrapped: w_v by store.
    """

    member: str
    wrapped: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyDelivery:
    """The keys for a store.

    Attributes:
        context: of the ceremony.
        published: what the holder shows to all.
        wrapped: w_v.
    """

    context: KeyContext
    published: PublishedKeys
    wrapped: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldKeys:
    """A store has received the keys.

    Attributes:
        member: the store.
        keys: name of the published keys.
    """

    member: str
    keys: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SumRequest:
    """A sum to decrypt.

    Attributes:
        key: the run, round and attempt of the sum.
        tags: of the uploads in it.
        weights: of these uploads, which then began at different rounds; empty if they are of one round.
    """

    key: TaskKey
    tags: tuple[SealedTag, ...]
    weights: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedBy:
    """A sum was decrypted.

    Attributes:
        member: the store.
        key: the run, round and attempt of the sum.
    """

    member: str
    key: TaskKey
