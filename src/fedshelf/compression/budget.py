"""The best codec for a number of bytes: bits spent where they cost the least error, one vector at a time.

    1  candidates <- dense chains that may fit, and topk chains that fill the budget (the ladder)
    2  each: error and size on a sample of the vector
    3  in the order of error: encode the whole vector; of the first three that really fit, the one of least error

Source: no paper's algorithm; rate against distortion (Shannon 1959, "Coding Theorems for a Discrete Source With a
Fidelity Criterion"), settled by trial over some twenty candidates.

Vectors of up to 2^18 values are tried whole, so that no candidate that fits has less error than the chosen one. Of
longer ones a sample is tried first, 256 stretches at places drawn by the seed: there, another candidate may be a
little better. The budget is kept exactly, always.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fedshelf.compression.chain import Chain, checked, decode, parse
from fedshelf.compression.stage import CHUNK
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import FedShelfError, UsageError
from fedshelf.core.rng import Rng

DENSE = ("none", "zstd", "bf16", "bf16+zstd", "fp16", "fp16+zstd", "int8", "int8+zstd", "int4", "int4+zstd", "drive")
SPARSE = ("", "+int8", "+int8+zstd", "+int4", "+int4+zstd", "+drive")
"""What follows ``topk:F``."""
_ZSTD_ROOM = (1.0, 1.06, 1.12, 1.18, 1.25)
"""How many times the budget a topk chain may take before zstd, which may bring it back: steps worth trying."""
_SAMPLE, _STRETCHES, _FINALISTS = 1 << 18, 256, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """How a chain did on the sample."""

    chain: Chain
    squared_error: float
    num_bytes: int


def ladder(size: int, max_bytes: int, *, error_feedback: bool = True) -> list[Chain]:
    """The chains worth trying for `size` values in `max_bytes`.

    Chains without zstd fit for certain. Those with zstd fit if the vector compresses; topk chains come with several
    fractions for that reason. Without `error_feedback` (central DP, say) chains that need it are left out.
    """
    chains = []
    for text in DENSE:
        chain = parse(text)
        if chain.num_bytes(size) <= max_bytes * (_ZSTD_ROOM[-1] if chain.lossless else 1):
            chains.append(chain)
    if error_feedback:
        for tail in SPARSE:
            for room in _ZSTD_ROOM if tail.endswith("+zstd") else _ZSTD_ROOM[:1]:
                chains += _filled(tail, size, int(max_bytes * room))
    return list(dict.fromkeys(chains))


def admits(chain: Chain, *, error_feedback: bool = True) -> bool:
    """Whether `fit` could have chosen `chain`, for some vector and budget: what a receiver allows in a run with one."""
    text = str(chain)
    if text in DENSE:
        return True
    head, plus, tail = text.partition("+")
    return error_feedback and head.startswith("topk:") and plus + tail in SPARSE


def least_bytes(size: int, *, error_feedback: bool = True) -> int:
    """The bytes with which some chain of the ladder fits for certain."""
    texts = [text for text in DENSE if not text.endswith("zstd")]
    if error_feedback and size:
        texts += [f"topk:{1 / size!r}{tail}" for tail in SPARSE]
    return min(parse(text).num_bytes(size) for text in texts)


def fit(vector: Tensor, *, max_bytes: int, seed: int, error_feedback: bool = True) -> Encoded:
    """Encode `vector` [n] in at most `max_bytes`, with as little squared error as the ladder allows.

    Args:
        vector: float32, on the CPU, finite.
        max_bytes: for all parts together.
        seed: as in `Chain.encode`; it also draws the sample.
        error_feedback: whether the caller keeps a memory; without it only chains are tried that do without.

    Returns:
        The vector under the chain that was chosen: `Encoded.codec` names it.

    Raises:
        UsageError: nothing fits; names the least bytes with which something does.
        FedShelfError: values that are not finite, or too large for every chain.
    """
    checked(vector, exact=True)
    size = vector.numel()
    sample = _sample(vector, Rng(seed).fork(purpose="budget").seed)
    trials = _trials(sample, size, max_bytes, seed, ladder(size, max_bytes, error_feedback=error_feedback))
    finalists = islice(_fitting(vector, trials, max_bytes, seed), 1 if sample is vector else _FINALISTS)
    best = min(finalists, key=lambda encoded: _squared_error(encoded, vector), default=None)
    if best is None:
        least = least_bytes(size, error_feedback=error_feedback)
        raise UsageError(
            f"{size:,} values do not fit into {max_bytes:,} bytes: the byte budget has to be at least {least:,} "
            f"({least / 1e6:.3g} MB)" + ("" if error_feedback else ", since this run has no error feedback")
        )
    return best


def _fitting(vector: Tensor, trials: list[_Trial], max_bytes: int, seed: int) -> Iterator[Encoded]:
    """The whole vector under the chains of `trials`, the most promising first, where that really fits."""
    failure, found = None, False
    for trial in sorted(trials, key=lambda trial: (trial.squared_error, trial.num_bytes)):
        try:
            encoded = trial.chain.encode(vector, seed=seed)
        except FedShelfError as error:  # beyond what this codec holds: float16, say
            failure = error
            continue
        if encoded.num_bytes <= max_bytes:
            found = True
            yield encoded
    if failure is not None and not found:
        raise failure


def _trials(sample: Tensor, size: int, max_bytes: int, seed: int, chains: list[Chain]) -> list[_Trial]:
    """Every chain that can encode the sample and, to judge by it, fits or nearly fits."""
    trials = []
    for chain in chains:
        try:
            encoded = chain.encode(sample, seed=seed)
        except FedShelfError:
            trials.append(_Trial(chain=chain, squared_error=np.inf, num_bytes=chain.num_bytes(size)))
            continue  # it comes last, where it fails again and tells why
        predicted = chain.num_bytes(size)
        if chain.lossless is not None and sample.numel():
            predicted = int(predicted * encoded.num_bytes / chain.num_bytes(sample.numel()))
        if predicted <= max_bytes * 1.01:  # a sample may err; the whole vector decides
            error = _squared_error(encoded, sample)
            trials.append(_Trial(chain=chain, squared_error=error, num_bytes=predicted))
    return trials


def _squared_error(encoded: Encoded, vector: Tensor) -> float:
    difference = (decode(encoded) - vector).numpy()
    return sum(
        float(np.square(difference[start : start + CHUNK], dtype=np.float64).sum())
        for start in range(0, difference.size, CHUNK)
    )


def _sample(vector: Tensor, seed: int) -> Tensor:
    """The vector, or 256 stretches of it at random places: long enough for blocks, many enough for layers."""
    if vector.numel() <= _SAMPLE:
        return vector
    length = _SAMPLE // _STRETCHES
    bounds = np.arange(_STRETCHES + 1, dtype=np.int64) * vector.numel() // _STRETCHES
    room = np.diff(bounds) - length + 1
    starts = bounds[:-1] + (np.random.SFC64(seed).random_raw(_STRETCHES) % room.astype(np.uint64)).astype(np.int64)
    return torch.cat([vector[start : start + length] for start in starts.tolist()])


def _filled(tail: str, size: int, max_bytes: int) -> list[Chain]:
    """The topk chain with `tail` that keeps as many values as `max_bytes` hold; none if not even one fits."""

    def chain(count: int) -> Chain:
        return parse(f"topk:{float(f'{count / size:.6g}')!r}{tail}")  # six digits: the text travels, too

    low, high = 0, size  # the last count that fits, and the last that may
    while low < high:
        middle = (low + high + 1) // 2
        if chain(middle).num_bytes(size) <= max_bytes:
            low = middle
        else:
            high = middle - 1
    return [chain(low)] if low else []
