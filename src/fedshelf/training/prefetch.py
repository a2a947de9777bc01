"""Work done ahead."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order, each made in another thread while the one before it is used.

    It pays where making an item and using it need different processors: a batch is made on the CPU while a GPU trains
    on the last. What making an item raises is raised here.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as maker:
        coming = maker.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = maker.submit(next, items, _END)
            yield item  # type: ignore[misc]
