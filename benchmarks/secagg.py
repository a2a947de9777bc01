"""*secagg*: what secure aggregation costs a store and the server, without training and without a network.

One process of one thread plays all members and the server of a round. Seconds are processor time. A member's are the
median over the members; those of the server are for the whole round.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import results
from benchmarks.measure import MeasurementError
from fedshelf.compression.modular import Modular
from fedshelf.compression.upload_grid import Integers, UploadGrid
from fedshelf.core.messages import DELTA, TaskKey
from fedshelf.core.params import bind
from fedshelf.identity.keys import KeyPair
from fedshelf.models.resnet import resnet10
from fedshelf.privacy.secure_aggregation.client import ClientRound
from fedshelf.privacy.secure_aggregation.context import RoundContext
from fedshelf.privacy.secure_aggregation.graph import DEGREE
from fedshelf.privacy.secure_aggregation.server import ServerRecord, ServerRound
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum
from fedshelf.privacy.secure_aggregation.wire import to_text

NUM_CLASSES, WIDTH, SMALL_WIDTH = 81, 45, 4
SCALARS = ("weight", "examples", "steps", "loss")
LIMITS = {8: 0.15, 64: 0.5}
"""Processor seconds of a member by members."""
BYTE_LIMITS = {16: 0.51, 32: 1.01}
"""Bytes sent, as a multiple of those of float32, by bits."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One round.

    Attributes:
        members: Number of members.
        bits: Bits of a weight's integer.
        dropouts: Members that deal shares and send nothing; the server takes out the others' masks with them.
        width: Channels of the network's first layer.
    """

    members: int
    bits: int
    dropouts: int = 0
    width: int = WIDTH


CASES = (
    *(Case(members=members, bits=bits) for members in (8, 50, 64) for bits in (16, 32)),
    Case(members=8, bits=32, dropouts=2), Case(members=64, bits=32, dropouts=6),
    Case(members=1000, bits=16, width=SMALL_WIDTH), Case(members=1000, bits=32, width=SMALL_WIDTH),
    Case(members=1000, bits=32, dropouts=100, width=SMALL_WIDTH),
)  # fmt: skip


class Stopwatch:
    """Processor time by what it was spent on, once for each member."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self._seconds[what].append(time.process_time() - began)

    def total(self, what: str) -> float:
        """The sum of all times."""
        return sum(self._seconds[what])

    def median(self, *what: str) -> float:
        """The sum of the medians."""
        return sum(statistics.median(self._seconds[one]) for one in what)


class OpenedSums(list[OpenedSum]):
    """A store's record of opened sums, in memory."""

    known, record = list[OpenedSum].copy, list[OpenedSum].append


def run(case: Case) -> Mapping[str, float]:
    """Play a round, check its sum, and return its figures.

    Raises:
        MeasurementError: the sum is wrong.
    """
    layout = bind(resnet10(NUM_CLASSES, width=case.width)).layout
    grid = UploadGrid.of(Modular(case.bits, summands=case.members), layout, scalars=SCALARS)
    delta = {DELTA: 0.005 * torch.randn(layout.num_shared, generator=torch.Generator().manual_seed(0))}
    context = RoundContext(key=TaskKey(run_id="run", round=1, attempt=0), model="m", config="c", sizes=grid.sizes)
    keys = {f"store-{number:04d}": KeyPair.generate() for number in range(case.members)}
    public = {name: pair.public for name, pair in keys.items()}
    server, timed = ServerRound(ServerRecord(context=context), identities=public), Stopwatch()
    members, num_bytes = {}, 0
    for name, pair in keys.items():
        with timed("A"):
            members[name] = ClientRound(name, context, opened_sums=OpenedSums(), identity=pair, identities=public)
        with timed("server"):
            server.add_keys(members[name].advertisement)
    with timed("server"):
        roster = server.close_keys()
    for member in members.values():
        with timed("B"):
            dealt = member.deal(roster)
        with timed("server"):
            server.add_shares(dealt)
    server.close_shares()
    plain, total, sending = grid.zeros(), grid.zeros(), list(keys)[case.dropouts :]
    for seed, (name, member) in enumerate(members.items()):
        with timed("server"):
            delivery = server.delivery(name)
        with timed("C"):
            member.receive(delivery)
        if name not in sending:
            continue
        with timed("encode"):
            codes = grid.encode(delta, dict.fromkeys(SCALARS, 1.0), weight=1.0, seed=seed)
        _add(plain, codes)
        with timed("mask"):
            upload = member.mask(codes, context.model)
        with timed("server"):
            server.add_upload(upload)
            _add(total, upload.vectors)
    survivors = server.close_uploads()
    for name in sending:
        with timed("D"):
            signed = members[name].confirm(survivors)
        with timed("server"):
            server.add_signature(signed)
    signatures = server.signatures()
    for name in sending:
        with timed("E"):
            revealed = members[name].reveal(signatures)
        with timed("server"):
            server.add_revealed(revealed)
            server.can_open()
    with timed("open"):
        server.open(total)
    if not all(np.array_equal(one, other) for one, other in zip(total, plain, strict=True)):
        raise MeasurementError("the masked sum is not the plain sum")
    shown = members[name].advertisement
    small = [shown.content(), shown.signature, *dealt.sealed.values(), signed.signature]
    num_bytes = sum(map(len, [*small, *revealed.seeds.values(), *revealed.mask_keys.values()]))
    num_bytes += sum(bits // 8 * size for bits, size in grid.sizes)
    told = (context, roster, delivery, survivors, signatures)
    num_down = 4 * layout.num_shared + sum(len(to_text(one)) for one in told)
    return {
        "values": layout.num_shared, "encode": timed.median("encode"), "mask": timed.median("mask"),
        "exchanges": timed.median("A", "B", "C", "D", "E"), "open": timed.total("open"),
        "server": timed.total("server") + timed.total("open"), "bytes": num_bytes / (4 * layout.num_shared),
        "down": num_down / (4 * layout.num_shared),
    }  # fmt: skip


def _add(total: Sequence[Integers], vectors: Sequence[Integers]) -> None:
    for into, vector in zip(total, vectors, strict=True):
        np.add(into, vector, out=into)


def report() -> str:
    """Measure all cases, and return the section of RESULTS.md."""
    torch.set_num_threads(1)
    columns = [
        "members", "dropouts", "parameters", "bits", "encode s", "mask s", "exchanges s", "a store's CPU s", "limit",
        "bytes up ÷ float32", "limit", "bytes down ÷ float32", "server's CPU s", "of which to open",
    ]  # fmt: skip
    rows = []
    for case in CASES:
        found = run(case)
        client = found["encode"] + found["mask"] + found["exchanges"]
        is_whole = case.width == WIDTH
        rows.append(
            [
                f"{case.members:,}", str(case.dropouts), f"{found['values']:,.0f}", str(case.bits),
                *(f"{found[what]:.3f}" for what in ("encode", "mask", "exchanges")), f"{client:.3f}",
                _limit(client, LIMITS.get(case.members) if is_whole else None), f"{found['bytes']:.3f}",
                _limit(found["bytes"], BYTE_LIMITS[case.bits] if is_whole else None), f"{found['down']:.3f}",
                f"{found['server']:.3f}", f"{found['open']:.3f}",
            ]
        )  # fmt: skip
    return (
        f"{results.table(columns, rows)}\n\nA store's seconds are the median over the members; *encode* is the codec, "
        "which a run without masks with `--codec-up modular:BITS` has, too; *exchanges* are the stages without the "
        "masks, with signatures. The server's seconds are those of a whole round, with the verification of all "
        "signatures and the sum. Bytes up are all that a store sends, but for framing; "
        "bytes down are the model in float32 and the messages of the stages as "
        "text. Dropouts have dealt shares and "
        "send nothing, so that the server takes out the masks that all others share with them. With 1,000 members, "
        f"the graph is a Harary graph of degree {DEGREE}. Every sum was compared bit for bit."
    )


def _limit(value: float, limit: float | None) -> str:
    return "–" if limit is None else f"{limit:g}" if value <= limit else f"**{limit:g}**"
