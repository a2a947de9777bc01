"""Masks and encryption of simulated clients: in this process, whichever one trains them."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from fedshelf.core.messages import Broadcast, ClientMessage, ServerMessage, Setup
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum
from fedshelf.rounds.sums.encrypting_client import EncryptingClient, EncryptionTerms
from fedshelf.rounds.sums.masking_client import MaskingClient, MaskingTerms
from fedshelf.simulate.client_runner import Backend

T = TypeVar("T")


class HidingClient(Protocol):
    """Hides what a client sends."""

    def before(self, message: ServerMessage) -> ClientMessage | None:
        """Answer a message; None: it is for the client."""

    def after(self, message: ServerMessage, reply: ClientMessage) -> ClientMessage:
        """Hide the client's reply to a message."""


class MaskedBackend:
    """A backend whose clients hide what another one computes.

    Args:
        backend: runs the clients.
        make_client: creates what hides a client's uploads; receives its name, and returns the run's current setup.
    """

    def __init__(
        self, backend: Backend, make_client: Callable[[str, Callable[[], Setup | None]], HidingClient]
    ) -> None:
        self._backend = backend
        self._make_client = make_client
        self._setup: Setup | None = None
        self._clients: dict[str, HidingClient] = {}
        self._asked: dict[str, ServerMessage] = {}
        self._answers: deque[tuple[str, ClientMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        if isinstance(message, Setup):
            self._setup = message
        if name not in self._clients:
            self._clients[name] = self._make_client(name, lambda: self._setup)
        answer = self._clients[name].before(message)
        if answer is not None:
            self._answers.append((name, answer))
            return
        self._asked[name] = message
        self._backend.submit(name, replace(message, masking="") if isinstance(message, Broadcast) else message)

    def next(self) -> tuple[str, ClientMessage] | None:
        """See `Backend`."""
        if self._answers:
            return self._answers.popleft()
        found = self._backend.next()
        if found is None:
            return None
        name, answer = found
        return name, self._clients[name].after(self._asked[name], answer)


def masking_client(
    terms_of: Callable[[Setup], MaskingTerms | None], name: str, setup: Callable[[], Setup | None]
) -> MaskingClient:  # fmt: skip
    """Masks the uploads of a simulated client.

    Args:
        terms_of: returns the terms of masks of a run.
        name: the client's name.
        setup: returns the run's current setup.
    """
    return MaskingClient(partial(str, name), terms=_latest(terms_of, setup), opened_sums=_OpenedSums())


def encrypting_client(
    terms_of: Callable[[Setup], EncryptionTerms | None], name: str, setup: Callable[[], Setup | None]
) -> EncryptingClient:  # fmt: skip
    """Encrypts the uploads of a simulated client.

    Args:
        terms_of: returns the terms of encryption of a run.
        name: the client's name.
        setup: returns the run's current setup.
    """
    return EncryptingClient(
        partial(str, name), terms=_latest(terms_of, setup), opened_sums=_OpenedSums(), decryptors=_Decryptors()
    )  # fmt: skip


def _latest(terms_of: Callable[[Setup], T | None], setup: Callable[[], Setup | None]) -> Callable[[], T | None]:
    """Returns the terms of the current setup; None before the first one."""

    def terms() -> T | None:
        current = setup()
        return None if current is None else terms_of(current)

    return terms


class _OpenedSums:
    """In memory: a simulated store has no server to fear."""

    def __init__(self) -> None:
        self._known: list[OpenedSum] = []

    def known(self) -> Iterable[OpenedSum]:
        return self._known

    def record(self, opened: OpenedSum) -> None:
        self._known.append(opened)


class _Decryptors:
    """In memory, like the sums."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def known(self, run_id: str) -> str | None:
        return self._known.get(run_id)

    def record(self, run_id: str, store: str) -> None:
        self._known[run_id] = store
