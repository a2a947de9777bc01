"""Choice of the codec with the least error for a number of bytes, one vector at a time.

    1  candidates <- dense chains that may fit, and topk chains that fill the budget (the ladder)
    2  each: error and size on a sample of the vector
    3  in the order of error: encode the whole vector; of the first three that really fit, the one of least error

Source: no paper's algorithm; rate-distortion trade-off (Shannon 1959, "Coding Theorems for a Discrete Source With a
Fidelity Criterion"), by trial of about twenty candidates.

For vectors of up to 2^18 values, all candidates encode the whole vector, so the choice is optimal among them. For
longer ones, candidates are ranked on a sample of 256 stretches at random places, so another candidate may be slightly
better. The budget is always kept exactly.
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
"""Suffixes of ``topk:F``."""
_ZSTD_ROOM = (1.0, 1.06, 1.12, 1.18, 1.25)
"""Factors on the budget of a topk chain before zstd, which may compress it back into the budget."""
_SAMPLE, _STRETCHES, _FINALISTS = 1 << 18, 256, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """A chain's result on the sample."""

    chain: Chain
    squared_error: float
    num_bytes: int


def ladder(size: int, max_bytes: int, *, error_feedback: bool = True) -> list[Chain]:
    """The candidate chains for `size` values in `max_bytes`.

    Chains without zstd always fit. Those with zstd fit if the vector compresses well; topk chains therefore come with
    several fractions.

    Args:
        size: number of values.
        max_bytes: the budget.
        error_feedback: False excludes chains that need it (for central DP, for example).
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
    """Whether `fit` could have chosen `chain` for some vector and budget; receivers use this to validate codecs."""
    text = str(chain)
    if text in DENSE:
        return True
    head, plus, tail = text.partition("+")
    return error_feedback and head.startswith("topk:") and plus + tail in SPARSE


def least_bytes(size: int, *, error_feedback: bool = True) -> int:
    """The smallest budget that some chain of the ladder is guaranteed to fit."""
    texts = [text for text in DENSE if not text.endswith("zstd")]
    if error_feedback and size:
        texts += [f"topk:{1 / size!r}{tail}" for tail in SPARSE]
    return min(parse(text).num_bytes(size) for text in texts)


def fit(vector: Tensor, *, max_bytes: int, seed: int, error_feedback: bool = True) -> Encoded:
    """Encode `vector` [n] in at most `max_bytes`, with the least squared error among the candidates.

    Args:
        vector: float32, on the CPU, finite.
        max_bytes: for all parts together.
        seed: see `Chain.encode`; also draws the sample.
        error_feedback: whether the caller applies error feedback; otherwise chains that need it are excluded.

    Returns:
        The encoded vector; `Encoded.codec` names the chosen chain.

    Raises:
        UsageError: nothing fits; the message has the smallest sufficient budget.
        FedShelfError: values are not finite, or too large for every chain.
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
    """Yield the whole vector under the chains of `trials`, the most promising first, if it fits."""
    failure, found = None, False
    for trial in sorted(trials, key=lambda trial: (trial.squared_error, trial.num_bytes)):
        try:
            encoded = trial.chain.encode(vector, seed=seed)
        except FedShelfError as error:  # values exceed this codec's range, such as float16's
            failure = error
            continue
        if encoded.num_bytes <= max_bytes:
            found = True
            yield encoded
    if failure is not None and not found:
        raise failure


def _trials(sample: Tensor, size: int, max_bytes: int, seed: int, chains: list[Chain]) -> list[_Trial]:
    """Try every chain that can encode the sample and fits, or nearly fits, judging by the sample."""
    trials = []
    for chain in chains:
        try:
            encoded = chain.encode(sample, seed=seed)
        except FedShelfError:
            trials.append(_Trial(chain=chain, squared_error=np.inf, num_bytes=chain.num_bytes(size)))
            continue  # tried last, where it fails again and reports the reason
        predicted = chain.num_bytes(size)
        if chain.lossless is not None and sample.numel():
            predicted = int(predicted * encoded.num_bytes / chain.num_bytes(sample.numel()))
        if predicted <= max_bytes * 1.01:  # a sample may be off; the whole vector decides
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
    """The vector, or 256 stretches of it at random places: long enough for blocks, numerous enough for layers."""
    if vector.numel() <= _SAMPLE:
        return vector
    length = _SAMPLE // _STRETCHES
    bounds = np.arange(_STRETCHES + 1, dtype=np.int64) * vector.numel() // _STRETCHES
    room = np.diff(bounds) - length + 1
    starts = bounds[:-1] + (np.random.SFC64(seed).random_raw(_STRETCHES) % room.astype(np.uint64)).astype(np.int64)
    return torch.cat([vector[start : start + length] for start in starts.tolist()])


def _filled(tail: str, size: int, max_bytes: int) -> list[Chain]:
    """The topk chain with `tail` that keeps as many values as fit in `max_bytes`; empty if not even one fits."""

    def chain(count: int) -> Chain:
        return parse(f"topk:{float(f'{count / size:.6g}')!r}{tail}")  # six digits, because the text is sent, too

    low, high = 0, size  # the last count that fits, and the last that may fit
    while low < high:
        middle = (low + high + 1) // 2
        if chain(middle).num_bytes(size) <= max_bytes:
            low = middle
        else:
            high = middle - 1
    return [chain(low)] if low else []
