"""Interleaves several clients' rounds in one process, one at a time.

Each round has its own thread, but only one of them runs at any time: threads are used to suspend a client's code, not
to compute in parallel. So that code does not need to be thread-safe.
"""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread

from fedshelf.core.messages import ClientMessage
from fedshelf.training.loop import LocalRun, Run

RunMessage = Callable[[Run], ClientMessage]
"""A client's round; its argument is called to train."""


class Lockstep:
    """Runs rounds until they train, trains all suspended ones together, and repeats until they end.

    Args:
        train: trains local runs to completion; returns each one's share of the time in seconds.
    """

    def __init__(self, train: Callable[[Sequence[LocalRun]], float]) -> None:
        self._train = train

    def run(self, rounds: Sequence[RunMessage]) -> list[ClientMessage]:
        """Run all rounds.

        Args:
            rounds: the clients' rounds.

        Returns:
            The answers in the order of `rounds`.

        Raises:
            BaseException: whatever a round raises.
        """
        turns = [_SteppedRound(run) for run in rounds]
        for turn in turns:
            turn.resume(0.0)
        while waiting := [turn for turn in turns if turn.local_run is not None]:
            try:
                seconds: float | BaseException = self._train(
                    [turn.local_run for turn in waiting if turn.local_run is not None]
                )
            except BaseException as error:  # noqa: BLE001  raised in each suspended round
                seconds = error
            for turn in waiting:
                turn.resume(seconds)
        return [turn.result() for turn in turns]


class _SteppedRound:
    """One round, suspended or finished. `local_run` is waiting to be trained; None at the end."""

    def __init__(self, run: RunMessage) -> None:
        self.local_run: LocalRun | None = None
        self._answer: ClientMessage | None = None
        self._error: BaseException | None = None
        self._go_on: SimpleQueue[float | BaseException] = SimpleQueue()
        self._stopped: SimpleQueue[LocalRun | None] = SimpleQueue()
        self._thread = Thread(target=self._live, args=(run,), daemon=True)
        self._thread.start()

    def resume(self, value: float | BaseException) -> None:
        """Resume the round until it suspends again or ends."""
        self._go_on.put(value)
        self.local_run = self._stopped.get()
        if self.local_run is None:
            self._thread.join()

    def result(self) -> ClientMessage:
        if self._error is not None:
            raise self._error
        if self._answer is None:
            raise RuntimeError("a client's round has no answer though it has ended")
        return self._answer

    def _live(self, run: RunMessage) -> None:
        self._go_on.get()
        try:
            self._answer = run(self._wait)
        except BaseException as error:  # noqa: BLE001  raised again in the main thread
            self._error = error
        self._stopped.put(None)

    def _wait(self, local_run: LocalRun) -> float:
        """Suspend until this round's training is done; passed to the round as `Run`."""
        self._stopped.put(local_run)
        value = self._go_on.get()
        if isinstance(value, BaseException):
            raise value
        return value
