"""The inbox of a store's corrections, as its client sees it: photos wait for the catalogue to have their product."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fedshelf.core.errors import FedShelfError
from fedshelf.core.text import counted
from fedshelf.data.catalogue import Catalogue
from fedshelf.edge.serving.corrections import JOURNAL, Corrections, unknown_products

logger = logging.getLogger(__name__)


class Inbox:
    """Files photos from the inbox among the training photos once the catalogue has their product.

    Args:
        data_dir: the store's photo folder.
        say: shows one line.
    """

    def __init__(self, data_dir: Path, *, say: Callable[[str], None]) -> None:
        self._data_dir = data_dir
        self._say = say
        self._seen: tuple[str, int] | None = None  # digest of the catalogue, and size of the journal
        self._waiting: Counter[str] = Counter()

    def look(self, catalogue: Catalogue) -> None:
        """File what can be filed, and say what still waits if that has changed. Does nothing if there is nothing new.

        A client that may only read the folder, or finds a damaged journal, trains without these photos.

        Args:
            catalogue: the run's catalogue.
        """
        seen = (catalogue.digest, self._size)
        if seen == self._seen or not seen[1]:
            return
        try:
            store = Corrections(self._data_dir, labels=catalogue.names, paths=catalogue.names, create=False)
            filed = store.file_known(catalogue)
            waiting = unknown_products(store.all())
        except FedShelfError as error:
            logger.warning("the inbox of corrections cannot be used: %s", error)
            self._seen = seen
            return
        self._seen = (catalogue.digest, self._size)
        if filed:
            self._say(f"trains on {_named(filed)} from the inbox, now that the catalogue has them")
        if waiting and waiting != self._waiting:
            self._say(f"does not train on {_named(waiting)} in the inbox: the catalogue does not have them")
        self._waiting = waiting

    @property
    def _size(self) -> int:
        try:
            return (self._data_dir / JOURNAL).stat().st_size
        except OSError:
            return 0


def _named(photos: Counter[str]) -> str:
    """The photos of each product."""
    return ", ".join(f"{counted(number, 'photo')} of '{product}'" for product, number in sorted(photos.items()))
