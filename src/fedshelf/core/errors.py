"""Everything FedShelf raises on purpose.

FedShelfError                 the message is for a person: what, where, why, what to do
├── UsageError                a wrong flag, key or path (exit code 2)
├── DataError                 photos, catalogue or tables that cannot be used
├── ModelError                an unknown model, a checkpoint that does not fit
├── TrainingError             local training that failed on this store's photos
├── RefusedError              a message that fails a check: nothing of it is kept
├── RunError                  a run directory that cannot be used or resumed
├── TransportError            the other side cannot be reached or does not speak our protocol
└── WorkerLostError           a process that computes for this one has ended
"""

from fedshelf.core.text import printable


class FedShelfError(Exception):
    """Base of all expected failures; the command line prints it without a traceback.

    Args:
        problems: what is wrong, each a sentence of its own. Usually one; a check that finds several gives them all.

    Attributes:
        exit_code: what the command line exits with.
        will_repeat: the same task would fail again in the same way, so asking again makes no sense.
    """

    exit_code = 1
    will_repeat = False

    def __str__(self) -> str:
        """All problems on one line, harmless to a terminal whatever names from outside went into them."""
        return "; ".join(printable(str(problem)) for problem in self.args)


class UsageError(FedShelfError):
    """The caller asked for something that makes no sense; nothing was started."""

    exit_code = 2
    will_repeat = True


class DataError(FedShelfError):
    """Photos, a catalogue or a table that cannot be used."""

    will_repeat = True


class ModelError(FedShelfError):
    """A model that cannot be built or weights that do not fit it."""

    will_repeat = True


class TrainingError(FedShelfError):
    """Local training failed.

    Args:
        message: for a person.
        will_repeat: whether training on these photos fails whatever the model's values are.
    """

    def __init__(self, message: str, *, will_repeat: bool = False) -> None:
        super().__init__(message)
        self.will_repeat = will_repeat


class RefusedError(FedShelfError):
    """A message that failed a check. Its sender is told the reason; the receiver keeps nothing of it."""


class RunError(FedShelfError):
    """A run directory that cannot be used: locked, of another configuration, or damaged."""


class TransportError(FedShelfError):
    """The other side cannot be reached, is not who it should be, or does not speak our protocol."""


class WorkerLostError(FedShelfError):
    """A process that computes for this one has ended before its work was done."""
