"""*he*: what homomorphic encryption costs a store, the server, and the store that decrypts, without a network.

One process of one thread plays all parts. Seconds are processor time; those of a store are the median over its uploads.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from benchmarks import results
from benchmarks.measure import MeasurementError
from benchmarks.secagg import OpenedSums
from fedshelf.compression.upload_grid import Integers
from fedshelf.core.messages import TaskKey
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.homomorphic.ceremony import KeyContext, KeyHolder, KeyMember
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.store import SumDecryptor, UploadEncryptor
from fedshelf.privacy.secure_aggregation.context import RoundContext

T = TypeVar("T")
SUMMANDS, LIMIT_BYTES = 64, 4.0
WIDE_SHARE = 0.004
"""Share of values with 64 bits (biases, normalization), as in a ResNet."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One round.

    Attributes:
        what: For the table.
        values: Parameters that are encrypted.
        bits: Bits of a weight's integer.
        members: Stores.
        limit: Most seconds to encrypt.
    """

    what: str
    values: int
    bits: int
    members: int
    limit: float


CASES = (
    Case(what="model", values=2_500_000, bits=32, members=8, limit=2.0),
    Case(what="model", values=2_500_000, bits=16, members=8, limit=2.0),
    Case(what="head", values=100_000, bits=32, members=8, limit=0.1),
    Case(what="head", values=100_000, bits=16, members=8, limit=0.1),
    Case(what="head", values=100_000, bits=32, members=50, limit=0.1),
)


def run(case: Case) -> dict[str, float]:
    """Play a round, check its sum, and return its figures.

    Raises:
        MeasurementError: the sum is wrong.
    """
    wide = round(WIDE_SHARE * case.values)
    sizes = ((case.bits, case.values - wide), (32, 0), (64, wide + 4))
    packing = Packing(sizes=sizes, summands=SUMMANDS)
    pairs = {f"store-{number}": KeyPair.generate() for number in range(case.members)}
    public = {name: pair.public for name, pair in pairs.items()}
    context = KeyContext(
        run_id="run", config="c", attempt=0, sizes=sizes, summands=SUMMANDS, holder="store-0", is_shared=False
    )
    of_round = RoundContext(key=TaskKey(run_id="run", round=1, attempt=0), model="m", config="c", sizes=sizes)
    seconds: dict[str, list[float]] = {"keys": [], "encrypt": [], "add": [], "decrypt": []}
    holder = KeyHolder(context, identity=pairs["store-0"], identities=public)
    total, tags, plain = EncryptedSum(packing=packing), [], None
    for number, (name, pair) in enumerate(pairs.items()):

        def receive(name: str = name, pair: KeyPair = pair) -> UploadEncryptor:
            member = KeyMember(name, context, identity=pair, identities=public)
            keys = member.receive(holder.published, holder.wrap(member.request))
            return UploadEncryptor(name, keys, packing, identity=pair)

        encryptor = _timed(seconds["keys"], receive)
        codes = _codes(packing, number)
        upload = _timed(seconds["encrypt"], lambda: encryptor.encrypt(of_round, codes))  # noqa: B023 called at once
        _timed(seconds["add"], lambda: total.add(name, upload.vector))  # noqa: B023 called at once
        tags.append(upload.tag)
        plain = codes if plain is None else tuple(a + b for a, b in zip(plain, codes, strict=True))
    decryptor = SumDecryptor(holder.keys, packing, opened_sums=OpenedSums(), identities=public)
    vector = total.total()
    opened = _timed(seconds["decrypt"], lambda: decryptor.open(of_round, vector, tags))
    if plain is None or not all(np.array_equal(one, other) for one, other in zip(opened, plain, strict=True)):
        raise MeasurementError("the decrypted sum is not the plain sum")
    found = {what: statistics.median(values) for what, values in seconds.items()}
    return {**found, "bytes": vector.nbytes / (4 * case.values)}


def report() -> str:
    """Measure all cases, and return the section of RESULTS.md."""
    run(Case(what="", values=5000, bits=32, members=3, limit=0))
    columns = [
        "encrypted", "parameters", "bits", "stores", "encrypt s", "limit", "bytes up ÷ float32", "limit",
        "add s, each upload", "decrypt s", "keys s",
    ]  # fmt: skip
    rows = []
    for case in CASES:
        found = run(case)
        rows.append(
            [
                case.what, f"{case.values:,}", str(case.bits), str(case.members), f"{found['encrypt']:.3f}",
                _limit(found["encrypt"], case.limit), f"{found['bytes']:.2f}", _limit(found["bytes"], LIMIT_BYTES),
                f"{found['add']:.3f}", f"{found['decrypt']:.3f}", f"{found['keys']:.3f}",
            ]
        )  # fmt: skip
    return (
        f"{results.table(columns, rows)}\n\nBFV with N = 4096, processor time of one thread. *Encrypt* is what a store "
        "does with its integers, tags included, and *decrypt* what the store that decrypts does, its checks included. "
        f"The codec has room for {SUMMANDS} uploads; {WIDE_SHARE:.1%} of the values have 64 bits. *Keys* is a store's "
        "part of the key ceremony, once per run, with the request that the holder answers. Every sum was compared bit "
        "for bit."
    )


def _timed(into: list[float], work: Callable[[], T]) -> T:
    began = time.process_time()
    found = work()
    into.append(time.process_time() - began)
    return found


def _codes(packing: Packing, seed: int) -> tuple[Integers, ...]:
    generator, codes = np.random.default_rng(seed), []
    for bits, size in packing.sizes:
        most = (2 ** (bits - 1) - 1) // packing.summands
        codes.append(
            generator.integers(-most, most, size, endpoint=True).astype(f"<i{bits // 8}").view(f"<u{bits // 8}")
        )
    return tuple(codes)


def _limit(value: float, limit: float) -> str:
    return f"{limit:g}" if value <= limit else f"**{limit:g}**"
