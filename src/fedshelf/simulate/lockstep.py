"""Several clients' rounds side by side in one process, without two of them ever running at once.

Every play has a thread of its own, but only whoever has the turn runs: the threads are a way to stop in the middle of
a client's code, not a way to compute faster. So nothing of that code needs to be safe for threads.
"""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread

from fedshelf.core.messages import ClientMessage
from fedshelf.training.loop import LocalRun, Run

RunMessage = Callable[[Run], ClientMessage]
"""A client's round; it is given what to call where it trains."""


class Lockstep:
    """Plays rounds up to where they train, trains all that have come so far together, and so on to their ends.

    Args:
        train: trains lanes to their ends; returns each one's share of the time (seconds).
    """

    def __init__(self, train: Callable[[Sequence[LocalRun]], float]) -> None:
        self._train = train

    def run(self, rounds: Sequence[RunMessage]) -> list[ClientMessage]:
        """What the rounds come to, in the order of `rounds`. Whatever one of them raises is raised here."""
        turns = [_SteppedRound(run) for run in rounds]
        for turn in turns:
            turn.resume(0.0)
        while waiting := [turn for turn in turns if turn.local_run is not None]:
            try:
                seconds: float | BaseException = self._train(
                    [turn.local_run for turn in waiting if turn.local_run is not None]
                )
            except BaseException as error:  # noqa: BLE001  it is raised where each of them waits
                seconds = error
            for turn in waiting:
                turn.resume(seconds)
        return [turn.result() for turn in turns]


class _SteppedRound:
    """One round, stopped or ended. `local_run` is what it waits to be trained, None at its end."""

    def __init__(self, run: RunMessage) -> None:
        self.local_run: LocalRun | None = None
        self._answer: ClientMessage | None = None
        self._error: BaseException | None = None
        self._go_on: SimpleQueue[float | BaseException] = SimpleQueue()
        self._stopped: SimpleQueue[LocalRun | None] = SimpleQueue()
        self._thread = Thread(target=self._live, args=(run,), daemon=True)
        self._thread.start()

    def resume(self, value: float | BaseException) -> None:
        """Give it the turn until it waits again, or ends."""
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
        except BaseException as error:  # noqa: BLE001  it is raised again where the turns are played
            self._error = error
        self._stopped.put(None)

    def _wait(self, local_run: LocalRun) -> float:
        """`Run` for this round's training."""
        self._stopped.put(local_run)
        value = self._go_on.get()
        if isinstance(value, BaseException):
            raise value
        return value
