"""All errors that FedShelf raises on purpose.

FedShelfError                 the message is for a person: what, where, why, what to do
├── UsageError                a wrong flag, key or path (exit code 2)
├── DataError                 unusable photos, catalogue or tables
├── ModelError                an unknown model, or a checkpoint that does not fit
├── TrainingError             local training failed on this store's photos
├── RefusedError              a message failed validation and is discarded
│   └── PolicyError           the store's policy does not allow what the server asks for
├── BudgetError               a privacy budget does not allow a further release
├── RunError                  a run directory that cannot be used or resumed
├── TransportError            the other side cannot be reached or does not speak our protocol
└── WorkerLostError           a worker process ended before its work was done
"""

from fedshelf.core.text import printable

NOT_ALLOWED = "this store's policy does not allow it"
"""How the reason of a `PolicyError` begins."""


class FedShelfError(Exception):
    """Base class of all expected errors. The command line prints them without a traceback.

    Args:
        problems: what is wrong, one sentence each. Usually one; a validator that finds several reports them all.

    Attributes:
        exit_code: exit code of the command line.
        will_repeat: whether the same task would fail again in the same way, so that a retry is pointless.
    """

    exit_code = 1
    will_repeat = False

    def __str__(self) -> str:
        """All problems on one line, escaped for safe display on a terminal."""
        return "; ".join(printable(str(problem)) for problem in self.args)


class UsageError(FedShelfError):
    """The caller asked for something invalid. Nothing was started."""

    exit_code = 2
    will_repeat = True


class DataError(FedShelfError):
    """Photos, a catalogue or a table cannot be used."""

    will_repeat = True


class ModelError(FedShelfError):
    """A model cannot be built, or weights do not fit it."""

    will_repeat = True


class TrainingError(FedShelfError):
    """Local training failed.

    Args:
        message: for a person.
        will_repeat: whether training on these photos fails for any model values.
    """

    def __init__(self, message: str, *, will_repeat: bool = False) -> None:
        super().__init__(message)
        self.will_repeat = will_repeat


class RefusedError(FedShelfError):
    """A message failed validation. The sender is told the reason, and the receiver discards the message."""


class PolicyError(RefusedError):
    """The store's policy does not allow what the server asks for. Nothing is computed or sent.

    The problems name the policy's limits.
    """

    def __str__(self) -> str:
        """All problems, after who refuses."""
        return f"{NOT_ALLOWED}: {super().__str__()}"


class BudgetError(FedShelfError):
    """A privacy budget does not allow a further release. Nothing is computed or sent."""

    will_repeat = True


class RunError(FedShelfError):
    """A run directory cannot be used: it is locked, damaged or belongs to another configuration."""


class TransportError(FedShelfError):
    """The other side cannot be reached, is not who it should be, or does not speak our protocol."""


class RosterError(TransportError):
    """The server shows a roster, or a chain's key, that this store does not accept. Trying again would not be safe."""


class IdentityError(FedShelfError):
    """A key, certificate, token or roster is missing, damaged, expired, used or revoked."""

    will_repeat = True


class IdentityFileError(IdentityError):
    """A file of keys, tokens or stores on this machine is missing, damaged, encrypted or full. No peer can help it."""


class WorkerLostError(FedShelfError):
    """A worker process ended before its work was done."""
