"""What is encrypted, and what it costs."""

import numpy as np
import pytest
import torch

from fedshelf.compression.modular import Modular
from fedshelf.compression.upload_grid import UploadGrid
from fedshelf.core.errors import RefusedError, UsageError
from fedshelf.core.messages import DELTA
from fedshelf.core.params import bind
from fedshelf.models.head import head_names
from fedshelf.models.resnet import resnet10
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum
from fedshelf.privacy.homomorphic.cost import UnitCost, estimate, measure
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.scope import Scope
from tests.unit.privacy.homomorphic.stores import added, bfv_keys, decrypted, encrypted, equal

MODEL = resnet10(10, width=4)
LAYOUT = bind(MODEL).layout
HEAD = head_names(MODEL)
GRID = UploadGrid.of(
    Modular(32), LAYOUT, auxiliary={"control": (LAYOUT.num_shared, torch.float32)}, scalars=("weight", "loss")
)


def upload(seed: int) -> tuple[np.ndarray, ...]:
    generator = torch.Generator().manual_seed(seed)
    delta, control = torch.randn(2, LAYOUT.num_shared, generator=generator)
    return GRID.encode({DELTA: delta, "control": control}, {"weight": 3.0, "loss": 0.5}, weight=1.0, seed=seed)


@pytest.mark.parametrize("head", [None, HEAD], ids=["model", "head"])
def test_split_codes_are_joined_again(head: frozenset[str] | None) -> None:
    scope, codes = Scope.of(GRID, LAYOUT, head=head), upload(0)
    assert equal(scope.join(*scope.split(codes)), codes)


def test_all_codes_are_encrypted_by_default() -> None:
    scope = Scope.of(GRID, LAYOUT, head=None)
    assert scope.sizes == GRID.sizes
    assert not any(part.size for part in scope.split(upload(0))[1])


def test_outside_of_the_head_only_the_change_of_other_layers_is_readable() -> None:
    scope = Scope.of(GRID, LAYOUT, head=HEAD)
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(LAYOUT.num_shared, generator=generator)
    others = delta.clone()
    for spec in LAYOUT.tensors:
        if spec.name in HEAD:
            others[spec.offset : spec.offset + spec.size] = 7.0
    seen = []
    for change, control, weight in ((delta, 0.0, 1.0), (others, 5.0, 2.0)):
        vectors = {DELTA: change, "control": torch.full_like(delta, control)}
        codes = GRID.encode(vectors, {"weight": weight, "loss": weight}, weight=1.0, seed=3)
        seen.append(scope.split(codes)[1])
    assert equal(*seen), "neither the head nor an algorithm's vector nor a scalar"
    assert sum(part.size for part in seen[0]) == LAYOUT.num_shared - sum(
        spec.size for spec in LAYOUT.tensors if spec.name in HEAD
    )


def test_a_sum_of_which_the_head_is_encrypted_is_the_plain_sum() -> None:
    scope, uploads = Scope.of(GRID, LAYOUT, head=HEAD), [upload(seed) for seed in range(3)]
    packing = Packing(sizes=scope.sizes, summands=GRID.codec.summands)
    total, clear = EncryptedSum(packing=packing), []
    for number, codes in enumerate(uploads):
        inside, outside = scope.split(codes)
        total.add(str(number), encrypted(packing, inside, bfv_keys()))
        clear.append(outside)
    joined = scope.join(decrypted(packing, total.total(), bfv_keys()), added(clear))
    plain = added(uploads)
    assert equal(joined, plain)
    (vectors, scalars), (others, numbers) = GRID.decode(joined), GRID.decode(plain)
    assert torch.equal(vectors[DELTA], others[DELTA])
    assert scalars == numbers
    assert scalars["weight"] == pytest.approx(9, abs=1e-8)


def test_a_model_that_sends_no_head_is_refused() -> None:
    with pytest.raises(UsageError, match="--he-scope model"):
        Scope.of(GRID, LAYOUT, head=frozenset({"elsewhere.weight"}))


@pytest.mark.parametrize(("bits", "expansion"), [(16, 1.5), (32, 3.0)])
def test_an_upload_has_at_most_four_times_the_bytes_of_float32(bits: int, expansion: float) -> None:
    packing = Packing(sizes=((bits, 2_490_000), (32, 0), (64, 10_000)), summands=64)
    assert packing.upload_bytes / (4 * 2_500_000) == pytest.approx(expansion, rel=0.03)


def test_the_estimate_counts_ciphertexts() -> None:
    packing = Packing(sizes=((32, 4097),), summands=64)
    cost = estimate(packing, 8, UnitCost(encrypt=1.0, add=0.5, decrypt=2.0))
    assert (cost.ciphertexts, cost.bytes_up, cost.bytes_plain) == (2, 2 * 49_152, 4 * 4097)
    assert (cost.encrypt, cost.add, cost.decrypt) == (2.0, 8.0, 4.0)
    assert "2 ciphertexts per upload, 0.1 MB (6.00 × plain); about 2.00 s per store to encrypt" in cost.text
    with pytest.raises(RefusedError, match="noise"):
        estimate(packing, 10**6, UnitCost(encrypt=1.0, add=0.5, decrypt=2.0))


def test_a_measurement_divides_by_the_ciphertexts_that_it_made() -> None:
    ticks = iter([0.0, 4.0, 5.0, 13.0])
    assert measure(lambda: next(ticks), repetitions=4) == UnitCost(encrypt=1.0, add=0.25, decrypt=2.0)
