"""The decrypted sum of encrypted uploads is the sum of the plain integers, bit for bit."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.core.errors import RefusedError
from fedshelf.privacy.homomorphic import ciphertexts
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.parameters import PARAMETERS
from tests.unit.privacy.homomorphic.stores import PACKING, added, bfv_keys, codes, decrypted, encrypted, equal


@pytest.mark.parametrize("count", [2, 8, 50])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_sum_is_exact(count: int, bits: int) -> None:
    packing = Packing(sizes=((bits, 5000), (32, 3), (64, 100)), summands=max(count, 3))
    total, plain = EncryptedSum(packing=packing), []
    for number in range(count):
        plain.append(codes(packing, number))
        total.add(f"store-{number}", encrypted(packing, plain[-1], bfv_keys()))
    assert equal(decrypted(packing, total.total(), bfv_keys()), added(plain))


@pytest.mark.parametrize("parity", [0, 1])
def test_a_sum_at_the_limit_of_its_range_is_exact(parity: int) -> None:
    packing = Packing(sizes=((16, 9000), (32, 5000), (64, 1400)), summands=7)
    plain = [codes(packing, 2 * number + parity, at_limit=True) for number in range(7)]
    total = EncryptedSum(packing=packing)
    for number, one in enumerate(plain):
        total.add(str(number), encrypted(packing, one, bfv_keys()))
    assert equal(decrypted(packing, total.total(), bfv_keys()), added(plain))


@settings(max_examples=60)
@given(
    sizes=st.tuples(*(st.tuples(st.just(bits), st.integers(0, 9000)) for bits in (8, 16, 32, 64))),
    summands=st.integers(1, 50_000),
    count=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_sums_of_slots_are_sums_of_codes(
    sizes: tuple[tuple[int, int], ...], summands: int, count: int, seed: int
) -> None:
    packing = Packing(sizes=sizes, summands=summands)
    plain = [codes(packing, seed + number) for number in range(min(count, summands))]
    slots = [list(packing.pack(one)) for one in plain]
    assert all(len(one) == packing.num_ciphertexts for one in slots)
    half = PARAMETERS.plain_modulus // 2
    sums = [(np.add.reduce(each) + half) % PARAMETERS.plain_modulus - half for each in zip(*slots, strict=True)]
    assert equal(packing.unpack(sums), added(plain))


def test_codes_of_64_bits_add_up_modulo_2_to_the_64th() -> None:
    packing = Packing(sizes=((64, 1000),), summands=50_000)
    plain = [(np.random.default_rng(seed).integers(0, 2**64, 1000, np.uint64),) for seed in range(3)]
    sums = [np.add.reduce(each) for each in zip(*(packing.pack(one) for one in plain), strict=True)]
    assert equal(packing.unpack(sums), added(plain))


def test_too_many_uploads_are_refused() -> None:
    packing = Packing(sizes=((32, 10),), summands=2)
    total, upload = EncryptedSum(packing=packing), encrypted(packing, codes(packing, 0), bfv_keys())
    total.add("a", upload)
    with pytest.raises(RefusedError, match="added before"):
        total.add("a", upload)
    total.add("b", upload)
    before = total.total()
    with pytest.raises(RefusedError, match="codec has room for 2"):
        total.add("c", upload)
    assert np.array_equal(total.total(), before)


def test_weights_whose_noise_adds_up_to_too_much_are_refused() -> None:
    packing = Packing(sizes=((32, 10),), summands=50_000)
    packing.check_weights([16] * 200)
    with pytest.raises(RefusedError, match="noise"):
        packing.check_weights([16] * 300)


def test_another_key_cannot_decrypt() -> None:
    vector = encrypted(PACKING, codes(PACKING, 0), bfv_keys(0))
    with pytest.raises(RefusedError, match="another key"):
        decrypted(PACKING, vector, bfv_keys(1))


def test_one_upload_encrypts_differently_each_time() -> None:
    content = codes(PACKING, 0)
    one, other = (encrypted(PACKING, content, bfv_keys()) for _ in range(2))
    assert np.mean(one == other) < 0.01


def test_ciphertexts_look_uniform() -> None:
    packing = Packing(sizes=((32, 40_000),), summands=8)
    vector = encrypted(packing, (np.zeros(40_000, "<u4"),), bfv_keys())
    counts = np.bincount(vector.ravel(), minlength=256)
    expected = vector.size / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 6 * (2 * 255) ** 0.5


def test_the_server_can_do_nothing_but_add() -> None:
    """It has coefficients and no keys: neither those for multiplying or rotating, nor one for decrypting."""
    public = {name for name in vars(EncryptedSum) if not name.startswith("_")}
    assert public == {"add", "total"}
    assert not any("seal" in str(value) for value in vars(ciphertexts).values() if hasattr(value, "__module__"))


def test_memory_stays_within_one_upload_and_the_sum() -> None:
    packing = Packing(sizes=((32, 400_000),), summands=8)
    content = codes(packing, 0)
    encrypted(PACKING, codes(PACKING, 0), bfv_keys())
    tracemalloc.start()
    list(map(len, packing.pack(content)))
    _, slots = tracemalloc.get_traced_memory()
    upload = np.zeros((packing.num_ciphertexts, PARAMETERS.ciphertext_bytes), np.uint8)
    total = EncryptedSum(packing=packing)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    total.add("a", upload)
    _, adding = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert slots < 1e6, "slots of one ciphertext at a time"
    assert adding - before < 1e6, "coefficients of one ciphertext at a time"
