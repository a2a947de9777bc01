"""Several clients' rounds side by side in one process, without two of them ever running at once.

Every play has a thread of its own, but only whoever has the turn runs: the threads are a way to stop in the middle of
a client's code, not a way to compute faster. So nothing of that code needs to be safe for threads.
"""

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread

from fedshelf.core.messages import ClientMessage
from fedshelf.training.loop import Lane, Run

Play = Callable[[Run], ClientMessage]
"""A client's round; it is given what to call where it trains."""


class Turns:
    """Plays rounds up to where they train, trains all that have come so far together, and so on to their ends.

    Args:
        train: trains lanes to their ends; returns each one's share of the time (seconds).
    """

    def __init__(self, train: Callable[[Sequence[Lane]], float]) -> None:
        self._train = train

    def play(self, plays: Sequence[Play]) -> list[ClientMessage]:
        """What the rounds come to, in the order of `plays`. Whatever one of them raises is raised here."""
        turns = [_Turn(play) for play in plays]
        for turn in turns:
            turn.go_on(0.0)
        while waiting := [turn for turn in turns if turn.lane is not None]:
            try:
                seconds: float | BaseException = self._train([turn.lane for turn in waiting if turn.lane is not None])
            except BaseException as error:  # noqa: BLE001  it is raised where each of them waits
                seconds = error
            for turn in waiting:
                turn.go_on(seconds)
        return [turn.result() for turn in turns]


class _Turn:
    """One round, stopped or ended. `lane` is what it waits to be trained, None at its end."""

    def __init__(self, play: Play) -> None:
        self.lane: Lane | None = None
        self._answer: ClientMessage | None = None
        self._error: BaseException | None = None
        self._go_on: SimpleQueue[float | BaseException] = SimpleQueue()
        self._stopped: SimpleQueue[Lane | None] = SimpleQueue()
        self._thread = Thread(target=self._live, args=(play,), daemon=True)
        self._thread.start()

    def go_on(self, value: float | BaseException) -> None:
        """Give it the turn until it waits again, or ends."""
        self._go_on.put(value)
        self.lane = self._stopped.get()
        if self.lane is None:
            self._thread.join()

    def result(self) -> ClientMessage:
        if self._error is not None:
            raise self._error
        if self._answer is None:
            raise RuntimeError("a client's round has no answer though it has ended")
        return self._answer

    def _live(self, play: Play) -> None:
        self._go_on.get()
        try:
            self._answer = play(self._wait)
        except BaseException as error:  # noqa: BLE001  it is raised again where the turns are played
            self._error = error
        self._stopped.put(None)

    def _wait(self, lane: Lane) -> float:
        """`Run` for this round's training."""
        self._stopped.put(lane)
        value = self._go_on.get()
        if isinstance(value, BaseException):
            raise value
        return value
