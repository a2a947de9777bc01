"""A real client process, put together as `fedshelf client` is, that can be told to do something odd.

``python -m tests.odd_client --data-dir D --server-address A --do WHAT@ROUND [--do …] [--record FILE]``

WHAT is one of `ODDITIES` (what the trained upload becomes), `fail-evaluation`, or `hold`, `hold-evaluation`,
`hold-comparison`, `hold-keys`, `hold-shares`, `hold-survivors`, `hold-unmasking`: when such a message arrives, print an
event and wait until the folder given with ``--until`` holds a file named ROUND; with `-answer`, after it was handled
and before the answer is sent. Without ROUND, it is done in every round.

``--join KIND`` (repeatable; see `JOINS`) introduces itself in such ways first, until the server refuses each.
"""

import argparse
import base64
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ConfigRecord

from fedshelf.app.client import StoreClient
from fedshelf.app.client_place import ClientPlace, join_of
from fedshelf.core.class_folder import MAX_CLASSES
from fedshelf.core.messages import (
    Broadcast,
    ClassFolder,
    ClientMessage,
    Failure,
    Join,
    Purpose,
    Ready,
    ServerMessage,
    Setup,
    Upload,
    auxiliary_vectors,
)
from fedshelf.core.stopping import stop_on_signals
from fedshelf.deploy.client_loop import run_client
from fedshelf.deploy.client_part import Ended, EndKind
from fedshelf.deploy.records import Parcel
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.privacy import policy as policies
from fedshelf.serialization.blob import Blob


def _nan(upload: Upload) -> Upload:
    delta = upload.delta.clone()
    delta[3] = float("nan")
    return replace(upload, vectors={**upload.vectors, "delta": delta})


def _fail(upload: Upload) -> ClientMessage:
    raise OSError(28, "No space left on device", "/srv/photos/secret.jpg")


def _destroy(upload: Upload) -> Upload:
    return replace(upload, vectors={**upload.vectors, "delta": torch.full_like(upload.delta, 1e30)})


ODDITIES: Mapping[str, Callable[[Upload], ClientMessage]] = {
    "nan": _nan,
    "wrong-shape": lambda upload: replace(upload, vectors={**upload.vectors, "delta": upload.delta[:-1].clone()}),
    "stale": lambda upload: replace(upload, key=replace(upload.key, round=upload.key.round - 1)),
    "other-run": lambda upload: replace(upload, key=replace(upload.key, run_id="another")),
    "greedy": lambda upload: replace(upload, num_examples=10**12),
    "digits-as-text": lambda upload: replace(upload, num_steps="9" * 400),  # type: ignore[arg-type]
    "destroy": _destroy,
    "no-examples": lambda upload: replace(upload, num_examples=0),
    "infinite-loss": lambda upload: replace(upload, train_loss=float("inf")),
    "huge-auxiliary": lambda upload: replace(
        upload, vectors={**upload.vectors, **auxiliary_vectors({"control": torch.ones(10_000_000)})}
    ),
    "not-an-upload": lambda upload: Ready(
        run_id=upload.key.run_id,
        layout_digest="",
        catalogue_digest="",
        config_digest="",
        num_train=1,
        num_validation=0,
        num_left_out=0,
    ),
    "fail": _fail,
    "long-reason": lambda upload: Failure(key=upload.key, reason="blah " * 1_000_000),
    "truncated": lambda upload: upload,  # see `_truncate`
}


def _classes(*paths: str) -> tuple[ClassFolder, ...]:
    return tuple(ClassFolder(leaf=path.rpartition("/")[2], path=path) for path in paths)


JOINS: Mapping[str, Callable[[], tuple[ClassFolder, ...]]] = {
    "no-classes": tuple,
    "deep": lambda: _classes("/".join("a" * 1500)),
    "many": lambda: _classes(*(f"product-{number}" for number in range(100_000))),
    "long-names": lambda: _classes("x" * 1_900_000),
    "most-that-are-allowed": lambda: _classes(*(f"product-{number}" for number in range(MAX_CLASSES))),
}


HOLDS = {Purpose.TRAIN: "hold", Purpose.EVALUATE: "hold-evaluation", Purpose.COMPARE: "hold-comparison"}


class OddClient:
    """Answers as the real client does, but for what it was told to do otherwise."""

    def __init__(self, client: StoreClient, orders: list[str], until: Path | None) -> None:
        self._client = client
        self.ledger = client.ledger
        parts = [order.partition("@") for order in orders]
        self._orders = {round_: what for what, _, round_ in parts}  # "" stands for every round
        self._until = until
        self.cuts_off = False

    def handle(self, message: ServerMessage) -> ClientMessage:
        if isinstance(message, Setup):
            answer = self._client.handle(message)
            if isinstance(answer, Ready) and "absurd-ready" in self._orders.values():
                answer = replace(answer, num_validation=10**400)
            return answer
        order = self._orders.get(str(message.key.round), self._orders.get("", ""))
        hold = HOLDS[message.purpose] if isinstance(message, Broadcast) else f"hold-{message.stage.value}"
        if order == hold:
            self._hold(message.key.round)
        answer = self._client.handle(message)
        if order == f"{hold}-answer":
            self._hold(message.key.round)
        if not isinstance(message, Broadcast):
            return answer
        if message.purpose is Purpose.EVALUATE and order == "fail-evaluation":
            return Failure(key=message.key, reason="no memory for that")
        if message.purpose is not Purpose.TRAIN or order not in ODDITIES or not isinstance(answer, Upload):
            return answer
        self.cuts_off = order == "truncated"
        return ODDITIES[order](answer)

    def _hold(self, round: int) -> None:
        if self._until is None:
            return
        print(json.dumps({"event": "held", "round": round}), flush=True)
        while not (self._until / str(round)).exists():
            time.sleep(0.02)

    def on_send(self, parcel: Parcel) -> None:
        """Cut the blob off where that was ordered: this is below everything that would notice."""
        if self.cuts_off and parcel.blob.pieces:
            parcel.blob = Blob((memoryview(parcel.blob.join()[:-100]),))
            self.cuts_off = False


def plain(parcel: Parcel) -> dict[str, dict[str, object]]:
    """Records and blob as JSON can hold them: texts and numbers as they are, bytes in base64."""
    told: dict[str, dict[str, object]] = {}
    for name, record in parcel.inline().items():
        if isinstance(record, ConfigRecord):
            told[name] = dict(record)
        else:
            told[name] = {key: {"base64": base64.b64encode(array.data).decode()} for key, array in record.items()}
    return told


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--server-address", required=True)
    parser.add_argument("--do", action="append", default=[])
    parser.add_argument("--until", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--join", action="append", default=[], choices=JOINS)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--test-dir", type=Path)
    parser.add_argument("--policy", default="standard")
    given = parser.parse_args()
    policy = policies.load(given.policy)
    place = ClientPlace.of(given.data_dir, name=None, state_dir=None, device="cpu", test_dir=given.test_dir)

    with place.lock(), stop_on_signals() as stop:
        keys = StoreKeys(place.state_dir / "keys")
        odd = OddClient(StoreClient(place, policy=policy, keys=keys), given.do, given.until)

        def on_send(parcel: Parcel) -> None:
            odd.on_send(parcel)
            if given.record is not None:
                with given.record.open("a") as file:
                    file.write(json.dumps(plain(parcel)) + "\n")

        def run(join: Join, stop: threading.Event, on_status: Callable[[str], None]) -> Ended:
            return run_client(
                given.server_address, odd.handle, join, insecure=given.insecure,
                keys=keys, on_send=on_send, stop=stop, on_status=on_status,
                ledger=odd.ledger,
            )  # fmt: skip

        def tell(text: str) -> None:
            print(text, file=sys.stderr)

        for kind in given.join:
            refused = threading.Event()

            def leave(text: str, kind: str = kind, refused: threading.Event = refused) -> None:
                if "does not let this store take part" in text:
                    print(json.dumps({"event": "refused", "join": kind, "reason": text}), flush=True)
                    refused.set()

            def follow(refused: threading.Event = refused) -> None:
                stop.wait()
                refused.set()

            threading.Thread(target=follow, daemon=True).start()
            run(replace(join_of(place), classes=JOINS[kind]()), refused, leave)
        ended = run(join_of(place, names_classes=policy.metrics.class_names), stop, tell)
    return int(ended.kind is not EndKind.CLOSED)


if __name__ == "__main__":
    sys.exit(main())
