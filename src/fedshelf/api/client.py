"""Taking part as one store from Python: `fedshelf client`, as a function."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedshelf.api.settings import config_of
from fedshelf.app.client import StoreClient
from fedshelf.app.client_place import ClientPlace, join_of
from fedshelf.config.schema import ClientConfig
from fedshelf.core.errors import RunError, TransportError, UsageError
from fedshelf.core.messages import NOTHING_TO_WITHDRAW, RUN_FINISHED, WITHDRAWN, Comparison, Failure, Upload
from fedshelf.core.stopping import stop_on_signals
from fedshelf.core.text import counted, printable
from fedshelf.deploy.allowed_server import check_server
from fedshelf.deploy.client_loop import run_client
from fedshelf.deploy.client_part import Ended, EndKind
from fedshelf.deploy.crash_reporter import CrashReporter
from fedshelf.deploy.records import WireMessage
from fedshelf.deploy.waiting import Availability
from fedshelf.edge.serving.inbox import Inbox
from fedshelf.identity.keys import PublicKey
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.identity.tokens import Token
from fedshelf.models.own_model import use_model_path
from fedshelf.privacy import policy as policies
from fedshelf.reporting.formatting import duration, number, size
from fedshelf.reporting.gain_report import figures
from fedshelf.scheduling.active_hours import active_hours
from fedshelf.storage.atomic_files import translating_os_errors
from fedshelf.training.loop import Run, alone
from fedshelf.training.own_training import LocalTraining, OwnTraining


def join(
    *, config: Path | str | None = None, local_training: LocalTraining | None = None, progress: bool = True,
    **settings: Any,
) -> Path | None:  # fmt: skip
    """Take part as one store, as `fedshelf client` does; return when the run has ended.

    Ctrl-C stops after the current step. The same call takes part again.

    Args:
        config: a TOML file with settings; keyword arguments win.
        local_training: a function that trains the model for one round, instead of FedShelf's training loop (see
            `Federation`). The server does not know of it.
        progress: show this store's part in each round. Warnings are always shown.
        **settings: any flag of `fedshelf client`, such as `data_dir` and `server_address`.

    Returns:
        The folder of the store's model; None if there is none.

    Raises:
        FedShelfError: a setting is invalid, the server refuses this store, or the run failed.
    """
    found = config_of(ClientConfig, "client", settings, file=config)
    threads = torch.get_num_threads()
    try:
        return run_store(
            found, show=partial(print, file=sys.stderr, flush=True), is_quiet=not progress,
            training=alone if local_training is None else OwnTraining(local_training),
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def run_store(
    config: ClientConfig, *, show: Callable[[str], None], training: Run = alone, is_quiet: bool = False
) -> Path | None:  # fmt: skip
    """Take part as one store until the run has ended or a signal stops this client.

    Args:
        config: the client's settings.
        show: shows one line.
        training: trains the model.
        is_quiet: show only warnings.

    Returns:
        The folder of the store's model; None if there is none.

    Raises:
        FedShelfError: a setting is invalid, the server refuses this store, or the run failed.
    """
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
        if not is_quiet:
            show(printable(f"{place.name}: {text}"))

    refusals: list[str] = []

    def report_answer(answer: WireMessage, num_bytes: int) -> None:
        if isinstance(answer, Failure) and answer.refused:
            refusals.append(answer.reason)
        if sentence := _describe_answer(answer, num_bytes):
            say(sentence)

    policy = policies.load(config.policy).allowing(config.allow_model)
    pin = policy.server.roster_key
    keys = StoreKeys(place.state_dir / "keys", pin=PublicKey(pin) if pin else None)
    ca = check_server(
        policy.server, config.server_address, keys=keys, token=token, ca=config.ca, insecure=config.insecure
    )  # fmt: skip
    use_model_path(config.model_path)
    store = StoreClient(
        place, policy=policy, training=training, on_choice=lambda found, folder: say(_kept(found)), keys=keys,
        before_look=Inbox(place.data_dir, say=say).look,
    )  # fmt: skip
    if policy.limits == policies.OPEN.limits:
        show("WARNING: --policy open: the server may ask for anything, a single photo's gradient too.")
    if config.insecure:
        show("WARNING: --insecure: without TLS anyone on the line can read and change what is sent.")
    with stop_on_signals() as stop, place.lock(), CrashReporter(place.name) as reporter:
        ended = run_client(
            config.server_address,
            store.handle,
            join_of(place, names_classes=policy.metrics.class_names),
            keys=keys,
            token=token,
            ca=ca,
            insecure=config.insecure,
            stop=stop,
            on_status=say,
            on_answer=report_answer,
            max_wait=config.max_wait,
            availability=Availability(hours),
            reporter=reporter,
            max_download=lambda: store.max_download,
            find_blob=store.find_blob,
            ledger=store.ledger,
        )
        folder = store.keep_model() if ended.reason == RUN_FINISHED and not config.withdraw else None
    if config.withdraw:
        _report_withdrawal(ended, say)
        return None
    if refusals:
        say(f"it refused {counted(len(refusals), 'request')} of the server, the last one because {refusals[-1]}")
    if ended.kind is EndKind.REFUSED:
        raise TransportError(f"the server does not want this client: {ended.reason}")
    if ended.kind is EndKind.CLOSED and ended.reason != RUN_FINISHED:
        raise RunError(f"the server has ended the run: {ended.reason}")
    say(ended.reason)
    if ended.reason == RUN_FINISHED and not store.took_part:
        why = "it refused what it was asked for" if refusals else "none began after it had joined, or it was not drawn"
        say(
            f"it took part in no round since it was started: {why}"
            + ("; there is no model here, the run's folder on the server has one" if folder is None else "")
        )
    if folder is not None:
        say(f"its model is in {folder}; to name the product on a photo:")
    return folder


def _report_withdrawal(ended: Ended, say: Callable[[str], None]) -> None:
    """Report how the client's withdrawal ended.

    Raises:
        TransportError: the server does not let it withdraw.
        RunError: the server has not confirmed it.
    """
    if ended.kind is not EndKind.REFUSED:
        raise RunError(
            f"{ended.reason}, and the server has not confirmed that this store is withdrawn: start its run again with "
            "'fedshelf server --extend', and this command"
        )
    if not ended.reason.startswith((WITHDRAWN, NOTHING_TO_WITHDRAW)):
        raise TransportError(f"the server does not let this store withdraw: {ended.reason}")
    say(ended.reason)


def read_token(text: str | None, file: Path | None) -> Token | None:
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
    if file is not None:
        if text is not None:
            raise UsageError("give --token or --token-file, not both")
        with translating_os_errors("read", file):
            text = file.read_text(encoding="utf-8", errors="replace")
    elif text == "-":
        text = sys.stdin.readline()
    found = text or os.environ.get("FEDSHELF_TOKEN")
    return Token.parse(found) if found else None


def _describe_answer(answer: WireMessage, num_bytes: int) -> str:
    """Describe this client's part in a round; empty if there is nothing to report."""
    match answer:
        case Upload():
            loss = "" if answer.train_loss is None else f"loss {number(answer.train_loss)}, "
            photos = "" if answer.num_examples is None else f"{counted(answer.num_examples, 'photo')}, "
            took = "" if answer.seconds is None else f", {duration(answer.seconds)}"
            return f"round {answer.key.round}: {photos}{loss}sent {size(num_bytes)}{took}"
        case Failure(key=key) if key is not None:  # the server refuses a client that fails to set up, and it says so
            return f"round {key.round} {'refused' if answer.refused else 'failed'}: {answer.reason}"
    return ""


def _kept(comparison: Comparison) -> str:
    """Describe which model the store keeps and why."""
    photos = "test photos" if comparison.on_test else "validation photos"
    return f"keeps the {comparison.best or 'chosen'} model{figures(comparison.accuracies)}, judged on its {photos}"
