"""Names photos one after the other, for a bounded number of requests at a time, and remembers the last photos."""

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from fedshelf.core.guess import Guess
from fedshelf.edge.serving.local_head import LocalHead
from fedshelf.edge.serving.session import Session

T = TypeVar("T")

NUM_GUESSES = 5
MOST_REQUESTS = 8
"""Requests with a photo that are read, wait or are computed at the same time."""
RECENT_PHOTOS, RECENT_BYTES = 16, 8 << 20


class BusyError(Exception):
    """More requests than `MOST_REQUESTS` at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The model's answer for one photo.

    Attributes:
        id: identifies the photo while it is remembered.
        guesses: the most likely products, most likely first.
        is_sure: whether the first one reaches the threshold.
        folder: if it is not sure, the deepest folder that reaches the threshold, if there is one.
    """

    id: str
    guesses: tuple[Guess, ...]
    is_sure: bool
    folder: Guess | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RecentPhoto:
    """A photo that was named a short while ago.

    Attributes:
        data: the file's bytes.
        guess: the most likely product.
    """

    data: bytes
    guess: Guess


class Recognizer:
    """A session behind a queue. All methods are for one event loop.

    Args:
        session: the model.
        local_head: learns from corrections at once; None: the answers are the model's.
    """

    def __init__(self, session: Session, local_head: LocalHead | None = None) -> None:
        self.session = session
        self.local_head = local_head
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fedshelf-edge")
        self._num_requests = 0
        self._recent: OrderedDict[str, RecentPhoto] = OrderedDict()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places for requests, from before the photo is read.

        Raises:
            BusyError: there is none.
        """
        if self._num_requests >= MOST_REQUESTS:
            raise BusyError
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    async def predict(self, photo: bytes) -> Prediction:
        """Name a photo.

        Raises:
            DataError: see `Session.decode`.
        """
        prediction = await self.in_worker(lambda: self._predict(photo))
        self._remember(prediction.id, RecentPhoto(data=photo, guess=prediction.guesses[0]))
        return prediction

    def recent(self, id: str) -> RecentPhoto | None:
        """A photo named a short while ago; None if it is not remembered any more."""
        return self._recent.get(id)

    async def in_worker(self, work: Callable[[], T]) -> T:
        """Do work in the one worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def close(self) -> None:
        """Finish what is being computed, and stop the worker."""
        self._worker.shutdown(wait=True)

    def _predict(self, photo: bytes) -> Prediction:
        session = self.session
        probabilities_K = (self.local_head or session).predict(session.decode(photo))
        is_sure = session.is_sure(probabilities_K)
        return Prediction(
            id=secrets.token_urlsafe(12), guesses=session.top(probabilities_K, NUM_GUESSES), is_sure=is_sure,
            folder=None if is_sure else session.sure_folder(probabilities_K),
        )  # fmt: skip

    def _remember(self, id: str, photo: RecentPhoto) -> None:
        self._recent[id] = photo
        while len(self._recent) > RECENT_PHOTOS or sum(len(kept.data) for kept in self._recent.values()) > RECENT_BYTES:
            self._recent.popitem(last=False)


def digest(photo: bytes) -> str:
    """SHA-256 of a photo file (hex)."""
    return hashlib.sha256(photo).hexdigest()
