"""Bytes of a hostile peer are refused before SEAL sees them, or are ciphertexts like any other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.core.errors import RefusedError
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.parameters import COEFFICIENT_BYTES, PARAMETERS
from tests.unit.privacy.homomorphic.stores import bfv_keys, codes, decrypted, encrypted, equal

PACKING = Packing(sizes=((32, 100),), summands=8)
PRIME = PARAMETERS.primes[0]
SHAPE = (1, PARAMETERS.ciphertext_bytes)


@pytest.mark.parametrize(
    "shape", [(0,), (1, 0), (0, 49_152), (2, 49_152), (1, 49_151), (1, 49_153), (49_152,), (1, 1, 49_152)]
)
def test_an_upload_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    total = EncryptedSum(packing=PACKING)
    with pytest.raises(RefusedError, match="instead of uint8"):
        total.add("a", np.zeros(shape, np.uint8))
    with pytest.raises(RefusedError, match="instead of uint8"):
        total.add("a", np.zeros(SHAPE, np.int8))
    assert not total.weights


@pytest.mark.parametrize("coefficient", [PRIME, PRIME + 1, 2**48 - 1])
@pytest.mark.parametrize("place", [0, 4095, 8191])
def test_a_coefficient_that_is_not_reduced_is_refused_and_the_sum_stays(coefficient: int, place: int) -> None:
    packing = Packing(sizes=((32, 100), (64, 10)), summands=8)
    total = EncryptedSum(packing=packing)
    total.add("a", encrypted(packing, codes(packing, 0), bfv_keys()))
    before, wrong = total.total(), encrypted(packing, codes(packing, 1), bfv_keys())
    start = place * COEFFICIENT_BYTES
    wrong[1, start : start + COEFFICIENT_BYTES] = np.frombuffer(coefficient.to_bytes(6, "little"), np.uint8)
    with pytest.raises(RefusedError, match="not reduced"):
        total.add("b", wrong)
    assert np.array_equal(total.total(), before)
    assert list(total.weights) == ["a"]


@settings(max_examples=150)
@given(
    edits=st.lists(st.tuples(st.integers(0, SHAPE[1] - 1), st.integers(0, 255)), max_size=30),
    fill=st.sampled_from([None, 0, 1, 127, 254]),
)
def test_fuzzed_bytes_are_refused_or_decrypt_to_something(edits: list[tuple[int, int]], fill: int | None) -> None:
    plain = codes(PACKING, 0)
    vector = encrypted(PACKING, plain, bfv_keys()) if fill is None else np.full(SHAPE, fill, np.uint8)
    original = vector.copy()
    for place, value in edits:
        vector[0, place] = value
    try:
        found = decrypted(PACKING, vector, bfv_keys())
    except RefusedError:
        return
    assert [part.shape for part in found] == [(100,)]
    if np.array_equal(vector, original) and fill is None:
        assert equal(found, plain)


def test_random_bytes_are_refused_by_the_server_or_at_decryption() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        numbers = generator.integers(0, PRIME, 2 * PARAMETERS.degree, dtype=np.uint64)
        vector = numbers.view(np.uint8).reshape(-1, 8)[:, :6].reshape(SHAPE)
        EncryptedSum(packing=PACKING).add("a", vector)
        with pytest.raises(RefusedError, match="noise is too large"):
            decrypted(PACKING, vector, bfv_keys())
