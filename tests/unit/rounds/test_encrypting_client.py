"""What a store does not decrypt or encrypt, whatever the server asks: a hostile server has what an honest one has."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedshelf.core.messages import (
    Broadcast,
    EncryptionReply,
    EncryptionRequest,
    EncryptionStage,
    Failure,
    Purpose,
    TaskKey,
    Upload,
)
from fedshelf.privacy.homomorphic.ceremony import KeyContext
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum
from fedshelf.privacy.homomorphic.key_messages import KeyQuery, SumRequest
from fedshelf.privacy.homomorphic.sum_check import SealedTag
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.rounds.sums.encrypting_client import SUM, EncryptingClient
from tests.fakes import Answer
from tests.property.rounds.test_encrypted_crashes import world_of
from tests.worlds import World

KEY = TaskKey(run_id="run-1", round=2, attempt=0)


class Eavesdropper:
    """A run in which the server keeps the uploads of round 2, which it did not have decrypted."""

    def __init__(self) -> None:
        self.uploads: dict[str, Upload] = {}
        self.world = world = world_of(num_rounds=1)
        world.run()
        client = world.masking["a"]
        assert isinstance(client, EncryptingClient)
        terms = client._terms()
        assert terms is not None
        self.form: EncryptedForm = terms.form
        for name in world.names:
            answer = world._handle(name, self.task(world))
            assert isinstance(answer, Upload)
            self.uploads[name] = answer

    def task(self, world: World, key: TaskKey = KEY) -> Broadcast:
        vectors = {"params": world.final}
        return Broadcast(key=key, purpose=Purpose.TRAIN, client_lr=0.1, vectors=vectors)

    def ask(
        self, summed: Sequence[str], *, tagged: Sequence[str] | None = None, store: str = "a", key: TaskKey = KEY,
        weights: tuple[int, ...] = (), change: Any = None,
    ) -> Answer:  # fmt: skip
        """Ask a store to decrypt a sum of some uploads, with the tags of these or others."""
        total = EncryptedSum(packing=self.form.packing)
        for name in summed:
            total.add(name, self.form.opened(self.uploads[name], name)[0])
        tags = tuple(wire.from_text(self.uploads[name].tag, SealedTag) for name in tagged or summed)
        vector = total.total()
        if change is not None:
            change(vector)
        content = wire.to_text(SumRequest(key=key, tags=tags, weights=weights))
        vectors = {SUM: self.form.sum_to_decrypt(vector)}
        request = EncryptionRequest(key=key, stage=EncryptionStage.DECRYPTION, content=content, vectors=vectors)
        return self.world._handle(store, request)


@pytest.fixture
def server() -> Eavesdropper:
    return Eavesdropper()


def assert_refused(answer: Answer, said: str) -> None:
    assert isinstance(answer, Failure)
    assert said in answer.reason


def test_a_sum_of_all_is_decrypted_as_often_as_the_server_asks(server: Eavesdropper) -> None:
    first, again = server.ask("abcd"), server.ask("abcd")
    assert isinstance(first, EncryptionReply)
    assert isinstance(again, EncryptionReply)
    found, same = (server.form.read_decrypted(one.vectors[SUM]) for one in (first, again))
    assert all(np.array_equal(part, other) for part, other in zip(found, same, strict=True))
    assert any(part.any() for part in found)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"summed": "b"}, "this store's minimum is 3"),
        ({"summed": "bc"}, "this store's minimum is 3"),
        ({"summed": "b", "tagged": "abcd"}, "not the sum of the uploads that the server names"),
        ({"summed": "abc", "tagged": "abd"}, "not the sum of the uploads that the server names"),
        ({"summed": "abcd", "tagged": "abcc"}, "twice"),
        ({"summed": "abcd", "key": replace(KEY, attempt=1)}, "for another round, attempt, model or configuration"),
        ({"summed": "abcd", "key": replace(KEY, run_id="run-2")}, "was never set up at this client"),
        ({"summed": "abcd", "weights": (16, 1, 1, 1)}, "weighted in another way than this run's"),
        ({"summed": "abcd", "store": "b"}, "with another store alone"),
    ],
    ids=str,
)
def test_nothing_but_the_sum_of_enough_named_stores_is_decrypted(
    server: Eavesdropper, asked: dict[str, Any], said: str
) -> None:
    assert_refused(server.ask(**asked), said)
    tried = "not the sum" in said  # one ciphertext is tried in each attempt, so that the noise cannot be measured
    assert isinstance(server.ask("abcd"), Failure if tried else EncryptionReply)


def test_a_sum_that_was_altered_is_not_decrypted(server: Eavesdropper) -> None:
    def add_noise(vector: Any) -> None:
        vector[0, :600] = 0

    assert_refused(server.ask("abcd", change=add_noise), "cannot be decrypted")


def test_no_second_sum_that_leaves_out_a_store_is_decrypted(server: Eavesdropper) -> None:
    assert isinstance(server.ask("abcd"), EncryptionReply)
    assert_refused(server.ask("abc"), "another set of stores was confirmed for round 2")
    again = replace(KEY, attempt=1)
    server.uploads = {
        name: upload
        for name in server.world.names
        if isinstance(upload := server.world._handle(name, server.task(server.world, again)), Upload)
    }
    assert_refused(server.ask("abc", key=again), "the survivors differ by 1 store")
    assert isinstance(server.ask("abcd", key=again), EncryptionReply)


def test_an_upload_in_another_stores_name_is_refused_by_the_server(server: Eavesdropper) -> None:
    with pytest.raises(Exception, match="its tag names another store"):
        server.form.opened(server.uploads["b"], "c")


def test_a_store_that_has_no_keys_neither_trains_nor_decrypts(server: Eavesdropper) -> None:
    server.world.restart_client("a")
    assert_refused(server.ask("abcd"), "has no keys for this run yet")
    assert_refused(server.world._handle("a", server.task(server.world)), "has no keys for this run yet")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"holder": "b"}, "another holder"),
        ({"is_shared": True}, "another is_shared"),
        ({"run_id": "run-2"}, "another run_id"),
        ({"config": "other"}, "another config"),
        ({"summands": 2}, "another summands"),
        ({"sizes": ()}, "another sizes"),
        ({"attempt": 0}, "is over"),
    ],
    ids=str,
)
def test_a_store_asks_for_no_keys_of_another_ceremony_than_its_runs(
    server: Eavesdropper, changed: dict[str, Any], said: str
) -> None:
    context = KeyContext(
        run_id="run-1", config="digest", attempt=1, sizes=server.form.scope.sizes, summands=64, holder="a",
        is_shared=False,
    )  # fmt: skip

    def query(context: KeyContext) -> Answer:
        content = wire.to_text(KeyQuery(context=context, known=b"other keys"))
        request = EncryptionRequest(key=KEY, stage=EncryptionStage.REQUEST, content=content)
        return server.world._handle("c", request)

    assert_refused(query(replace(context, **changed)), said)
    assert isinstance(query(context), EncryptionReply)


def test_the_same_upload_is_sent_again_for_the_same_task(server: Eavesdropper) -> None:
    again = server.world._handle("b", server.task(server.world))
    assert isinstance(again, Upload)
    assert again.tag == server.uploads["b"].tag


def test_a_client_of_a_run_without_encryption_refuses_the_exchange() -> None:
    world = World(num_rounds=1)
    world.run()
    request = EncryptionRequest(key=KEY, stage=EncryptionStage.KEYS, content="[]")
    answer = world._handle("a", request)
    assert_refused(answer, "neither masked nor encrypted")
    assert torch.isfinite(world.final).all()
