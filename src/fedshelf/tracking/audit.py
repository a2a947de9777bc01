"""Writes what matters of a run's events to the server's audit log."""

from collections import Counter

from fedshelf.core.events import (
    CatalogueChanged,
    ClientExcluded,
    ClientJoined,
    ClientLeft,
    ClientRefused,
    Event,
    RoundFinished,
    RoundVoid,
    RunEnded,
    RunStarted,
    UploadReceived,
)
from fedshelf.identity.audit_log import AuditLog


class AuditSink:
    """A sink for a server.

    Args:
        log: the audit log.
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._run_id: str | None = None

    def emit(self, event: Event) -> None:
        """Write an event."""
        match event:
            case RunStarted():
                self._run_id = event.run_id
                self._write(
                    "run started", round=event.first_round, catalogue=event.catalogue_digest,
                    configuration=event.config_digest, products=event.num_classes,
                )  # fmt: skip
            case CatalogueChanged():
                self._write(
                    "catalogue changed", round=event.round, catalogue=event.catalogue_digest,
                    products=event.num_classes,
                )  # fmt: skip
            case ClientJoined():
                self._write("joined", store=event.client, photos=event.num_train)
            case ClientRefused():
                self._write("refused", store=event.client, reason=event.reason)
            case ClientExcluded():
                self._write("excluded", store=event.client, reason=event.reason)
            case ClientLeft():
                self._write("left", store=event.client, reason=event.reason)
            case UploadReceived():
                self._write(
                    "upload", round=event.round, store=event.client, verdict=event.status.value,
                    reason=event.reason or None, bytes=event.num_bytes, digest=event.digest or None,
                    norm=None if event.norm is None else float(f"{event.norm:.6g}"),
                )  # fmt: skip
            case RoundFinished():
                statuses = Counter(member.status.value for member in event.clients)
                told = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
                self._write("round finished", round=event.round, clients=told, model=event.model_digest)
                for member in event.clients:
                    if member.reason and member.status.value == "refused":
                        self._write("left out", round=event.round, store=member.client, reason=member.reason)
            case RoundVoid():
                self._write("round void", round=event.round, reason=event.reason)
            case RunEnded():
                self._write("run ended", status=event.status.value, reason=event.reason)
            case _:
                pass

    def _write(self, event: str, **fields: str | int | float | None) -> None:
        self._log.write(event, run=self._run_id, **fields)
