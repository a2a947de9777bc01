"""The stores make the keys; the server sees public ones. What is replayed, of another run, or not signed is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedshelf.core.errors import RefusedError
from fedshelf.privacy.homomorphic.ceremony import (
    KeyContext,
    KeyHolder,
    KeyMember,
    KeyRequest,
    PublishedKeys,
    check_requests,
)
from fedshelf.privacy.homomorphic.ciphertexts import to_bytes
from fedshelf.privacy.secure_aggregation.wire import from_text, to_text
from tests.unit.privacy.homomorphic.stores import CEREMONY, SHARED, Chain, identities, identity

ROSTER = identities(3)


def holder(context: KeyContext = SHARED) -> KeyHolder:
    return KeyHolder(context, identity=identity(context.holder), identities=ROSTER)


def member(name: str = "store-1", context: KeyContext = SHARED) -> KeyMember:
    return KeyMember(name, context, identity=identity(name), identities=ROSTER)


def test_every_store_gets_the_keys_if_every_store_may_decrypt() -> None:
    chain = Chain(3, SHARED)
    secrets = {None if keys.secret is None else keys.secret.tobytes() for keys in chain.keys.values()}
    assert len(secrets) == 1
    assert None not in secrets
    assert len({keys.check_key for keys in chain.keys.values()}) == 1


def test_the_secret_key_stays_with_the_store_that_decrypts() -> None:
    chain = Chain(3, CEREMONY)
    assert [name for name, keys in chain.keys.items() if keys.secret is not None] == [CEREMONY.holder]
    assert chain.holder.published.sealed_secret == b""
    with pytest.raises(RefusedError, match="with another store alone"):
        chain.decryptor("store-1")


@pytest.mark.parametrize("context", [CEREMONY, SHARED])
def test_what_the_server_passes_on_holds_no_secret(context: KeyContext) -> None:
    dealer, receiver = holder(context), member(context=context)
    seen = to_text(dealer.published).encode() + dealer.wrap(receiver.request) + to_text(receiver.request).encode()
    seen += dealer.published.sealed_secret + dealer.published.public_key
    keys = dealer.keys
    assert keys.secret is not None
    for secret in (keys.check_key, to_bytes(keys.secret).tobytes()[:64], keys.secret.tobytes()[:64]):
        assert secret not in seen
    assert "secret=" not in repr(keys)
    assert keys.check_key.hex() not in repr(keys)


def test_messages_survive_the_wire() -> None:
    dealer, receiver = holder(), member()
    request = from_text(to_text(receiver.request), KeyRequest)
    published = from_text(to_text(dealer.published), PublishedKeys)
    assert from_text(to_text(SHARED), KeyContext) == SHARED
    assert receiver.receive(published, dealer.wrap(request)).check_key == dealer.keys.check_key


def test_a_store_that_restarts_gets_the_same_keys_for_a_new_request() -> None:
    dealer, first, again = holder(), member(), member()
    wrapped = dealer.wrap(first.request)
    with pytest.raises(RefusedError, match="cannot be opened"):
        again.receive(dealer.published, wrapped)
    assert again.receive(dealer.published, dealer.wrap(again.request)).check_key == dealer.keys.check_key


@pytest.mark.parametrize(
    "change", [{"run_id": "other"}, {"config": "other"}, {"attempt": 1}, {"holder": "store-2"}, {"summands": 65},
               {"sizes": ((32, 1),)}, {"is_shared": False}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_messages_of_another_ceremony_are_refused(change: dict[str, Any]) -> None:
    other = replace(SHARED, **change)
    with pytest.raises(RefusedError, match="another run"):
        holder().wrap(member(context=other).request)
    dealer, stranger = holder(other), member(context=other)
    with pytest.raises(RefusedError, match="another run"):
        member().receive(dealer.published, dealer.wrap(stranger.request))


def test_a_request_with_another_signature_is_refused() -> None:
    dealer, request = holder(), member().request
    for wrong in (
        replace(request, signature=member("store-2").request.signature),
        replace(request, member="store-2"),
        replace(request, wrap_key=member().request.wrap_key),
        replace(request, signature=b""),
    ):
        with pytest.raises(RefusedError, match="not signed by its identity key"):
            dealer.wrap(wrong)
    stranger = KeyMember("store-9", SHARED, identity=identity("store-9"), identities=ROSTER)
    with pytest.raises(RefusedError, match="not in the chain's roster"):
        dealer.wrap(stranger.request)


@pytest.mark.parametrize(
    "change",
    [
        lambda shown, other: {"public_key": other.public_key}, lambda shown, other: {"wrap_key": other.wrap_key},
        lambda shown, other: {"sealed_secret": other.sealed_secret},
        lambda shown, other: {"signature": other.signature}, lambda shown, other: {"signature": b""},
    ],
    ids=["public key", "wrap key", "sealed secret", "signature", "unsigned"],
)  # fmt: skip
def test_published_keys_that_the_server_has_changed_are_refused(
    change: Callable[[PublishedKeys, PublishedKeys], dict[str, Any]],
) -> None:
    dealer, receiver = holder(), member()
    wrong = replace(dealer.published, **change(dealer.published, holder().published))
    with pytest.raises(RefusedError, match="not signed by its identity key"):
        receiver.receive(wrong, dealer.wrap(receiver.request))


def test_keys_that_the_server_has_generated_are_refused() -> None:
    invented = KeyHolder(SHARED, identity=identity("server"), identities=ROSTER)
    receiver = member()
    with pytest.raises(RefusedError, match="not signed by its identity key"):
        receiver.receive(invented.published, invented.wrap(receiver.request))


def test_keys_wrapped_for_another_store_cannot_be_opened() -> None:
    dealer, receiver = holder(), member()
    with pytest.raises(RefusedError, match="cannot be opened"):
        receiver.receive(dealer.published, dealer.wrap(member("store-2").request))


def test_keys_for_one_store_are_not_those_for_another_with_the_same_wrap_key() -> None:
    dealer, receiver = holder(), member()
    copied = replace(receiver.request, member="store-2")
    copied = replace(copied, signature=identity("store-2").sign(copied.content()))
    with pytest.raises(RefusedError, match="cannot be opened"):
        receiver.receive(dealer.published, dealer.wrap(copied))


@pytest.mark.parametrize("size", [0, 1, 79, 81, 1 << 20])
def test_wrapped_keys_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(RefusedError, match=f"{size:,} bytes instead of 80"):
        member().receive(holder().published, bytes(size))


@pytest.mark.parametrize("content", [b"", bytes(196_607), b"\xff" * 196_608], ids=["empty", "short", "not reduced"])
def test_a_malformed_public_key_of_the_holder_is_refused(content: bytes) -> None:
    dealer, receiver = holder(), member()
    unsigned = replace(dealer.published, public_key=content)
    signed = replace(unsigned, signature=identity(SHARED.holder).sign(unsigned.content))
    with pytest.raises(RefusedError, match="the public key for encryption"):
        receiver.receive(signed, dealer.wrap(receiver.request))


def test_a_key_with_which_all_secrets_are_equal_is_refused() -> None:
    dealer, weak = holder(), replace(member().request, wrap_key=bytes(32))
    signed = replace(weak, signature=identity("store-1").sign(weak.content()))
    with pytest.raises(RefusedError, match="same secret"):
        dealer.wrap(signed)


def test_a_store_compares_the_ceremony_with_its_own_run() -> None:
    replace(SHARED, attempt=3).check(SHARED)
    with pytest.raises(RefusedError, match="another holder, is_shared"):
        SHARED.check(replace(CEREMONY, holder="store-1"))
    with pytest.raises(RefusedError, match="is over"):
        SHARED.check(replace(SHARED, attempt=1))


def test_one_store_cannot_stand_for_two() -> None:
    first, second = member("store-1").request, member("store-2").request
    check_requests({"store-1": first, "store-2": second})
    with pytest.raises(RefusedError, match="same key"):
        check_requests({"store-1": first, "store-2": replace(second, wrap_key=first.wrap_key)})
    with pytest.raises(RefusedError, match="another store"):
        check_requests({"store-1": second, "store-2": first})
