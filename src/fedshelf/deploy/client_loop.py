"""The client's main loop: joins a server, answers its messages, and reconnects after any interruption."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path

from fedshelf.core.errors import FedShelfError, IdentityError, RosterError, RunError, UsageError
from fedshelf.core.messages import Join
from fedshelf.deploy import quiet_engine_log
from fedshelf.deploy.address import parse_server_address
from fedshelf.deploy.blob_client import ReceivedBlob
from fedshelf.deploy.client_part import ClientPart, Ended, EndKind, Handler
from fedshelf.deploy.connection_errors import CertificateRejectedError, ServerUnavailableError, SessionLostError
from fedshelf.deploy.crash_reporter import CrashReporter, ReportTarget
from fedshelf.deploy.credentials import Credentials
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.greeting import clock_problem
from fedshelf.deploy.patience import SILENCE_ADVICE, Patience, Retries
from fedshelf.deploy.records import SendHook
from fedshelf.deploy.registration import AnswerHook, Registration
from fedshelf.deploy.tls import local_authority
from fedshelf.deploy.waiting import Availability, WaitReporter
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.identity.tokens import Token
from fedshelf.privacy.ledger import Ledger
from fedshelf.serialization.blob import Buffer
from fedshelf.storage.atomic_files import temporary_folder
from fedshelf.storage.hash_chain import DamagedLogError

logger = logging.getLogger(__name__)

FILE_PAUSE = 5.0  # seconds between attempts while a file cannot be written, for example on a full disk


def run_client(
    server_address: str,
    handle: Handler,
    join: Join,
    *,
    keys: StoreKeys | None = None,
    token: Token | None = None,
    ca: Path | None = None,
    insecure: bool = False,
    stop: threading.Event | None = None,
    on_status: Callable[[str], None] = logger.info,
    on_send: SendHook | None = None,
    on_answer: AnswerHook = lambda answer, num_bytes: None,
    max_wait: float | None = None,
    availability: Availability | None = None,
    reporter: CrashReporter | None = None,
    max_download: Callable[[], int] = lambda: sys.maxsize,
    find_blob: Callable[[str], Buffer | None] = lambda digest: None,
    ledger: Ledger | None = None,
) -> Ended:
    """Take part in a run until the server closes it, refuses this client for good, or `stop` is set.

    Everything that may pass is retried: an unreachable server, another program or another certificate at its address,
    and a refusal that another run may not repeat.

    Args:
        server_address: HOST:PORT.
        handle: answers the server's messages; an exception becomes a `Failure`, and the client continues.
        join: introduces this client.
        keys: the store's keys; by default new ones, for as long as this client runs.
        token: admits the store if it is not enrolled yet.
        ca: certificate authority to trust; None trusts this machine's own server and the system's authorities.
        insecure: disable TLS.
        stop: set it to leave after the current message.
        on_status: receives connection status lines for the user.
        on_send: receives everything that is sent, before encryption.
        on_answer: receives each delivered answer and its size on the wire in bytes.
        max_wait: seconds to wait for an unresponsive server during active hours; None waits indefinitely.
        availability: when this client may work; None means always. When that time ends, the client finishes and
            delivers the current task, then leaves until the next active period.
        reporter: reports to the server if this process crashes.
        max_download: returns the maximum bytes of a model that the server may send.
        find_blob: finds a blob that this machine has received before, by digest.
        ledger: gets a line for all that is sent, before it is sent; None keeps no ledger.

    Returns:
        Why the client stopped.

    Raises:
        IdentityError: the server does not admit this store.
        DamagedLogError: the ledger was altered, or the server has seen an entry that is not in it.
        RosterError: the server shows a roster, or a chain's key, that this store does not accept.
        TransportError: the server does not accept this client's certificate, or did not answer for `max_wait`.
        UsageError: `server_address` is not an address that a client can connect to; or TLS cannot be set up on this
            machine, and never could be since this client began.
    """
    quiet_engine_log()
    address = parse_server_address(server_address)
    stop, availability = stop or threading.Event(), availability or Availability()
    part, held = ClientPart(join=join, handle=handle, find_blob=find_blob), ReceivedBlob(max_download)
    retries, patience = Retries(on_status, stop), Patience(address, max_wait)
    on_status(f"connecting to {address}")
    with WaitReporter(on_status) as waiting, contextlib.ExitStack() as temporary:
        if keys is None:
            keys = StoreKeys(Path(temporary.enter_context(temporary_folder("fedshelf-"))))
        credentials = Credentials(address, keys, name=join.client, token=token, ca=ca, insecure=insecure)
        was_connected = False
        while not stop.is_set():
            if not availability.is_open():
                waiting.end()
            patience.since += availability.wait(stop, on_status)
            if stop.is_set():
                break
            waiting.begin(f"the server at {address}", otherwise=SILENCE_ADVICE)
            authority = local_authority() if ca is None and not insecure else ""
            try:
                # Created for each attempt: a server on this machine may just have created its certificate authority.
                session = patience.bound(partial(FleetSession, credentials, held), afterwards=_leave)
                credentials.accepted()
                was_connected = True
                retries.say(f"connected to {address}")
                if problem := clock_problem("this machine's", session.clock_ahead, "the server's"):
                    on_status(f"WARNING: {problem}")
                target = ReportTarget(
                    address=str(address), ca=None if credentials.trusted is None else str(credentials.trusted),
                    insecure=insecure, token=session.crash_token, chain=session.recipient.chain,
                    ledger=None if ledger is None else str(ledger.path.parent),
                )  # fmt: skip
                registration = Registration(
                    session, part, stop, availability, on_send, on_answer, waiting, patience, ledger
                )  # fmt: skip
                with reporter.reporting_to(target) if reporter else contextlib.nullcontext():
                    ended = registration.run()
                if ended is not None and ended.kind is not EndKind.REFUSED_FOR_NOW:
                    return ended
            except (ServerUnavailableError, SessionLostError) as error:
                patience.check(error)
                retries.say(f"{error}; trying again")
                waiting.begin(f"the server at {address}", str(error))
                retries.pause(patience.left())
            except (IdentityError, CertificateRejectedError) as error:
                if not credentials.start_over(error):
                    raise
                on_status(f"{error}; enrolling again")
            except (RosterError, DamagedLogError):
                raise
            except RunError as error:  # this machine's fault, not the server's
                waiting.end()
                retries.say(f"{str(error).removesuffix('.')}. This client tries again every {FILE_PAUSE:g} s")
                stop.wait(FILE_PAUSE)
                patience.since = time.monotonic()
            except FedShelfError as error:
                if not insecure and ca is None and local_authority() != authority:
                    on_status("a server on this machine has just made its certificate authority; trying again")
                elif isinstance(error, UsageError) and not was_connected:
                    raise
                else:  # the server, the network or this machine has changed, and may change again
                    patience.check(error)
                    retries.say(f"{error}; trying again")
                    waiting.begin(f"the server at {address}", str(error))
                    retries.pause(patience.left())
            else:
                if ended is not None:
                    waiting.end()
                    retries.refused(ended.reason)
                    patience.since = time.monotonic()
                    continue
                if registration.lost:
                    patience.check(registration.lost)
                if registration.num_answered:
                    retries.start_over()
                if availability.is_open() and not stop.is_set():
                    retries.say(f"the connection to {address} was lost ({registration.lost}); joining again")
                    retries.pause(patience.left())
    return Ended(kind=EndKind.STOPPED, reason="stopped")


def _leave(late: "futures.Future[FleetSession]") -> None:
    """Leave a session that nobody waited for."""
    if late.exception() is None:
        late.result().leave()
