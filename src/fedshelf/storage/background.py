"""Disk writes in a background thread, in the order in which they were requested.

Only for runs whose clients end with the server (simulations): a deployed server must not dispatch work before its disk
has recorded it. A crash loses only what the thread has not written yet: the latest events, and one round, which is then
repeated. A checkpoint never exists without its record, because the record is written first.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from types import TracebackType

from fedshelf.core.events import ClientJoined, Event, UploadReceived
from fedshelf.core.ports import Checkpoints
from fedshelf.core.state import OpenRound, ServerState

LINGER = 0.1  # seconds that client events may wait for others, to share a transaction

Job = Callable[[], object]


class BackgroundWriter:
    """The writer thread.

    It stops at the first error, which the next call (or `close`) raises, so that no later job is written.

    Args:
        write_events: writes several events, in order.
    """

    def __init__(self, write_events: Callable[[Sequence[Event]], None]) -> None:
        self._write_events = write_events
        self._jobs: deque[Job | Event] = deque()
        self._changed = threading.Condition()
        self._urgent = False
        self._closing = False
        self._num_added = self._num_done = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fedshelf-disk", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # otherwise report the original error
                raise

    def emit(self, event: Event) -> None:
        """Queue an event. Safe to call from any thread.

        Raises:
            RunError: an earlier job failed.
        """
        self._add(event, urgent=not isinstance(event, ClientJoined | UploadReceived))

    def do(self, job: Job) -> int:
        """Queue a job, and return its number for `wait`.

        Raises:
            RunError: an earlier job failed.
        """
        return self._add(job, urgent=True)

    def wait(self, number: int | None = None) -> None:
        """Wait until the job with the given number is done; by default, until all are.

        Raises:
            RunError: the job or an earlier one failed.
        """
        with self._changed:
            wanted = self._num_added if number is None else number
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_done >= wanted or self._error is not None)
            self._raise()

    def close(self) -> None:
        """Finish all jobs, and stop the thread.

        Raises:
            RunError: a job failed.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise()

    def _add(self, job: Job | Event, *, urgent: bool) -> int:
        with self._changed:
            self._raise()
            self._jobs.append(job)
            self._num_added += 1
            if urgent or len(self._jobs) == 1:
                self._urgent = self._urgent or urgent
                self._changed.notify_all()
            return self._num_added

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while self._error is None:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._closing)
                if not self._jobs:
                    return
                self._changed.wait_for(lambda: self._urgent or self._closing, timeout=LINGER)
                jobs = list(self._jobs)
                self._jobs.clear()
                self._urgent = False
            error = self._do(jobs)
            with self._changed:
                self._num_done += len(jobs)
                self._error = error
                self._changed.notify_all()

    def _do(self, jobs: Sequence[Job | Event]) -> BaseException | None:
        try:
            for are_calls, group in groupby(jobs, key=callable):
                if not are_calls:
                    self._write_events([job for job in group if not callable(job)])
                else:
                    for job in group:
                        if callable(job):
                            job()
        except BaseException as error:  # noqa: BLE001  whatever it is, it is the caller's
            return error
        return None


class BackgroundCheckpoints:
    """`Checkpoints` that are written by the background thread.

    At most one state waits to be written, so a slow disk slows the rounds down instead of filling the memory.

    Args:
        checkpoints: writes the files.
        writer: the background thread.
    """

    def __init__(self, checkpoints: Checkpoints, writer: BackgroundWriter) -> None:
        self._checkpoints = checkpoints
        self._writer = writer
        self._last: int | None = None

    def load(self) -> ServerState | None:
        self._writer.wait()
        return self._checkpoints.load()

    def load_round(self, round: int) -> ServerState | None:
        self._writer.wait()
        return self._checkpoints.load_round(round)

    def save(self, state: ServerState, *, is_best: bool, alone: bool = False) -> None:
        if self._last is not None:
            self._writer.wait(self._last)
        self._last = self._writer.do(lambda: self._checkpoints.save(state, is_best=is_best, alone=alone))
        if alone:  # a store is about to be told that what it sent is gone
            self._writer.wait(self._last)

    def load_open_round(self) -> OpenRound | None:
        self._writer.wait()
        return self._checkpoints.load_open_round()

    def save_open_round(self, open_round: OpenRound) -> None:
        self._writer.do(lambda: self._checkpoints.save_open_round(open_round))

    def forget_noise_key(self) -> None:
        """See `Checkpoints`."""
        self._writer.do(self._checkpoints.forget_noise_key)
