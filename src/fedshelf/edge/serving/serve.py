"""`fedshelf edge serve` and `fedshelf-edge serve`: from their flags to a running server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fedshelf.config.places import absolute
from fedshelf.core.errors import ModelError, UsageError
from fedshelf.core.text import counted

if TYPE_CHECKING:  # imported when they are needed, so that a wrong flag is an error at once
    from fedshelf.edge.serving.corrections import Corrections
    from fedshelf.edge.serving.local_head import LocalHead
    from fedshelf.edge.serving.server import Token
    from fedshelf.edge.serving.session import Session

DEFAULT_HOST, DEFAULT_PORT, DEFAULT_DAILY_CAP = "127.0.0.1", 8765, 200
_LIBRARIES = ("onnxruntime", "starlette", "uvicorn", "httptools", "python_multipart")


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """What is served, and how.

    Attributes:
        model: the model file.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        data_dir: the store's photo folder; None: no corrections are taken.
        token_file: file with the token; None: see `Token.find`.
        allow_host: further names of the server.
        tls_cert: TLS certificate with its chain; None: no TLS.
        tls_key: its key.
        daily_cap: corrections of a day that are trained on without a review.
        threads: processor threads for a photo; 0 leaves it to ONNX Runtime.
        in_browser: whether browsers run the model themselves.
    """

    model: Path
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    data_dir: Path | None = None
    token_file: Path | None = None
    allow_host: Sequence[str] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    daily_cap: int = DEFAULT_DAILY_CAP
    threads: int = 0
    in_browser: bool = False


def serve(serving: Serving, *, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        serving: what, and how.
        say: prints a line.

    Raises:
        UsageError: a library is missing, or an address, a file or a folder cannot be used.
        ModelError: the model file cannot be used.
        DataError: the photo folder cannot be used.
    """
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise UsageError(f"'fedshelf edge serve' needs {', '.join(missing)}: pip install 'fedshelf[edge]'")
    from fedshelf.edge.serving.malloc import keep_memory_small

    keep_memory_small()
    from fedshelf.edge.serving.browser_model import BrowserModel
    from fedshelf.edge.serving.corrections import Corrections
    from fedshelf.edge.serving.guard import Access
    from fedshelf.edge.serving.http_api import make_app
    from fedshelf.edge.serving.server import Address, Token, run
    from fedshelf.edge.serving.session import Session

    address = Address(host=serving.host, port=serving.port, certificate=serving.tls_cert, key=serving.tls_key)
    token = Token.find(serving.host, serving.token_file)
    with address.listen() as listener:
        model = absolute(serving.model)
        in_browser = BrowserModel.open(model) if serving.in_browser else None
        session = Session.open(model, num_threads=serving.threads)
        info = session.info
        session.check()
        filed, local_head, said = None, None, ""
        if serving.data_dir is not None:
            filed = Corrections(
                absolute(serving.data_dir), labels=info.labels, paths=info.paths, daily_cap=serving.daily_cap
            )
            if session.has_features:
                local_head, said = _local_head(model, session, filed, in_browser=serving.in_browser)
        url = address.url(listener)

        def on_start() -> None:
            say(f"Serving {counted(len(info.labels), 'product')} at {url}")
            if said:
                say(said)
            _say_token(token, url, has_tls=serving.tls_cert is not None, say=say)

        access = Access.of(serving.host, token=token.text, names=serving.allow_host)
        app = make_app(
            session, access=access, corrections=filed, local_head=local_head, in_browser=in_browser
        )  # fmt: skip
        run(app, address, listener, on_start=on_start)


def _local_head(
    model: Path, session: "Session", corrections: "Corrections", *, in_browser: bool
) -> "tuple[LocalHead | None, str]":
    """What learns from corrections at once, and a sentence about it; None if the next model is the first to learn."""
    from fedshelf.app.trained_photos import trained_on
    from fedshelf.edge.serving.local_head import ExactHead, LocalHead, head_file_of

    file = head_file_of(model)
    if in_browser:
        return None, "With --in-browser, corrections change the answers with the next model."
    try:
        head = ExactHead.read(file, session)
    except ModelError as error:
        return None, f"Corrections change the answers with the next model: {error}"
    found = LocalHead(session, head, corrections, trained_on(corrections.data_dir))
    number = counted(len(found.refresh()), "correction")
    return found, f"Corrections change the answers at once: {number} so far that the model does not contain."


def _say_token(token: "Token", url: str, *, has_tls: bool, say: Callable[[str], None]) -> None:
    if token.is_new:
        say(f"Open this link on the other device. It is shown once: {url}#token={token.text}")
    if token.text:
        say(f"The token is in {token.source}.")
    if token.text and not has_tls:
        say("Without --tls-cert, photos and the token cross the network unencrypted, and browsers on other devices "
            "offer no live camera.")  # fmt: skip
