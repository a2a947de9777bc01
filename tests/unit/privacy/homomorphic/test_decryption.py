"""The store that decrypts decrypts the sum of enough uploads, and nothing else that the server shows it."""

from dataclasses import replace

import numpy as np
import pytest

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import TaskKey
from fedshelf.privacy.homomorphic import sum_check
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum, from_bytes, to_bytes
from fedshelf.privacy.homomorphic.parameters import PARAMETERS
from fedshelf.privacy.homomorphic.sum_check import SealedTag, Tagger
from fedshelf.privacy.secure_aggregation.wire import from_text, to_text
from tests.unit.privacy.homomorphic.stores import (
    PACKING,
    ROUND,
    SHARED,
    Chain,
    added,
    codes,
    encrypted,
    equal,
    identity,
)

NAMES = [f"store-{number}" for number in range(5)]
SECOND = replace(ROUND, key=TaskKey(run_id="run", round=1, attempt=1))
NEXT = replace(ROUND, key=TaskKey(run_id="run", round=2, attempt=0), model="n")


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain(5, SHARED)


@pytest.fixture(autouse=True)
def _no_sums(chain: Chain) -> None:
    chain.opened_sums.clear()


def test_the_decrypted_sum_is_the_plain_sum(chain: Chain) -> None:
    vector, tags = chain.sum_of(NAMES)
    opened = chain.decryptor().open(ROUND, vector, [from_text(to_text(tag), SealedTag) for tag in tags])
    assert equal(opened, added(chain.plain.values()))
    assert equal(chain.decryptor("store-3").open(ROUND, vector, tags), opened), "a repeated request has the same answer"
    assert len(chain.opened_sums) == 1


def test_a_single_upload_is_not_decrypted_whatever_the_server_says_it_is(chain: Chain) -> None:
    _, tags = chain.sum_of(NAMES)
    upload = chain.upload(NAMES[0])
    with pytest.raises(RefusedError, match="minimum is 3"):
        chain.decryptor().open(ROUND, upload.vector, [upload.tag])
    with pytest.raises(RefusedError, match="not the sum of the uploads"):
        chain.decryptor().open(ROUND, upload.vector, tags)


def test_a_multiple_of_an_upload_or_a_sum_without_one_is_not_decrypted(chain: Chain) -> None:
    vector, tags = chain.sum_of(NAMES)
    first, prime = chain.upload(NAMES[0]), PARAMETERS.primes[0]
    thrice = np.stack([to_bytes(from_bytes(row, prime, what="") * np.uint64(3) % prime) for row in first.vector])
    fewer, _ = chain.sum_of(NAMES[:4])
    for number, wrong in enumerate((thrice, fewer)):
        context = replace(ROUND, key=replace(ROUND.key, round=9, attempt=number))
        own = [chain.upload(name, context).tag for name in NAMES]
        with pytest.raises(RefusedError, match="not the sum of the uploads"):
            chain.decryptor().open(context, wrong, own)
    assert equal(chain.decryptor().open(ROUND, vector, tags), added(chain.plain.values()))


def test_codes_that_the_server_adds_are_noticed(chain: Chain) -> None:
    total, tags = EncryptedSum(packing=PACKING), []
    for name in NAMES[:3]:
        upload = chain.upload(name)
        total.add(name, upload.vector)
        tags.append(upload.tag)
    holder = chain.holder.keys
    total.add("server", encrypted(PACKING, codes(PACKING, 99), holder))  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="not the sum of the uploads"):
        chain.decryptor().open(ROUND, total.total(), tags)


def test_a_store_looks_at_one_ciphertext_per_attempt(chain: Chain) -> None:
    """From whether altered ciphertexts decrypt to the same sum, a server could learn the noise, and the key."""
    vector, tags = chain.sum_of(NAMES)
    altered = vector.copy()
    altered[0, :6] = to_bytes((from_bytes(vector[0, :6], PARAMETERS.primes[0], what="") + 1) % PARAMETERS.primes[0])
    chain.decryptor().open(ROUND, vector, tags)
    with pytest.raises(RefusedError, match="a second sum"):
        chain.decryptor().open(ROUND, altered, tags)
    chain.opened_sums.clear()
    with pytest.raises(RefusedError, match="not the sum"):
        chain.decryptor().open(ROUND, chain.sum_of(NAMES[1:])[0], tags)
    with pytest.raises(RefusedError, match="a second sum"):
        chain.decryptor().open(ROUND, vector, tags)


def test_sums_over_one_model_differ_by_the_minimum_cohort(chain: Chain) -> None:
    chain.decryptor().open(ROUND, *chain.sum_of(NAMES))
    with pytest.raises(RefusedError, match="differ by 1 store"):
        chain.decryptor().open(SECOND, *chain.sum_of(NAMES[:4], SECOND))
    chain.decryptor().open(SECOND, *chain.sum_of(NAMES, SECOND))
    chain.decryptor().open(NEXT, *chain.sum_of(NAMES[:4], NEXT))


def test_a_sum_of_two_stores_is_never_decrypted(chain: Chain) -> None:
    with pytest.raises(RefusedError, match="of 2 stores, and this store's minimum is 3"):
        chain.decryptor(min_cohort=1).open(ROUND, *chain.sum_of(NAMES[:2]))


def test_a_store_can_ask_for_a_larger_cohort(chain: Chain) -> None:
    with pytest.raises(RefusedError, match="of 4 stores, and this store's minimum is 5"):
        chain.decryptor(min_cohort=5).open(ROUND, *chain.sum_of(NAMES[:4]))


@pytest.mark.parametrize("context", [SECOND, NEXT, replace(ROUND, config="d"), replace(ROUND, model="n")])
def test_uploads_of_another_round_are_not_decrypted(chain: Chain, context: object) -> None:
    vector, tags = chain.sum_of(NAMES)
    with pytest.raises(RefusedError, match="another round"):
        chain.decryptor().open(context, vector, tags)  # type: ignore[arg-type]
    relabeled = [replace(tag, round=context.digest) for tag in tags]  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="not signed"):
        chain.decryptor().open(context, vector, relabeled)  # type: ignore[arg-type]


def test_tags_of_invented_stores_are_refused(chain: Chain) -> None:
    vector, tags = chain.sum_of(NAMES)
    stranger = replace(tags[0], member="store-9")
    stranger = replace(stranger, signature=identity("store-9").sign(stranger.content()))
    with pytest.raises(RefusedError, match="not signed by a store"):
        chain.decryptor().open(ROUND, vector, [*tags, stranger])
    with pytest.raises(RefusedError, match="twice"):
        chain.decryptor().open(ROUND, vector, [*tags, tags[0]])


def buffered(round: int, attempt: int = 0) -> TaskKey:
    return TaskKey(run_id="run", round=round, attempt=attempt)


def test_uploads_of_several_rounds_are_added_with_weights(chain: Chain) -> None:
    total, weighted, plain = EncryptedSum(packing=PACKING), [], []
    parts = [(NAMES[0], ROUND, 5), (NAMES[1], NEXT, 16), (NAMES[2], ROUND, 1), (NAMES[0], NEXT, 3)]
    for name, context, weight in parts:
        upload = chain.upload(name, context)
        total.add(f"{name} {context.key.round}", upload.vector, weight=weight)
        weighted.append((upload.tag, weight))
        plain += weight * [chain.plain[name]]
    opened = chain.decryptor().open_buffer(buffered(3), total.total(), weighted)
    assert equal(opened, added(plain))
    other = [(tag, 1) for tag, _ in weighted]
    with pytest.raises(RefusedError, match="a second sum"):
        chain.decryptor().open_buffer(buffered(3), total.total(), other)
    for again in (weighted, other, weighted[:3], [*weighted[:2], (chain.upload(NAMES[3]).tag, 1)]):
        with pytest.raises(RefusedError, match=r"decrypted in another sum|differ by"):
            chain.decryptor().open_buffer(buffered(4), total.total(), again)
    assert equal(chain.decryptor().open_buffer(buffered(3), total.total(), weighted), opened)
    with pytest.raises(RefusedError, match="twice"):
        chain.decryptor().open_buffer(buffered(5), total.total(), [*weighted, weighted[0]])


def test_a_buffer_of_one_store_is_not_decrypted(chain: Chain) -> None:
    uploads = [chain.upload(NAMES[0], context) for context in (ROUND, SECOND, NEXT)]
    with pytest.raises(RefusedError, match="of 1 store, and this store's minimum is 3"):
        chain.decryptor().open_buffer(buffered(2), uploads[0].vector, [(upload.tag, 1) for upload in uploads])


@pytest.mark.parametrize(("weight", "reason"), [(0, "from 1 to 16"), (-1, "from 1 to 16"), (17, "from 1 to 16"),
                                                (16, "the codec has room for 64")])  # fmt: skip
def test_weights_that_would_single_out_an_upload_or_overflow_are_refused(
    chain: Chain, weight: int, reason: str
) -> None:
    vector, tags = chain.sum_of(NAMES)
    with pytest.raises(RefusedError, match=reason):
        chain.decryptor().open_buffer(buffered(2), vector, [(tag, weight) for tag in tags])
    with pytest.raises(RefusedError, match=reason):
        PACKING.check_weights([weight] * 5)


@pytest.mark.parametrize("sealed", [b"", bytes(11), bytes(sum_check.SEALED_BYTES), bytes(1000)])
def test_a_tag_without_the_check_key_is_refused(chain: Chain, sealed: bytes) -> None:
    vector, tags = chain.sum_of(NAMES)
    forged = replace(tags[1], sealed=sealed)
    forged = replace(forged, signature=identity(forged.member).sign(forged.content()))
    with pytest.raises(RefusedError, match="check key"):
        chain.decryptor().open(ROUND, vector, [tags[0], forged, *tags[2:]])


def test_a_tag_depends_on_every_slot_and_adds_up(chain: Chain) -> None:
    keys, generator = chain.holder.keys, np.random.default_rng(0)

    def tag(slots: np.ndarray) -> tuple[int, ...]:
        tagger = Tagger(keys, PARAMETERS)
        for one in slots:
            tagger.add(one)
        return tagger.tag

    one, other = generator.integers(-(2**31), 2**32, (2, 2, PARAMETERS.degree))
    added_up = tuple((a + b) % PARAMETERS.plain_modulus for a, b in zip(tag(one), tag(other), strict=True))
    assert tag(one + other) == added_up
    for chunk, slot in ((0, 0), (0, 4095), (1, 7)):
        changed = one.copy()
        changed[chunk, slot] += 1
        assert all(a != b for a, b in zip(tag(changed), tag(one), strict=True))
