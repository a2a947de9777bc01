"""The parts: masks, sharing of secrets, and who is whose neighbor."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedshelf.privacy.secure_aggregation import masks, shamir
from fedshelf.privacy.secure_aggregation.context import digest, packed
from fedshelf.privacy.secure_aggregation.graph import DEGREE, MOST_COMPLETE, Graph
from fedshelf.privacy.secure_aggregation.keys import advertise
from fedshelf.privacy.secure_aggregation.masking import binding, own_mask, pair_masks
from tests.unit.privacy.secure_aggregation.cohort import CONTEXT, names_of


def stream(key: bytes, num_bytes: int) -> NDArray[np.uint8]:
    vector = np.zeros(num_bytes, np.uint8)
    masks.apply([vector], [masks.Mask(key=key, is_added=True)])
    return vector


def test_a_mask_is_the_stream_of_aes_in_counter_mode_over_all_vectors() -> None:
    key, sizes = bytes(range(32)), ((np.uint16, 70_001), (np.uint32, 3), (np.uint64, 40_000))
    vectors: list[masks.Integers] = [np.zeros(size, dtype) for dtype, size in sizes]
    masks.apply(vectors, [masks.Mask(key=key, is_added=True)])
    total = sum(vector.nbytes for vector in vectors)
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(total))
    assert b"".join(vector.tobytes() for vector in vectors) == expected


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8"])
def test_masks_added_and_taken_out_leave_the_vector_as_it_was(dtype: str) -> None:
    vector = np.arange(100_000).astype(dtype)
    keys = [bytes([number % 251] * 31 + [number // 251]) for number in range(300)]
    masks.apply([vector], [masks.Mask(key=key, is_added=bool(key[0] % 3)) for key in keys])
    assert not np.array_equal(vector, np.arange(100_000).astype(dtype))
    masks.apply([vector], [masks.Mask(key=key, is_added=not key[0] % 3) for key in reversed(keys)])
    assert np.array_equal(vector, np.arange(100_000).astype(dtype))


def test_a_seed_that_differs_in_one_bit_gives_another_mask() -> None:
    seed, size = bytes(range(32)), 8192
    original = stream(own_mask("store", seed, b"bound").key, size)
    for bit in range(256):
        other = bytearray(seed)
        other[bit // 8] ^= 1 << bit % 8
        flipped = np.unpackbits(original ^ stream(own_mask("store", bytes(other), b"bound").key, size))
        assert abs(flipped.mean() - 0.5) < 0.015  # six deviations are 0.012


def test_masks_are_bound_to_the_whole_context_roster_and_dealers() -> None:
    names = names_of(3)
    contexts = [
        CONTEXT, replace(CONTEXT, model="other"), replace(CONTEXT, config="other"), replace(CONTEXT, threshold=3),
        *(replace(CONTEXT, key=replace(CONTEXT.key, **{field: value}))  # type: ignore[arg-type]
          for field, value in (("run_id", "other"), ("round", 9), ("attempt", 1))),
    ]  # fmt: skip
    bounds = {binding(context, b"roster", names) for context in contexts}
    bounds |= {binding(CONTEXT, b"other", names), binding(CONTEXT, b"roster", names[:2])}
    assert len(bounds) == len(contexts) + 2


def test_the_masks_of_a_pair_cancel_only_if_both_saw_the_same() -> None:
    one, other = advertise("a", CONTEXT, None), advertise("b", CONTEXT, None)
    for bound, cancels in ((b"same", True), (b"another model", False)):
        total = np.zeros(65_536, np.uint16)
        masks.apply([total], pair_masks("a", one[0].mask_key, {"b": other[1].mask_key}, b"same"))
        masks.apply([total], pair_masks("b", other[0].mask_key, {"a": one[1].mask_key}, bound))
        assert bool((total == 0).all()) == cancels
        if not cancels:
            assert abs(np.unpackbits(total.view(np.uint8)).mean() - 0.5) < 0.01  # noise


def test_packed_fields_are_told_apart() -> None:
    assert len({packed("a", "bc", "d"), packed("a", "b", "cd"), packed("ab", "c", "d"), packed("a", "bcd")}) == 4
    assert digest("a", 12) == digest("a", "12") != digest("a", 1, 2)


def test_the_modulus_is_the_smallest_prime_above_two_to_the_256() -> None:
    def is_probably_prime(number: int) -> bool:  # Miller and Rabin, 40 bases
        odd, twos, random = number - 1, 0, Random(1)
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for _ in range(40):
            power = pow(random.randrange(2, number - 1), odd, number)
            if power in (1, number - 1):
                continue
            for _ in range(twos - 1):
                power = power * power % number
                if power == number - 1:
                    break
            else:
                return False
        return True

    found = [offset for offset in range(1, 298, 2) if is_probably_prime(2**256 + offset)]
    assert found == [297]
    assert shamir.PRIME == 2**256 + 297


@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(0, 5), st.randoms(use_true_random=False))
def test_any_threshold_of_shares_restores_the_secret(secret: bytes, threshold: int, more: int, random: Random) -> None:
    shares = shamir.split(secret, random.sample(range(1, 2000), threshold + more), threshold)
    assert all(len(share) == shamir.SHARE_BYTES for share in shares.values())
    assert shamir.combine(dict(random.sample(sorted(shares.items()), threshold))) == secret
    assert shamir.combine(shares) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_a_share_is_uniform_whatever_the_secret(secret: bytes) -> None:
    shares = [shamir.split(secret, range(1, 4), 3) for _ in range(4000)]
    for bytes_seen in ([each[1][-1] for each in shares], [(each[2][-1] - each[3][-1]) % 256 for each in shares]):
        counts = np.bincount(bytes_seen, minlength=256)
        assert float((np.square(counts - 4000 / 256) / (4000 / 256)).sum()) < 391  # six deviations
    assert shamir.combine({x: shares[0][x] for x in (1, 2)}) != secret


def test_up_to_128_members_everybody_is_a_neighbor() -> None:
    for count in (3, 4, 17, MOST_COMPLETE):
        graph = Graph.of(names_of(count), b"roster")
        assert all(graph.neighbors(name) == sorted(set(graph.ring) - {name}) for name in graph.ring)


def test_above_the_graph_is_regular_symmetric_and_the_same_for_all() -> None:
    names = names_of(1000)
    graph = Graph.of(names, b"roster")
    near = {name: set(graph.neighbors(name)) for name in names}
    assert {len(those) for those in near.values()} == {DEGREE}
    assert all(name in near[other] for name, those in near.items() for other in those)
    assert Graph.of(names[::-1], b"roster") == graph
    assert Graph.of(names, b"another").ring != graph.ring


def test_a_harary_graph_is_k_connected() -> None:
    networkx = pytest.importorskip("networkx")
    for count, reach in ((9, 2), (14, 3), (30, 5)):
        graph = Graph(ring=names_of(count), reach=reach)
        edges = [(name, other) for name in graph.ring for other in graph.neighbors(name)]
        assert networkx.node_connectivity(networkx.Graph(edges)) == 2 * reach


def test_whether_survivors_are_connected_is_what_a_search_finds() -> None:
    graph, random = Graph(ring=names_of(14), reach=2), Random(5)
    seen = set()
    for _ in range(400):
        members = set(random.sample(graph.ring, random.randint(1, 14)))
        reached, edge = set(), {min(members)}
        while edge:
            reached |= edge
            edge = {other for name in edge for other in graph.neighbors(name) if other in members} - reached
        assert graph.is_connected(members) == (reached == members)
        seen.add(reached == members)
    assert seen == {True, False}
