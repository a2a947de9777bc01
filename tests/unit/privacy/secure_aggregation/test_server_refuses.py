"""What the server refuses, and what it gets around: wrong, foreign and repeated messages of members."""

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedshelf.core.errors import RefusedError
from fedshelf.privacy.secure_aggregation.masking import MaskedUpload
from fedshelf.privacy.secure_aggregation.server import ServerRound
from fedshelf.privacy.secure_aggregation.shares import SEALED_BYTES
from tests.unit.privacy.secure_aggregation.cohort import CONTEXT, Cohort, equal, values


def test_a_message_that_comes_twice() -> None:
    cohort = Cohort(4)
    name = cohort.names[0]
    cohort.server.add_keys(cohort.clients[name].advertisement)
    with pytest.raises(RefusedError, match="the keys of 'store-000' came twice"):
        cohort.server.add_keys(cohort.clients[name].advertisement)
    cohort = Cohort(4).keys().shares().uploads().signatures()
    fork = cohort.fork()
    fork.server.record = replace(fork.server.record, survivors=None)
    upload = MaskedUpload(member=name, roster=cohort.roster.digest, vectors=cohort.masked[name])
    with pytest.raises(RefusedError, match="the upload of 'store-000' came twice"):
        fork.server.add_upload(upload)
    with pytest.raises(RefusedError, match="the signature of 'store-000' came twice"):
        cohort.server.add_signature(cohort.clients[name].confirm(cohort.survivors))
    revealed = cohort.clients[name].reveal(cohort.signed)
    cohort.server.add_revealed(revealed)
    with pytest.raises(RefusedError, match="the revealed shares of 'store-000' came twice"):
        cohort.server.add_revealed(revealed)


def test_a_message_of_a_stage_that_is_closed_or_has_not_begun() -> None:
    late, cohort = Cohort(4), Cohort(4)
    cohort.keys(cohort.names[:3])
    with pytest.raises(RefusedError, match="came before or after the stage that it belongs to"):
        cohort.server.add_keys(late.clients["store-003"].advertisement)
    upload = MaskedUpload(member="store-000", roster=cohort.roster.digest, vectors=values(CONTEXT, 0))
    with pytest.raises(RefusedError, match="came before or after the stage"):
        cohort.server.add_upload(upload)


def test_messages_of_another_round_and_of_strangers() -> None:
    cohort, other = Cohort(4).keys(), Cohort(4).keys()
    dealt = other.clients["store-000"].deal(other.roster)
    with pytest.raises(RefusedError, match="a message of 'store-000' belongs to another round"):
        cohort.server.add_shares(dealt)
    with pytest.raises(RefusedError, match="'stranger' is not among the stores of this stage"):
        cohort.server.add_shares(replace(dealt, member="stranger", roster=cohort.roster.digest))


@pytest.mark.parametrize(
    "wrong",
    [{}, {"store-001": bytes(SEALED_BYTES)}, dict.fromkeys(("store-001", "store-002", "store-003"), b"x")],
)
def test_shares_for_others_than_all_neighbors_or_of_another_size(wrong: dict[str, bytes]) -> None:
    cohort = Cohort(4).keys()
    dealt = cohort.clients["store-000"].deal(cohort.roster)
    with pytest.raises(RefusedError, match="'store-000' deals shares to others than its neighbors, or of another size"):
        cohort.server.add_shares(replace(dealt, sealed=wrong))


def test_keys_and_survivors_that_are_not_signed_by_the_store() -> None:
    cohort = Cohort(3, signed=True)
    shown = [client.advertisement for client in cohort.clients.values()]
    with pytest.raises(RefusedError, match="the keys of 'store-000' are not signed"):
        cohort.server.add_keys(replace(shown[0], signature=shown[1].signature))
    cohort.keys().shares().uploads()
    signed = cohort.clients["store-000"].confirm(cohort.survivors)
    with pytest.raises(RefusedError, match="the survivors are not signed by the identity key of 'store-001'"):
        cohort.server.add_signature(replace(signed, member="store-001"))


def test_shares_of_the_wrong_kind_of_strangers_or_of_another_length() -> None:
    cohort = Cohort(4, context=replace(CONTEXT, threshold=3)).keys().shares()
    cohort.uploads(cohort.names[:3]).signatures(cohort.names[:3])
    revealed = cohort.clients["store-000"].reveal(cohort.signed)
    a_share = revealed.seeds["store-001"]
    for wrong, told in (
        (replace(revealed, seeds=dict(revealed.seeds) | {"store-003": a_share}), "of the wrong kind"),
        (replace(revealed, mask_keys=dict(revealed.mask_keys) | {"store-001": a_share}), "of the wrong kind"),
        (replace(revealed, seeds=dict(revealed.seeds) | {"stranger": a_share}), "that it does not hold"),
        (replace(revealed, seeds=dict(revealed.seeds) | {"store-001": b"short"}), "of another length than 33 bytes"),
    ):
        with pytest.raises(RefusedError, match=told):
            cohort.server.add_revealed(wrong)


def test_uploads_of_other_sizes() -> None:
    cohort = Cohort(3).keys().shares()
    vectors = values(replace(CONTEXT, sizes=((16, 37), (32, 3), (64, 4))), 1)
    with pytest.raises(RefusedError, match="instead of"):
        cohort.server.add_upload(MaskedUpload(member="store-000", roster=cohort.roster.digest, vectors=vectors))


def test_a_wrong_share_is_got_around_if_there_is_one_more() -> None:
    cohort = Cohort(5).keys().shares().uploads().signatures()
    for name in cohort.names:
        revealed = cohort.clients[name].reveal(cohort.signed)
        if name == "store-002":
            revealed = replace(revealed, seeds=dict.fromkeys(revealed.seeds, bytes(33)))
        cohort.server.add_revealed(revealed)
    total = cohort.masked_sum()
    cohort.server.open(total)
    assert equal(total, cohort.plain_sum())


def test_too_many_wrong_shares_leave_the_sum_as_it_was() -> None:
    cohort = Cohort(4).keys().shares().uploads(Cohort(4).names[:3]).signatures(Cohort(4).names[:3])
    for name in cohort.survivors.members:
        revealed = cohort.clients[name].reveal(cohort.signed)
        if name == "store-002":
            revealed = replace(revealed, mask_keys={"store-003": bytes(33)})
        cohort.server.add_revealed(revealed)
    total = cohort.masked_sum()
    with pytest.raises(RefusedError, match="the shares of the secret of 'store-003' do not restore it"):
        cohort.server.open(total)
    assert equal(total, cohort.masked_sum())
    assert not cohort.server.suspects, "with no share to spare, a holder may be at fault as well"


def test_a_seed_that_is_not_the_one_promised_is_noticed() -> None:
    cohort = Cohort(4)
    liar = cohort.clients["store-001"]
    liar.advertisement = replace(liar.advertisement, commitment=bytes(32))
    with pytest.raises(RefusedError, match="the shares of the secret of 'store-001' do not restore it: it has dealt"):
        cohort.keys().shares().uploads().signatures().opened()
    assert list(cohort.server.suspects) == ["store-001"]


@pytest.mark.parametrize("signed", [False, True])
def test_keys_that_would_make_all_other_members_refuse_the_roster(signed: bool) -> None:
    cohort = Cohort(4, signed=signed)
    first, *others = [client.advertisement for client in cohort.clients.values()]
    cohort.server.add_keys(first)
    for wrong in (
        cohort.resigned(replace(others[0], mask_key=others[0].seal_key)),
        cohort.resigned(replace(others[0], mask_key=first.mask_key)),
        cohort.resigned(replace(others[0], mask_key=first.seal_key)),
        replace(others[0], signature=bytes(10_000)),
    ):
        with pytest.raises(RefusedError, match="store-001"):
            cohort.server.add_keys(wrong)
    for shown in others:
        cohort.server.add_keys(shown)
    roster = cohort.server.close_keys()
    for client in cohort.clients.values():
        client.deal(roster)


def test_a_dealer_whose_shares_too_few_can_read_is_found_before_any_member_records_the_sum() -> None:
    cohort = Cohort(5, signed=True).keys()
    for name in cohort.names:
        dealt = cohort.clients[name].deal(cohort.roster)
        if name == "store-004":
            dealt = replace(dealt, sealed=dict(dealt.sealed) | dict.fromkeys(cohort.names[:2], bytes(SEALED_BYTES)))
        cohort.server.add_shares(dealt)
    cohort.server.close_shares()
    with pytest.raises(RefusedError, match="too few can read the shares of 'store-004': nothing is revealed"):
        cohort.uploads().signatures()
    assert cohort.server.suspects == {"store-004": "'store-000', 'store-001' cannot read the shares that it has dealt"}
    assert not any(store.kept for store in cohort.opened_sums.values())


def test_one_store_that_reports_all_shares_as_unreadable_harms_nobody() -> None:
    cohort = Cohort(5, signed=True).keys().shares().uploads()
    for name, client in cohort.clients.items():
        signed = client.confirm(cohort.survivors)
        if name == "store-002":
            signed = replace(signed, unreadable=tuple(other for other in cohort.names if other != name))
        cohort.server.add_signature(signed)
    cohort.signed = cohort.server.signatures()
    assert equal(cohort.opened(), cohort.plain_sum())


def test_a_dealer_that_relies_on_its_own_share_and_keeps_it_is_named() -> None:
    cohort = Cohort(5, signed=True).keys()
    for name in cohort.names:
        dealt = cohort.clients[name].deal(cohort.roster)
        if name == "store-004":
            dealt = replace(dealt, sealed=dict(dealt.sealed) | {"store-000": bytes(SEALED_BYTES)})
        cohort.server.add_shares(dealt)
    cohort.server.close_shares()
    cohort.uploads().signatures()
    with pytest.raises(RefusedError, match=r"too few stores have revealed their shares \(3 of the 4"):
        cohort.opened(cohort.names[:4])
    assert list(cohort.server.suspects) == ["store-004"]


@pytest.mark.parametrize("unreadable", [("store-000",), ("stranger",), ("store-003",) * 2, ("x" * 100_000,)])
def test_a_report_of_shares_that_were_not_sent_to_it(unreadable: tuple[str, ...]) -> None:
    cohort = Cohort(4, context=replace(CONTEXT, threshold=3)).keys().shares(Cohort(4).names[:3])
    cohort.uploads(cohort.names[:3])
    signed = replace(cohort.clients["store-000"].confirm(cohort.survivors), unreadable=unreadable)
    with pytest.raises(RefusedError, match="'store-000' signs with too long a signature, or reports shares"):
        cohort.server.add_signature(signed)


def test_the_sum_is_not_said_to_open_while_a_wrong_share_is_among_the_fewest_that_could() -> None:
    cohort = Cohort(5).keys().shares().uploads().signatures()
    for name in cohort.names[:4]:
        revealed = cohort.clients[name].reveal(cohort.signed)
        if name == "store-002":
            revealed = replace(revealed, seeds=dict.fromkeys(revealed.seeds, bytes(33)))
        cohort.server.add_revealed(revealed)
    assert not cohort.server.can_open()
    cohort.server.add_revealed(cohort.clients["store-004"].reveal(cohort.signed))
    assert cohort.server.can_open()
    total = cohort.masked_sum()
    cohort.server.open(total)
    assert equal(total, cohort.plain_sum())
    assert list(cohort.server.doubts()) == ["store-002"]


def test_two_holders_of_eight_that_lie_about_all_shares_are_got_around_and_named() -> None:
    cohort = Cohort(8).keys().shares().uploads().signatures()
    liars = ("store-001", "store-005")  # no run of 6 of 8 on the ring is without both
    for name in cohort.names:
        revealed = cohort.clients[name].reveal(cohort.signed)
        if name in liars:
            wrong = {of: bytes(33 - len(share)) + share[::-1] for of, share in revealed.seeds.items()}
            revealed = replace(revealed, seeds=wrong)
        cohort.server.add_revealed(revealed)
    total = cohort.masked_sum()
    cohort.server.open(total)
    assert equal(total, cohort.plain_sum())
    assert tuple(sorted(cohort.server.doubts())) == liars
    assert not cohort.server.suspects


def test_a_survivor_that_was_revoked_since_cannot_confirm() -> None:
    cohort = Cohort(4, signed=True).keys().shares().uploads()
    known = {name: key for name, key in (cohort.identities or {}).items() if name != "store-003"}
    cohort.server = ServerRound(cohort.server.record, identities=known)
    with pytest.raises(RefusedError, match="not signed by the identity key of 'store-003'"):
        cohort.signatures(reversed(cohort.names))
    assert equal(cohort.signatures(cohort.names[:3]).opened(cohort.names[:3]), cohort.plain_sum())


@pytest.mark.parametrize("field", ["mask_key", "seal_key"])
def test_a_key_with_which_every_secret_is_the_same(field: str) -> None:
    cohort = Cohort(3)
    shown = cohort.clients["store-001"].advertisement
    with pytest.raises(RefusedError, match="gives the same secret with all others"):
        cohort.server.add_keys(replace(shown, **{field: bytes(32)}))  # type: ignore[arg-type]


def test_a_store_that_deals_unreadable_shares_does_not_spoil_the_sum() -> None:
    cohort = Cohort(5).keys()
    for name in cohort.names:
        dealt = cohort.clients[name].deal(cohort.roster)
        if name == "store-004":
            dealt = replace(dealt, sealed=dict(dealt.sealed) | {"store-000": bytes(SEALED_BYTES)})
        cohort.server.add_shares(dealt)
    cohort.server.close_shares()
    cohort.uploads()
    assert cohort.clients["store-000"].unreadable == ("store-004",)
    assert equal(cohort.signatures().opened(), cohort.plain_sum())


STAGES: dict[str, Callable[[Cohort], object]] = {
    "keys": Cohort.keys, "shares": Cohort.shares, "uploads": Cohort.uploads, "signatures": Cohort.signatures,
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_is_killed_after_a_stage_resumes_with_its_record(stage: str) -> None:
    cohort, restarted = Cohort(4, signed=True), False
    for name, step in STAGES.items():
        step(cohort)
        if name == stage:
            record = pickle.loads(pickle.dumps(cohort.server.record))
            cohort.server, restarted = ServerRound(record, identities=cohort.identities), True
    assert restarted
    assert equal(cohort.opened(), cohort.plain_sum())


def test_a_server_that_is_killed_while_shares_arrive_asks_again_and_gets_the_same() -> None:
    cohort = Cohort(4).keys().shares().uploads().signatures()
    cohort.server.add_revealed(cohort.clients["store-000"].reveal(cohort.signed))
    cohort.server = ServerRound(cohort.server.record)
    assert not cohort.server.can_open()
    assert equal(cohort.opened(), cohort.plain_sum())


def test_the_record_of_a_server_has_no_secret_and_no_share() -> None:
    cohort = Cohort(4).keys()
    secrets = [client._secrets for client in cohort.clients.values()]
    hidden = [s.seed for s in secrets] + [key.private_bytes_raw() for s in secrets for key in (s.mask_key, s.seal_key)]
    cohort.shares()
    for client in cohort.clients.values():
        hidden += [part for held in client._held.values() for part in (held.seed, held.mask_key)]
    cohort.uploads().signatures()
    for client in cohort.clients.values():
        revealed = client.reveal(cohort.signed)
        cohort.server.add_revealed(revealed)
        hidden += [*revealed.seeds.values()]
        assert not any(repr(part) in repr(revealed) for part in hidden)
    written = pickle.dumps(cohort.server.record)
    assert not any(part in written for part in hidden)
    shown = repr((secrets, cohort.server.record, cohort.clients["store-000"]._held))
    assert not any(repr(part) in shown for part in hidden)


def test_masked_uploads_say_nothing_of_their_values() -> None:
    context = replace(CONTEXT, sizes=((16, 100_000), (32, 50_000), (64, 25_000)))
    cohort = Cohort(3, context=context)
    cohort.plain = {name: tuple(np.zeros_like(v) for v in values(context, 0)) for name in cohort.names}
    cohort.keys().shares().uploads()
    rows = [np.concatenate([vector.view(np.uint8) for vector in cohort.masked[name]]) for name in cohort.names]
    for row in (*rows, rows[0] ^ rows[1], rows[0] - rows[2]):
        assert 120 < chi_square(row) < 391  # six deviations of 22.6 around 255
    total = cohort.masked_sum()
    assert chi_square(total[0].view(np.uint8)) < 391  # still under the members' own masks
    assert equal(cohort.signatures().opened(), cohort.plain_sum())


def chi_square(row: NDArray[np.uint8]) -> float:
    counts, expected = np.bincount(row, minlength=256), row.size / 256
    return float((np.square(counts - expected) / expected).sum())
