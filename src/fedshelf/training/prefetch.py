"""Prefetching in a background thread."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items in the same order, each produced in a background thread while the previous one is used.

    This pays off if producing and using an item need different processors: the CPU prepares a batch while a GPU trains
    on the previous one. Exceptions from `items` are raised here.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as maker:
        coming = maker.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = maker.submit(next, items, _END)
            yield item  # type: ignore[misc]
