"""Messages as text: what comes back is what was sent, and anything else is refused without showing a value."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.errors import RefusedError
from fedshelf.privacy.secure_aggregation.context import RoundContext
from fedshelf.privacy.secure_aggregation.keys import KeyAdvertisement, RoundRoster
from fedshelf.privacy.secure_aggregation.server import ServerRecord, ServerRound
from fedshelf.privacy.secure_aggregation.shares import SealedShares, SealedSharesDelivery
from fedshelf.privacy.secure_aggregation.survivors import Survivors, SurvivorsSignature
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum, RevealedShares, Signatures
from fedshelf.privacy.secure_aggregation.wire import from_text, to_text
from tests.unit.privacy.secure_aggregation.cohort import CONTEXT, Cohort, equal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def messages() -> list[Any]:
    """One of each kind, from a round in which a member drops out."""
    cohort = Cohort(4, signed=True).keys().shares()
    name, staying = cohort.names[0], cohort.names[:3]
    dealt, delivery = cohort.clients[name].deal(cohort.roster), cohort.server.delivery(name)
    cohort.uploads(staying).signatures(staying)
    revealed = cohort.clients[name].reveal(cohort.signed)
    return [
        CONTEXT, cohort.clients[name].advertisement, cohort.roster, dealt, delivery, cohort.survivors,
        cohort.clients[name].confirm(cohort.survivors), cohort.signed, revealed, cohort.server.record,
        cohort.opened_sums[name].known()[0],
    ]  # fmt: skip


MESSAGES = messages()


def test_every_kind_of_message_is_covered() -> None:
    assert [type(message) for message in MESSAGES] == [
        RoundContext, KeyAdvertisement, RoundRoster, SealedShares, SealedSharesDelivery, Survivors,
        SurvivorsSignature, Signatures, RevealedShares, ServerRecord, OpenedSum,
    ]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: object) -> None:
    assert from_text(to_text(message), type(message)) == message


OPTIONAL = (
    "signature", "threshold", "roster", "dealers", "uploaded", "survivors", "signatures", "sealed", "unreadable",
    "purpose", "content",
)  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_field_too_many_too_few_or_of_another_type_is_refused(message: object) -> None:
    fields = json.loads(to_text(message))[0]
    for name in fields:
        if name not in OPTIONAL:
            with pytest.raises(RefusedError, match=f"malformed: {name}: "):
                from_text(json.dumps([{key: value for key, value in fields.items() if key != name}]), type(message))
        with pytest.raises(RefusedError, match=f"malformed: {name}"):
            from_text(json.dumps([{**fields, name: 1.5}]), type(message))
    with pytest.raises(RefusedError, match="malformed: more: Unexpected keyword argument"):
        from_text(json.dumps([{**fields, "more": 1}]), type(message))


@given(JSON | st.text(max_size=50).map(str), st.sampled_from(MESSAGES))
def test_anything_else_is_refused(value: object, message: object) -> None:
    for text in (json.dumps(value), json.dumps([value]), str(value)):
        try:
            found = from_text(text, type(message))
        except RefusedError:
            continue
        assert isinstance(found, type(message))


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"a":' * 100_000, "", "\ud800", "x" * (5 << 20)])
def test_hostile_texts_are_refused(text: str) -> None:
    with pytest.raises(RefusedError, match="a message of secure aggregation"):
        from_text(text, Survivors)


def test_errors_do_not_show_shares() -> None:
    revealed = next(message for message in MESSAGES if isinstance(message, RevealedShares))
    fields = json.loads(to_text(revealed))[0]
    shares = [*fields["seeds"].values(), *fields["mask_keys"].values()]
    for wrong in (fields | {"seeds": shares}, fields | {"mask_keys": {"store": shares}}, [fields, *shares]):
        with pytest.raises(RefusedError) as told:
            from_text(json.dumps([wrong]), RevealedShares)
        assert not any(share in str(told.value) for share in shares)


def test_a_server_resumes_with_the_text_of_its_record() -> None:
    cohort = Cohort(4).keys().shares().uploads()
    cohort.server = ServerRound(from_text(to_text(cohort.server.record), ServerRecord))
    assert equal(cohort.signatures().opened(), cohort.plain_sum())
