"""The `fedshelf client` command."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedshelf.cli.display import stop_on_signals
from fedshelf.cli.options import with_options
from fedshelf.config.schema import ClientConfig
from fedshelf.core.errors import RunError, TransportError, UsageError
from fedshelf.core.text import counted, printable
from fedshelf.reporting.formatting import duration, number, size
from fedshelf.reporting.gain_report import figures

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.core.messages import Comparison
    from fedshelf.deploy.client_part import Ended
    from fedshelf.deploy.records import WireMessage
    from fedshelf.identity.tokens import Token


@with_options(ClientConfig, "client")
def client(*, config: ClientConfig) -> None:
    """Take part as one store, with the photos of a folder.

    The client trains whenever the server asks, and reconnects by itself. Photos never leave the store.

    Example: fedshelf client --data-dir ./local_data --server-address 192.168.1.100:8080 --token fedshelf1.eyJh…
    """
    from fedshelf.app.client import ClientPlace, StoreClient, join_of
    from fedshelf.core.messages import RUN_FINISHED
    from fedshelf.deploy.client_loop import run_client
    from fedshelf.deploy.client_part import EndKind
    from fedshelf.deploy.crash_reporter import CrashReporter
    from fedshelf.deploy.waiting import Availability
    from fedshelf.identity.store_keys import StoreKeys
    from fedshelf.models.own_model import use_model_path
    from fedshelf.privacy import policy as policies
    from fedshelf.scheduling.active_hours import active_hours

    if config.data_dir is None:
        raise UsageError("--data-dir is missing: the folder of the store's photos, with one folder per product")
    token = read_token(config.token, config.token_file)
    name = config.name or (token.name if token else "") or None
    if token and token.name and name != token.name:
        raise UsageError(f"--name {name}: the token is for the store '{token.name}'; leave --name out")
    hours = active_hours(config.active_hours, config.time_zone)
    place = ClientPlace.of(
        config.data_dir, name=name, state_dir=config.state_dir, device=config.device, test_dir=config.test_dir,
        withdraw=config.withdraw,
    )  # fmt: skip

    def say(text: str) -> None:
        typer.echo(printable(f"{place.name}: {text}"), err=True)

    def tell(answer: "WireMessage", num_bytes: int) -> None:
        if sentence := _describe_answer(answer, num_bytes):
            say(sentence)

    policy = policies.load(config.policy).allowing(config.allow_model)
    use_model_path(config.model_path)
    store = StoreClient(place, policy=policy, on_choice=lambda found, folder: say(_kept(found)))
    if policy.limits == policies.OPEN.limits:
        typer.echo("WARNING: --policy open: the server may ask for anything, a single photo's gradient too.", err=True)
    if config.insecure:
        typer.echo("WARNING: --insecure: without TLS anyone on the line can read and change what is sent.", err=True)
    with stop_on_signals() as stop, place.lock(), CrashReporter(place.name) as reporter:
        ended = run_client(
            config.server_address,
            store.handle,
            join_of(place),
            keys=StoreKeys(place.state_dir / "keys"),
            token=token,
            ca=config.ca,
            insecure=config.insecure,
            stop=stop,
            on_status=say,
            on_answer=tell,
            max_wait=config.max_wait,
            availability=Availability(hours),
            reporter=reporter,
            max_download=lambda: store.max_download,
            find_blob=store.find_blob,
        )
        folder = store.keep_model() if ended.reason == RUN_FINISHED and not config.withdraw else None
    if config.withdraw:
        _withdrawn(ended, say)
        return
    if ended.kind is EndKind.REFUSED:
        raise TransportError(f"the server does not want this client: {ended.reason}")
    if ended.kind is EndKind.CLOSED and ended.reason != RUN_FINISHED:
        raise RunError(f"the server has ended the run: {ended.reason}")
    say(ended.reason)
    if ended.reason == RUN_FINISHED and not store.took_part:
        say(
            "it took part in no round since it was started: none began after it had joined, or it was not drawn"
            + ("; there is no model here, the run's folder on the server has one" if folder is None else "")
        )
    if folder is not None:
        say(f"its model is in {folder}; to name the product on a photo:")
        typer.echo(f"  fedshelf predict PHOTO --run {shlex.quote(str(folder))}", err=True)


def _withdrawn(ended: "Ended", say: Callable[[str], None]) -> None:
    """Report how the client's withdrawal ended.

    Raises:
        TransportError: the server does not let it withdraw.
        RunError: the server has not confirmed it.
    """
    from fedshelf.core.messages import WITHDRAWN
    from fedshelf.deploy.client_part import EndKind

    if ended.kind is not EndKind.REFUSED:
        raise RunError(
            f"{ended.reason}, and the server has not confirmed that this store is withdrawn: start its run again with "
            "'fedshelf server --extend', and this command"
        )
    if not ended.reason.startswith(WITHDRAWN):
        raise TransportError(f"the server does not let this store withdraw: {ended.reason}")
    say(ended.reason)


def read_token(text: str | None, file: Path | None) -> "Token | None":
    """Read the token that admits this store.

    Args:
        text: the token; "-" reads it from standard input; None takes it from the environment.
        file: a file that holds it.

    Returns:
        The token, or None if there is none.

    Raises:
        UsageError: both are given.
        IdentityError: it is not a whole token.
        RunError: the file cannot be read.
    """
    from fedshelf.core.errors import UsageError
    from fedshelf.identity.tokens import Token
    from fedshelf.storage.atomic_files import saying_what_to_do

    if file is not None:
        if text is not None:
            raise UsageError("give --token or --token-file, not both")
        with saying_what_to_do("read", file):
            text = file.read_text(encoding="utf-8", errors="replace")
    elif text == "-":
        text = sys.stdin.readline()
    found = text or os.environ.get("FEDSHELF_TOKEN")
    return Token.parse(found) if found else None


def _describe_answer(answer: "WireMessage", num_bytes: int) -> str:
    """Describe this client's part in a round; empty if there is nothing to report."""
    from fedshelf.core.messages import Failure, Upload

    match answer:
        case Upload():
            loss = "" if answer.train_loss is None else f"loss {number(answer.train_loss)}, "
            return (
                f"round {answer.key.round}: {counted(answer.num_examples, 'photo')}, {loss}sent {size(num_bytes)}, "
                f"{duration(answer.seconds)}"
            )
        case Failure(key=key) if key is not None:  # the server refuses a client that fails to set up, and it says so
            return f"round {key.round} {'refused' if answer.refused else 'failed'}: {answer.reason}"
    return ""


def _kept(comparison: "Comparison") -> str:
    """Describe which model the store keeps and why."""

    photos = "test photos" if comparison.on_test else "validation photos"
    return f"keeps the {comparison.best.value} model{figures(comparison.accuracies)}, judged on its {photos}"
