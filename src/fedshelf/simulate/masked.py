"""Masks of simulated clients: in this process, whichever one trains them."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from fedshelf.core.messages import Broadcast, ClientMessage, ServerMessage, Setup
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum
from fedshelf.rounds.masking_client import MaskingClient, MaskingTerms
from fedshelf.simulate.client_runner import Backend


class MaskedBackend:
    """A backend whose clients mask what another one computes.

    Args:
        backend: runs the clients.
        terms_of: returns the terms of masks of a run.
    """

    def __init__(self, backend: Backend, terms_of: Callable[[Setup], MaskingTerms | None]) -> None:
        self._backend = backend
        self._terms_of = terms_of
        self._terms: tuple[Setup, MaskingTerms | None] | None = None
        self._setup: Setup | None = None
        self._clients: dict[str, MaskingClient] = {}
        self._asked: dict[str, ServerMessage] = {}
        self._answers: deque[tuple[str, ClientMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        if isinstance(message, Setup):
            self._setup = message
        if name not in self._clients:
            self._clients[name] = MaskingClient(
                partial(str, name), terms=self._current_terms, opened_sums=_OpenedSums()
            )  # fmt: skip
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

    def _current_terms(self) -> MaskingTerms | None:
        if self._setup is None:
            return None
        if self._terms is None or self._terms[0] is not self._setup:
            self._terms = self._setup, self._terms_of(self._setup)
        return self._terms[1]


class _OpenedSums:
    """In memory: a simulated store has no server to fear."""

    def __init__(self) -> None:
        self._known: list[OpenedSum] = []

    def known(self) -> Iterable[OpenedSum]:
        return self._known

    def record(self, opened: OpenedSum) -> None:
        self._known.append(opened)
