"""What the rounds need from the world, as protocols. Each has a real adapter (deploy, simulate, tracking) and an
in-memory fake in `tests/fakes.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from fedshelf.core.events import Event
from fedshelf.core.messages import Broadcast, ClientMessage, Join, ServerMessage, TaskKey
from fedshelf.core.state import ClientState, OpenRound, ServerState


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A client is there and introduced itself (again, after a restart of either side). `address` names this
    connection: the transport knows clients by it until the server accepts their name."""

    address: str
    join: Join


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """The connection has been silent for too long, or was closed.

    Attributes:
        address: which one.
        ended_by: the signal that ended the client's process, empty where its machine does not know which; None: nothing
            is known of an end of the process.
        signed_off: the client said that it leaves.
    """

    address: str
    ended_by: str | None = None
    signed_off: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A message's body as it came in: a file whose content `digest` names (BLAKE3). Whoever moves it owns it; what
    still lies there when the transport is asked for the next arrival is deleted."""

    path: Path
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reply:
    """What came back for a message, from its arrival to its use.

    Attributes:
        address: the connection that it came from.
        message: what the client says; None where its bytes could not be read, and `reason` says why.
        reason: why there is no message (truncated, wrong digest, not our format).
        num_bytes: payload on the wire.
        task: the key of the broadcast that it answers, as the transport knows it (a hostile client may name another in
            the message itself); None: it answers no task.
        source: the file that the message's vectors are views of, if they came in one.
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

    Whether payloads travel inside messages or beside them is the adapter's own business.
    """

    def send(self, address: str, message: ServerMessage) -> int:
        """Hand `message` to a client and return the bytes this puts on the wire; never waits for the answer.

        Sending to an address that has gone is no error: `Left` tells.
        """

    def receive(self, timeout: float) -> Arrival | None:
        """The next arrival, or None once `timeout` seconds have passed without one."""

    def refuse(self, address: str, reason: str) -> None:
        """Tell a connection why it is not wanted, and forget it."""

    def close(self, reason: str) -> None:
        """Tell every client that the run has ended, and why."""


class Clock(Protocol):
    """Time in seconds; monotonic, from an arbitrary start."""

    def now(self) -> float: ...


class VirtualClock(Clock, Protocol):
    """The clock of a simulation, in virtual seconds: it knows what will happen, and can go on where a run was."""

    def resume(self, state: ServerState) -> None:
        """Set it to when `state` was noted. Clients are then at work, or away, as they were: a task of
        `state.in_flight` that is sent again is due when it was; one that is not keeps its client busy until then."""

    def snapshot(self, state: ServerState) -> ServerState:
        """`state` with all that `resume` needs: `virtual_seconds`, and in `in_flight` all that clients are at. What of
        that `state.in_flight` names is `wanted`."""

    def is_settled(self) -> bool:
        """Whether everybody has come and gone who does at this very moment; uploads may still arrive."""


class Checkpoints(Protocol):
    """Where the server's state survives. Each call is atomic: a crash leaves the old or the new, never a mix."""

    def load(self) -> ServerState | None:
        """The newest saved state, or None in a fresh run."""

    def load_round(self, round: int) -> ServerState | None:
        """The state saved after `round`; None where it is no longer kept."""

    def save(self, state: ServerState, *, is_best: bool) -> None: ...

    def load_open_round(self) -> OpenRound | None: ...

    def save_open_round(self, open_round: OpenRound) -> None: ...


class Spool(Protocol):
    """Uploads of the open round, kept until they are folded. Survives a crash where the run does."""

    def put(self, key: TaskKey, client: str, message: ClientMessage, source: Received | None = None) -> None:
        """Keep the upload; `source` is the file that its vectors came in, which need not be copied then."""

    def names(self, key: TaskKey) -> Sequence[str]:
        """Clients with an upload for `key`, sorted."""

    def get(self, key: TaskKey, client: str) -> ClientMessage:
        """The upload; its vectors may be views of a file: do not write to them."""

    def clear(self) -> None:
        """Forget everything: the round has been folded and checkpointed, or is void."""


class ClientStates(Protocol):
    """What a client keeps between rounds, committed in two phases (see `Broadcast.counted`)."""

    def commit_or_rollback(self, broadcast: Broadcast) -> ClientState:
        """Commit the pending state if the server counted it, else drop it; return the state now in force."""

    def peek(self, key: TaskKey) -> ClientState:
        """The state that the answer to `key` leads to, be it counted yet or not; else the one in force."""

    def cached_reply(self, key: TaskKey) -> ClientMessage | None:
        """The answer already given for `key`, to be sent again byte for byte; None if there is none."""

    def stage(self, key: TaskKey, upload: ClientMessage, state: ClientState) -> None:
        """Keep the answer and the state it leads to, both pending."""


class MetricSink(Protocol):
    """Writes down what happens."""

    def emit(self, event: Event) -> None: ...
