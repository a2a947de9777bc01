"""Protocols for the outside world of the rounds.

Each has a real adapter (deploy, simulate, tracking) and an in-memory fake in `tests/fakes.py`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from fedshelf.core.events import Event
from fedshelf.core.messages import Broadcast, ClientMessage, Join, ServerMessage, TaskKey
from fedshelf.core.state import ClientState, OpenRound, ServerState


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A client is connected and has introduced itself, possibly again after a restart of either side.

    Attributes:
        address: identifies the connection; the transport knows clients by it until the server accepts their name.
        join: the client's introduction.
    """

    address: str
    join: Join


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """The connection has been silent for too long, or was closed.

    Attributes:
        address: the connection.
        ended_by: the signal that ended the client's process, "" if its machine does not know which; None if it is
            unknown whether the process ended.
        signed_off: whether the client announced that it leaves.
    """

    address: str
    ended_by: str | None = None
    signed_off: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A message's body as a file.

    Moving the file takes ownership; otherwise the transport deletes it at the next `receive`.

    Attributes:
        path: the file.
        digest: BLAKE3 digest of its content.
    """

    path: Path
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reply:
    """A client's message, from its arrival to its use.

    Attributes:
        address: the connection that it came from.
        message: the client's message; None if its bytes could not be read.
        num_bytes: payload on the wire.
        task: the key of the broadcast that it answers, as the transport knows it (a hostile client may name another in
            the message itself); None if it answers no task.
        source: the file that the message's vectors are views of, if any.
        reason: why there is no message (truncated, wrong digest, not our format).
        client: the client's name; "" until the inbox has looked it up.
    """

    address: str
    message: ClientMessage | None
    num_bytes: int
    task: TaskKey | None = None
    source: Received | None = None
    reason: str = ""
    client: str = ""


Arrival: TypeAlias = Joined | Left | Reply


class Transport(Protocol):
    """Carries messages between the server and its clients. Addresses are opaque: one per live connection.

    Whether payloads travel inside messages or separately is up to the adapter.
    """

    def send(self, address: str, message: ServerMessage) -> int:
        """Send `message` to a client without waiting for the reply, and return its size on the wire in bytes.

        Sending to a disconnected address is not an error: `Left` reports it.
        """

    def receive(self, timeout: float) -> Arrival | None:
        """The next arrival, or None if there is none within `timeout` seconds."""

    def refuse(self, address: str, reason: str, *, is_final: bool = False) -> None:
        """Tell a connection why it is refused, and forget it.

        Args:
            address: the connection.
            reason: for the client's user.
            is_final: whether the client is to end; otherwise it tries again later.
        """

    def revoked(self) -> Collection[str]:
        """Names of the clients that may no longer take part. Their connections have ended or are about to."""

    def close(self, reason: str) -> None:
        """Tell every client that the run has ended, and why."""


class Clock(Protocol):
    """Time in seconds; monotonic, from an arbitrary start."""

    def now(self) -> float:
        """The current time in seconds."""


class VirtualClock(Clock, Protocol):
    """The clock of a simulation, in virtual seconds. It knows future events, and can resume a run."""

    def resume(self, state: ServerState) -> None:
        """Set the clock to the time of `state`.

        Clients are then at work or away as they were. A task of `state.in_flight` that is sent again is due at its
        original time; one that is not sent again keeps its client busy until then.
        """

    def snapshot(self, state: ServerState) -> ServerState:
        """Add to `state` all that `resume` needs: `virtual_seconds`, and in `in_flight` the tasks of all clients.

        Tasks that `state.in_flight` already names are marked as `wanted`.
        """

    def is_settled(self) -> bool:
        """Whether all joins and departures at the current time are done; uploads may still arrive."""


class Checkpoints(Protocol):
    """Durable storage of the server's state.

    Each call is atomic: a crash leaves the old or the new state, never a mix.
    """

    def load(self) -> ServerState | None:
        """The newest saved state, or None in a new run."""

    def load_round(self, round: int) -> ServerState | None:
        """The state saved after `round`; None if it is no longer kept."""

    def save(self, state: ServerState, *, is_best: bool, alone: bool = False) -> None:
        """Save the state; if `alone`, delete all earlier ones."""

    def load_open_round(self) -> OpenRound | None:
        """What was saved about the round that is not finished; None if there is no such round."""

    def save_open_round(self, open_round: OpenRound) -> None:
        """Save what a restarted server needs to finish the round."""

    def forget_noise_key(self) -> None:
        """Forget the key of the open round's noise, and nothing else of it."""


class Spool(Protocol):
    """Uploads of the open round, kept until they are aggregated. Survives a crash if the run does."""

    def put(self, key: TaskKey, client: str, message: ClientMessage, source: Received | None = None) -> None:
        """Store the upload; `source` is the file that holds its vectors, which then need not be copied."""

    def names(self, key: TaskKey) -> Sequence[str]:
        """Names of the clients with an upload for `key`, sorted."""

    def get(self, key: TaskKey, client: str) -> ClientMessage:
        """The upload; its vectors may be views of a file and must not be written to.

        Raises:
            RefusedError: it can no longer be read.
        """

    def clear(self) -> None:
        """Delete all uploads: the round has been aggregated and checkpointed, or is void."""


class ClientStates(Protocol):
    """The state that a client keeps between rounds, committed in two phases (see `Broadcast.counted`)."""

    def commit_or_rollback(self, broadcast: Broadcast) -> ClientState:
        """Commit the pending state if the server counted it, otherwise roll it back; return the current state."""

    def peek(self, key: TaskKey) -> ClientState:
        """The state that follows the reply to `key`, whether committed or not; otherwise the current state."""

    def cached_reply(self, key: TaskKey) -> ClientMessage | None:
        """The stored reply for `key`, to be sent again byte for byte; None if there is none."""

    def stage(self, key: TaskKey, upload: ClientMessage, state: ClientState) -> None:
        """Store the reply and the state that follows it, both pending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseTerms:
    """What a client knows of a reply that its bytes do not tell.

    Attributes:
        purpose: what the reply is for: `setup`, `train`, `closed-form`, `evaluate` or `compare`.
        protections: what limits how much the reply reveals, such as `clip-norm 1`.
        mechanism: the randomized mechanism that made it, as JSON values; None if there is none.
        epsilon: the privacy loss of this store's photos so far, with this reply; None if it is not bounded.
    """

    purpose: str
    protections: tuple[str, ...] = ()
    mechanism: Mapping[str, object] | None = None
    epsilon: float | None = None


class IdentityKey(Protocol):
    """A client's public identity key."""

    def verifies(self, signature: bytes, content: bytes) -> bool:
        """Whether the client has signed `content`."""


class MetricSink(Protocol):
    """Records events."""

    def emit(self, event: Event) -> None:
        """Record an event."""
