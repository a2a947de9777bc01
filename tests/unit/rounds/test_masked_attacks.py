"""A member of a masked round that sends what it should not: it is named, and the round is completed or redone.

The other members check each other's signatures, as stores do that pin the chain's key.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fedshelf.compression.sum_stage import SUMMAND
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientStatus, RoundFinished, RoundVoid, RunStatus
from fedshelf.core.messages import MaskedPurpose, MaskingReply, MaskingStage, ServerMessage, Upload
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.secure_aggregation import wire
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from fedshelf.privacy.secure_aggregation.keys import KeyAdvertisement
from fedshelf.privacy.secure_aggregation.shamir import SHARE_BYTES
from fedshelf.privacy.secure_aggregation.shares import SEALED_BYTES, SealedShares
from fedshelf.privacy.secure_aggregation.survivors import SurvivorsSignature
from fedshelf.privacy.secure_aggregation.unmasking import RevealedShares
from fedshelf.rounds.sums.masking_client import MaskingClient
from tests.fakes import Answer
from tests.property.rounds.test_masked_crashes import world_of
from tests.worlds import World

NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
HOSTILE = "c"
KINDS: dict[MaskingStage, type[Any]] = {
    MaskingStage.KEYS: KeyAdvertisement, MaskingStage.SHARES: SealedShares,
    MaskingStage.SURVIVORS: SurvivorsSignature, MaskingStage.UNMASKING: RevealedShares,
}  # fmt: skip
Change = Callable[[Any], Any]


@cache
def identity(name: str) -> KeyPair:
    return KeyPair.generate()


def signed_world(**values: Any) -> World:
    given: dict[str, Any] = {"names": NAMES, "num_rounds": 2, "identities": {name: identity(name) for name in NAMES}}
    return world_of(threshold=None, **{**given, **values})


def attacked(stage: MaskingStage, change: Change, **values: Any) -> World:
    """A world whose member `HOSTILE` sends a changed message in a stage of each round; run to its end."""
    world = signed_world(**values)

    def tamper(message: ServerMessage, answer: Answer) -> Answer:
        if not isinstance(answer, MaskingReply) or answer.stage is not stage:
            return answer
        return replace(answer, content=wire.to_text(change(wire.from_text(answer.content, KINDS[stage]))))

    world.tampers[HOSTILE] = tamper
    assert world.run() is RunStatus.FINISHED
    return world


def counted(record: RoundFinished) -> list[str]:
    return [member.client for member in record.clients if member.status is ClientStatus.COUNTED]


def part_of(record: RoundFinished | RoundVoid, name: str = HOSTILE) -> tuple[ClientStatus, str]:
    return next((member.status, member.reason) for member in record.clients if member.client == name)


def assert_sums_are_apart(world: World) -> None:
    """All sums of one round that members have recorded are equal or differ by the minimum cohort."""
    recorded = [one for store in world.opened_sums.values() for one in store.found]
    assert recorded
    for one in recorded:
        for other in recorded:
            if one.key.round == other.key.round:
                assert len(one.members ^ other.members) in (0, *range(LEAST_MEMBERS, len(NAMES)))


def by_another(shown: Any) -> Any:
    return replace(shown, signature=identity("stranger").sign(shown.content()))


def signed_again(**fields: Any) -> Change:
    """Other fields under the member's own signature."""

    def change(shown: Any) -> Any:
        found = replace(shown, **fields)
        return replace(found, signature=identity(HOSTILE).sign(found.content()))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda shown: replace(shown, signature=b""), "not signed by its identity key"),
        (by_another, "not signed by its identity key"),
        (lambda shown: replace(shown, commitment=bytes(32)), "not signed by its identity key"),
        (signed_again(mask_key=bytes(32)), "gives the same secret with all others"),
        (signed_again(mask_key=b"short"), "another length than 32 bytes"),
        (signed_again(context=bytes(32)), "for another round, attempt, model or configuration"),
        (lambda shown: signed_again(seal_key=shown.mask_key)(shown), "shows a key twice"),
        (lambda shown: replace(shown, member="a"), "in another store's name"),
        (lambda shown: replace(shown, signature=bytes(1_000_000)), "has more than 80 bytes"),
    ],
)
def test_wrong_keys_cost_only_the_member_that_sends_them(change: Change, told: str) -> None:
    world = attacked(MaskingStage.KEYS, change)
    assert world.sink.of(RoundVoid) == []
    for record in world.finished:
        assert counted(record) == [name for name in NAMES if name != HOSTILE]
        status, reason = part_of(record)
        assert status is ClientStatus.FAILED
        assert told in reason


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda dealt: replace(dealt, sealed={}), "to others than its neighbors"),
        (lambda dealt: replace(dealt, sealed=dict.fromkeys(dealt.sealed, b"short")), "of another size"),
        (lambda dealt: replace(dealt, sealed={**dealt.sealed, "stranger": bytes(SEALED_BYTES)}), "to others than its"),
        (lambda dealt: replace(dealt, sealed={**dealt.sealed, HOSTILE: bytes(SEALED_BYTES)}), "to others than its"),
        (lambda dealt: replace(dealt, roster=bytes(32)), "another round, attempt or roster"),
    ],
)
def test_shares_for_wrong_recipients_cost_only_the_member_that_deals_them(change: Change, told: str) -> None:
    world = attacked(MaskingStage.SHARES, change)
    assert world.sink.of(RoundVoid) == []
    for record in world.finished:
        assert counted(record) == [name for name in NAMES if name != HOSTILE]
        assert told in part_of(record)[1]


@pytest.mark.parametrize("num_names", [4, 8])
def test_shares_that_do_not_open_void_one_attempt_before_anybody_reveals_and_exclude_their_dealer(
    num_names: int,
) -> None:
    world = attacked(
        MaskingStage.SHARES, lambda dealt: replace(dealt, sealed=dict.fromkeys(dealt.sealed, bytes(SEALED_BYTES))),
        names=NAMES[:num_names],
    )  # fmt: skip
    [void] = world.sink.of(RoundVoid)
    assert "nothing is revealed" in void.reason
    status, reason = part_of(void)
    assert status is ClientStatus.REFUSED
    assert "cannot read the shares that it has dealt" in reason
    others = [name for name in NAMES[:num_names] if name != HOSTILE]
    assert [counted(record) for record in world.finished] == [others, others]
    sums = {one.members for store in world.opened_sums.values() for one in store.found}
    assert sums == {frozenset(others)}


def test_wrong_shares_that_open_exclude_their_dealer_and_the_round_is_redone_with_a_set_that_differs_enough() -> None:
    """The members have recorded the sum that could not be opened: they open none that differs by one member."""

    world = signed_world()
    promise_another_seed(world.masking[HOSTILE])
    assert world.run() is RunStatus.FINISHED
    [void] = world.sink.of(RoundVoid)
    assert f"the shares of the secret of '{HOSTILE}' do not restore it" in void.reason
    assert "it has dealt wrong ones" in part_of(void)[1]
    first, second = world.finished
    assert len(counted(first)) == len(NAMES) - LEAST_MEMBERS
    assert HOSTILE not in counted(first)
    assert counted(second) == [name for name in NAMES if name != HOSTILE]
    assert_sums_are_apart(world)


def test_with_too_few_stores_for_a_set_that_differs_enough_the_run_ends_and_names_the_dealer() -> None:
    world = signed_world(names=NAMES[:5])
    promise_another_seed(world.masking[HOSTILE])
    with pytest.raises(RunError, match=f"{HOSTILE}: its shares do not restore its secret: it has dealt wrong ones"):
        world.run()
    assert world.finished == []
    assert_sums_are_apart(world)


def promise_another_seed(masking: object) -> None:
    """Let the member commit to a seed that is not the one that it shares, and take part as if nothing were."""
    assert isinstance(masking, MaskingClient)
    show = masking._show_keys

    def shown(*given: Any) -> object:
        found = signed_again(commitment=bytes(32))(show(*given))
        masking._rounds[MaskedPurpose.TRAIN][1].advertisement = found  # its own, which it looks for in the roster
        return found

    masking._show_keys = shown  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda signed: replace(signed, signature=b""), "not signed by the identity key"),
        (lambda signed: replace(signed, signature=identity(HOSTILE).sign(b"others")), "not signed by the identity key"),
        (lambda signed: replace(signed, unreadable=("stranger",)), "reports shares not sent to it"),
    ],
)
def test_a_wrong_signature_of_the_survivors_does_not_harm_the_round_and_is_in_its_record(
    change: Change, told: str
) -> None:
    world = attacked(MaskingStage.SURVIVORS, change)
    assert world.sink.of(RoundVoid) == []
    for record in world.finished:
        assert counted(record) == list(NAMES)
        assert told in part_of(record)[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda revealed: replace(revealed, mask_keys={"a": bytes(SHARE_BYTES)}), "of the wrong kind"),
        (lambda revealed: replace(revealed, seeds={"a": b"short"}), "of another length"),
        (lambda revealed: replace(revealed, seeds=dict.fromkeys(revealed.seeds, bytes(SHARE_BYTES))), "a wrong share"),
    ],
)
def test_wrong_revealed_shares_do_not_harm_the_round_and_are_in_its_record(change: Change, told: str) -> None:
    world = attacked(MaskingStage.UNMASKING, change)
    plain = world_of(masked=False, names=NAMES, num_rounds=2)
    plain.run()
    assert world.sink.of(RoundVoid) == []
    assert torch.equal(world.final, plain.final)
    for record in world.finished:
        assert counted(record) == list(NAMES)
        assert told in part_of(record)[1]


def _with_parts(upload: Upload, change: Callable[[torch.Tensor], torch.Tensor]) -> Upload:
    encoded = upload.vectors[SUMMAND]
    assert isinstance(encoded, Encoded)
    parts = {name: change(part) for name, part in encoded.parts.items()}
    return replace(upload, vectors={SUMMAND: replace(encoded, parts=parts)})


@pytest.mark.parametrize(
    "change",
    [
        lambda upload: replace(upload, vectors={**upload.vectors, "more": torch.ones(3)}),
        lambda upload: replace(upload, vectors={SUMMAND: torch.ones(328)}),
        lambda upload: _with_parts(upload, lambda part: part[:-1].clone()),
        lambda upload: _with_parts(upload, lambda part: part.to(torch.int16)),
    ],
)
def test_an_upload_of_other_vectors_costs_only_the_member_that_sends_it(change: Callable[[Upload], Upload]) -> None:
    world = signed_world()
    world.tampers[HOSTILE] = lambda message, answer: change(answer) if isinstance(answer, Upload) else answer
    assert world.run() is RunStatus.FINISHED
    assert world.sink.of(RoundVoid) == []
    for record in world.finished:
        assert counted(record) == [name for name in NAMES if name != HOSTILE]
        assert part_of(record)[1]
