"""The command `fedshelf-edge`, for a till: `fedshelf edge` without PyTorch, and without the memory of its command line.

Flags and output are those of `fedshelf edge`, except that tables have no frames.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedshelf.core.errors import FedShelfError, UsageError
from fedshelf.core.text import counted, printable
from fedshelf.edge.serving.serve import DEFAULT_DAILY_CAP, DEFAULT_HOST, DEFAULT_PORT, Serving, serve

if TYPE_CHECKING:
    from fedshelf.edge.serving.correction_journal import Correction


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the arguments; None uses the process's.

    Raises:
        SystemExit: with the exit code, if it is not 0.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    flags = vars(_parser().parse_args(arguments))
    command: Callable[..., None] = flags.pop("command")
    try:
        command(**flags)
    except FedShelfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fedshelf-edge", description="Recognize products in a store.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_quantize(commands)
    corrections = commands.add_parser("corrections", help="List, take back and review corrections.")
    kinds = corrections.add_subparsers(metavar="COMMAND", required=True)
    for name, command, text in (
        ("list", _list, "List the corrections, and since which round each is trained on."),
        ("undo", _undo, "Take corrections back."),
        ("review", _review, "Show the photos that wait for a person; accept and reject some."),
    ):
        kind = kinds.add_parser(name, help=text, description=text)
        kind.set_defaults(command=command)
        kind.add_argument("data_dir", metavar="DIR", type=Path, help="The store's photo folder.")
        if name == "undo":
            kind.add_argument("ids", metavar="ID", nargs="+", help="Corrections, as 'list' shows them.")
        else:
            kind.add_argument("--json", dest="as_json", action="store_true", help="Print JSON for programs to read.")
        if name == "review":
            kind.add_argument("--accept", metavar="ID", action="append", default=[], help="Train on this photo.")
            kind.add_argument("--reject", metavar="ID", action="append", default=[], help="Delete this photo.")
    return parser


def _add_serve(commands: Any) -> None:
    text = "Serve a model: a page for a phone or a till, and an HTTP API."
    parser = commands.add_parser("serve", help=text, description=text)
    parser.set_defaults(command=_serve)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="A model file from 'fedshelf export'.")
    add("--host", default=DEFAULT_HOST, help="Address to listen on. Others than loopback need a token.")
    add("--port", type=_between(0, 65535), default=DEFAULT_PORT, help="Port to listen on; 0 takes a free one.")
    add("--data-dir", metavar="DIR", type=Path, help="The store's photo folder, for corrections.")
    add("--token-file", metavar="FILE", type=Path, help="File with the token.")
    add("--allow-host", metavar="NAME", action="append", default=[], help="A further name of this server.")
    add("--tls-cert", metavar="FILE", type=Path, help="TLS certificate (PEM, with its chain).")
    add("--tls-key", metavar="FILE", type=Path, help="Key of the TLS certificate (PEM).")
    add("--daily-cap", type=_between(0, sys.maxsize), default=DEFAULT_DAILY_CAP,
        help="Corrections of a day that are trained on without a review.")  # fmt: skip
    add("--threads", type=_between(0, 1024), default=0, help="Processor threads for a photo.")
    add("--in-browser", action="store_true", help="Browsers run the model themselves, also with the network cut.")


def _add_quantize(commands: Any) -> None:
    text = "Make a model file a quarter of its size, in the store. Needs fedshelf-edge[quantize]."
    parser = commands.add_parser("quantize", help=text, description=text)
    parser.set_defaults(command=_quantize)
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="A model file from 'fedshelf export'.")
    add("--data-dir", metavar="DIR", type=Path, required=True, help="The store's photos, one folder per product.")
    add("--out", metavar="FILE", type=Path, required=True, help="The int8 model file to write: NAME.onnx.")
    add("--test-dir", metavar="DIR", type=Path, help="Labeled photos that certify the result.")
    add("--json", dest="as_json", action="store_true", help="Print JSON for programs to read.")


def _between(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not low <= (value := int(text)) <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return number


def _serve(**flags: Any) -> None:
    serve(Serving(**flags), say=_say)


def _quantize(file: Path, data_dir: Path, out: Path, test_dir: Path | None, as_json: bool) -> None:
    try:
        from fedshelf.edge.making.quantize import quantize
    except ImportError as error:
        raise UsageError(
            f"'fedshelf-edge quantize' needs {error.name}: pip install 'fedshelf-edge[quantize]'"
        ) from None
    info, certificate = quantize(file, data_dir, out, test_dir=test_dir)
    record = {"model": str(out), "bytes": out.stat().st_size, "digest": info.digest, **certificate.to_record()}
    if as_json:
        print(json.dumps({**record, "loss": certificate.loss}))
    else:
        _say(f"{out}: {record['bytes']:,} bytes, certified on {counted(certificate.photos, 'photo')}")


def _list(data_dir: Path, as_json: bool) -> None:
    from fedshelf.app.trained_photos import trained_on
    from fedshelf.config.places import absolute
    from fedshelf.edge.serving.corrections import Corrections

    folder = absolute(data_dir)
    found, trained = Corrections(folder, create=False).all(), trained_on(folder)
    _print(found, as_json=as_json)
    if not as_json:
        for line in trained.receipts((c.photo, c.path) for c in found):
            _say(line)


def _undo(data_dir: Path, ids: Sequence[str]) -> None:
    from fedshelf.config.places import absolute
    from fedshelf.edge.serving.corrections import Corrections

    store = Corrections(absolute(data_dir), create=False)
    for name in ids:
        _say(f"Took back {name}, {store.undo(name).product}.")


def _review(data_dir: Path, as_json: bool, accept: Sequence[str], reject: Sequence[str]) -> None:
    from fedshelf.config.places import absolute
    from fedshelf.edge.serving.correction_journal import WAITING
    from fedshelf.edge.serving.corrections import Corrections

    store = Corrections(absolute(data_dir), create=False)
    for name in accept:
        _say(f"Accepted {name}: '{store.accept(name).path}'")
    for name in reject:
        _say(f"Rejected {name}, {store.reject(name).product}.")
    if not accept and not reject:
        _print([found for found in store.all() if found.status in WAITING], as_json=as_json)


def _print(found: "Sequence[Correction]", *, as_json: bool) -> None:
    names = ("id", "time", "product", "status", "path", "photo", "reason", "predicted", "probability")
    if as_json:
        print(json.dumps([{name: getattr(correction, name) for name in names} for correction in found]))
        return
    for correction in found:
        _say("  ".join((correction.id, correction.time[:16], correction.status, correction.product, correction.reason)))
    _say(counted(len(found), "correction"))


def _say(line: str) -> None:
    print(printable(line), flush=True)


if __name__ == "__main__":
    main()
