"""Parameters have the security level of the standard, and room for the noise of the stores that are added."""

import math
import sys

import numpy as np
import pytest

from fedshelf.core.errors import RefusedError, UsageError
from fedshelf.privacy.homomorphic import seal
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.parameters import PARAMETERS, Parameters
from tests.unit.privacy.homomorphic.stores import bfv_keys


def test_the_moduli_are_within_the_standard_for_128_bits() -> None:
    assert math.log2(math.prod(PARAMETERS.primes)) < 96.01 < 109
    from tenseal import sealapi

    assert sealapi.CoeffModulus.MaxBitCount(4096, sealapi.SEC_LEVEL_TYPE.TC128) == 109


def test_seal_uses_exactly_these_primes() -> None:
    from tenseal import sealapi

    found = [prime.value() for prime in sealapi.CoeffModulus.Create(4096, [48, 48])]
    assert tuple(found) == PARAMETERS.primes
    assert sealapi.Modulus(PARAMETERS.plain_modulus).is_prime()


@pytest.mark.parametrize("degree", [1024, 2048])
def test_a_modulus_that_is_too_large_for_its_degree_is_refused(degree: int) -> None:
    with pytest.raises(UsageError, match="less than 128 bits of security"):
        Parameters(degree=degree)


def test_a_degree_outside_the_table_is_refused() -> None:
    with pytest.raises(UsageError, match="not in the table"):
        Parameters(degree=4095)


def test_a_prime_without_batching_or_room_is_refused() -> None:
    with pytest.raises(UsageError, match="1 modulo"):
        Parameters(plain_modulus=4_294_991_873 + 2)
    with pytest.raises(UsageError, match="no room"):
        Parameters(primes=(0xFF_FFFE_E001 - 0xFF_FFFE_E001 % 8192 + 1, 0xFFFF_FFFF_C001))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = bfv_keys()
    monkeypatch.setitem(sys.modules, "tenseal", None)
    seal._tenseal.cache_clear()
    for need in (lambda: seal.Decryptor(PARAMETERS, keys.secret), lambda: seal.Encryptor(PARAMETERS, keys.public)):
        with pytest.raises(UsageError, match=r"pip install 'fedshelf\[he\]'"):
            need()


def test_too_many_stores_are_refused() -> None:
    PARAMETERS.check_members(50_000)
    with pytest.raises(RefusedError, match="noise"):
        PARAMETERS.check_members(PARAMETERS.most_members + 1)
    with pytest.raises(UsageError, match="at most 58,210"):
        Packing(sizes=((32, 1),), summands=100_000)


def test_the_noise_of_a_sum_is_what_the_limit_assumes() -> None:
    """64 stores use 3 bits of the noise budget, as independent errors do; equal errors would use 6."""
    keys, generator = bfv_keys(), np.random.default_rng(0)
    encryptor, prime = seal.Encryptor(PARAMETERS, keys.public), np.uint64(PARAMETERS.primes[0])
    decryptor = seal.Decryptor(PARAMETERS, keys.secret)
    total, plain = np.zeros(2 * PARAMETERS.degree, np.uint64), np.zeros(PARAMETERS.degree, np.int64)
    budgets = []
    for _ in range(64):
        slots = generator.integers(-(2**25), 2**25, PARAMETERS.degree)
        total, plain = (total + encryptor.encrypt(slots)) % prime, plain + slots
        budgets.append(decryptor.noise_budget(total))
    assert budgets[0] >= 8
    assert budgets[0] - budgets[-1] <= 4
    assert np.array_equal(decryptor.decrypt(total), plain)
