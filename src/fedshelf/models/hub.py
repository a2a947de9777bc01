"""The model hub that timm fetches pretrained weights from."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fedshelf.core.system_errors import reason

SECONDS, SECONDS_IN_SILENCE = 10.0, 2.0  # to wait for the hub

logger = logging.getLogger(__name__)


@contextmanager
def asking_hub() -> Iterator[str]:
    """Within this context, a hub that cannot be reached fails at once, instead of after a minute of retries.

    Weights that were fetched before are found all the same.

    Yields:
        Why the hub cannot be reached; empty if it answers.
    """
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each of its many retries
    before = constants.HF_HUB_OFFLINE
    problem = "HF_HUB_OFFLINE is set" if before else problem_with(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = before or bool(problem)
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = before


def problem_with(address: str) -> str:
    """Why the hub at `address` cannot be reached; empty if it answers."""
    found: list[str] = []

    def ask() -> None:
        try:
            urlopen(Request(address, method="HEAD"), timeout=SECONDS).close()  # noqa: S310  the hub's own address
        except HTTPError:  # an answer, too
            found.append("")
        except Exception as error:  # noqa: BLE001  such as a proxy that is none
            while error.__cause__ or error.__context__:
                error = error.__cause__ or error.__context__  # type: ignore[assignment]
            found.append(f"{address}: {reason(error)}")
        else:
            found.append("")

    thread = threading.Thread(target=ask, daemon=True)  # the system's search for a name takes as long as it wants
    thread.start()
    thread.join(SECONDS_IN_SILENCE)
    if thread.is_alive():
        logger.warning("--pretrained: waiting up to %.0f s for %s, where timm's weights are", SECONDS, address)
        thread.join(SECONDS - SECONDS_IN_SILENCE)
    return found[0] if found else f"{address}: no answer within {SECONDS:.0f} s"
