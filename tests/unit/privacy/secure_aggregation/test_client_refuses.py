"""What a member refuses: messages of other rounds, out of order, twice or unsigned, and sums that reveal a store."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import MaskedPurpose, TaskKey
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.secure_aggregation.client import ClientRound
from fedshelf.privacy.secure_aggregation.context import RoundContext
from fedshelf.privacy.secure_aggregation.keys import RoundRoster, advertise
from fedshelf.privacy.secure_aggregation.server import ServerRecord, ServerRound
from fedshelf.privacy.secure_aggregation.survivors import Survivors
from fedshelf.privacy.secure_aggregation.unmasking import Signatures
from tests.unit.privacy.secure_aggregation.cohort import CONTEXT, Cohort, OpenedSums, equal, identity, roster_of, values

OTHERS = {
    "round": replace(CONTEXT, key=replace(CONTEXT.key, round=4)),
    "attempt": replace(CONTEXT, key=replace(CONTEXT.key, attempt=1)),
    "run": replace(CONTEXT, key=replace(CONTEXT.key, run_id="other")),
    "model": replace(CONTEXT, model="other"),
    "configuration": replace(CONTEXT, config="other"),
    "sizes": replace(CONTEXT, sizes=((16, 38), (32, 3), (64, 5))),
    "threshold": replace(CONTEXT, threshold=4),
    "purpose": replace(CONTEXT, purpose=MaskedPurpose.EVALUATE),
}


def signed_cohort(count: int = 4) -> Cohort:
    return Cohort(count, signed=True)


def first(cohort: Cohort) -> ClientRound:
    return cohort.clients[cohort.names[0]]


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_keys_of_another_context_in_the_roster(other: RoundContext) -> None:
    cohort = signed_cohort().keys()
    shown = advertise("store-001", other, identity("store-001"))[1]
    roster = RoundRoster(
        advertisements=(cohort.roster.advertisements[0], shown, *cohort.roster.advertisements[2:])
    )  # fmt: skip
    with pytest.raises(RefusedError, match="the keys of 'store-001' are for another round, attempt, model or conf"):
        first(cohort).deal(roster)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_keys_of_another_context_whose_label_the_server_has_changed(other: RoundContext) -> None:
    cohort = signed_cohort().keys()
    shown = replace(advertise("store-001", other, identity("store-001"))[1], context=CONTEXT.digest)
    roster = RoundRoster(advertisements=(cohort.roster.advertisements[0], shown, *cohort.roster.advertisements[2:]))
    with pytest.raises(RefusedError, match="the keys of 'store-001' are not signed by its identity key"):
        first(cohort).deal(roster)


def test_a_member_that_the_server_has_invented() -> None:
    cohort = signed_cohort().keys()
    shown = advertise("store-999", CONTEXT, KeyPair.generate())[1]
    with pytest.raises(RefusedError, match="'store-999' is not in the chain's roster: its keys may be invented"):
        first(cohort).deal(RoundRoster(advertisements=(*cohort.roster.advertisements, shown)))


def test_keys_that_the_server_has_replaced_by_its_own() -> None:
    cohort = signed_cohort().keys()
    shown = advertise("store-002", CONTEXT, KeyPair.generate())[1]
    changed = tuple(shown if one.member == "store-002" else one for one in cohort.roster.advertisements)
    with pytest.raises(RefusedError, match="the keys of 'store-002' are not signed by its identity key"):
        first(cohort).deal(RoundRoster(advertisements=changed))


def test_a_roster_without_its_own_keys() -> None:
    cohort = signed_cohort().keys()
    again = ClientRound(
        cohort.names[0], CONTEXT, opened_sums=OpenedSums(), identity=identity(cohort.names[0]),
        identities=roster_of(cohort.names),
    )  # fmt: skip
    with pytest.raises(RefusedError, match="does not have the keys that this store has shown"):
        again.deal(cohort.roster)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda shown: (*shown, shown[-1]), "has a store twice"),
        (lambda shown: tuple(reversed(shown)), "is not sorted"),
        (lambda shown: (*shown[:-1], replace(shown[-1], mask_key=shown[0].mask_key)), "has a key twice"),
        (lambda shown: (*shown[:-1], replace(shown[-1], mask_key=b"short")), "another length than 32 bytes"),
        (lambda shown: (*shown[:-1], replace(shown[-1], seal_key=bytes(32))), "gives the same secret with all others"),
        (lambda shown: shown[:2], "needs at least 3 stores: the round has 2"),
    ],
)
def test_a_roster_that_no_honest_server_makes(
    change: Callable[[tuple[object, ...]], tuple[object, ...]], told: str
) -> None:
    cohort = Cohort(4).keys()
    roster = RoundRoster(advertisements=change(cohort.roster.advertisements))  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match=told):
        first(cohort).deal(roster)


def test_a_repeated_message_gets_the_same_reply_and_a_different_one_is_refused() -> None:
    cohort = Cohort(4).keys()
    client = first(cohort)
    assert client.deal(cohort.roster) == client.deal(cohort.roster)
    with pytest.raises(RefusedError, match="a second, different message of stage 'roster'"):
        client.deal(RoundRoster(advertisements=cohort.roster.advertisements[:3]))
    cohort.shares().uploads().signatures()
    assert client.reveal(cohort.signed) == client.reveal(cohort.signed)
    assert equal(cohort.opened(), cohort.plain_sum())


def test_stages_out_of_order() -> None:
    cohort, ahead = Cohort(4).keys(), Cohort(4).keys().shares().uploads().signatures()
    client = first(cohort)
    for stage, told in (
        (lambda: client.receive(ahead.server.delivery(ahead.names[0])), "'delivery' is out of order: 'roster'"),
        (lambda: client.mask(values(CONTEXT, 1), "model"), "'upload' is out of order: 'roster'"),
        (lambda: client.confirm(ahead.survivors), "'survivors' is out of order: 'roster'"),
        (lambda: client.reveal(ahead.signed), "'signatures' is out of order: 'roster'"),
    ):
        with pytest.raises(RefusedError, match=told):
            stage()
    cohort.shares().uploads()
    with pytest.raises(RefusedError, match="'signatures' is out of order: 'survivors' comes before it"):
        client.reveal(Signatures(roster=cohort.roster.digest, signatures={}))


def test_messages_of_another_round() -> None:
    cohort, other = Cohort(4).keys().shares(), Cohort(4, context=OTHERS["round"]).keys().shares()
    other.uploads().signatures()
    told = "belongs to another round, attempt or roster"
    with pytest.raises(RefusedError, match=told):
        first(cohort).receive(other.server.delivery(other.names[0]))
    cohort.uploads()
    with pytest.raises(RefusedError, match=told):
        first(cohort).confirm(other.survivors)
    cohort.signatures()
    with pytest.raises(RefusedError, match=told):
        first(cohort).reveal(other.signed)


def test_too_few_dealers_or_not_all_of_their_shares() -> None:
    cohort = Cohort(5).keys().shares()
    delivery, client = cohort.server.delivery(cohort.names[0]), first(cohort)
    few = cohort.names[:3]
    for changed, told in (
        (replace(delivery, dealers=few, sealed={n: delivery.sealed[n] for n in few[1:]}), "threshold is 4"),
        (replace(delivery, sealed={n: delivery.sealed[n] for n in few[1:]}), "not those of all neighbors"),
        (replace(delivery, dealers=(*cohort.names, "stranger")), "not sorted members"),
        (replace(delivery, dealers=cohort.names[1:]), "not sorted members of the round with this store"),
    ):
        with pytest.raises(RefusedError, match=told):
            client.receive(changed)
    client.receive(delivery)


def test_a_second_upload_under_the_same_masks() -> None:
    cohort = Cohort(3).keys().shares().uploads()
    with pytest.raises(RefusedError, match="two under the same masks would be readable"):
        first(cohort).mask(values(CONTEXT, 9), "model")


def test_another_model_and_other_sizes_than_announced() -> None:
    cohort = Cohort(3).keys().shares()
    client = first(cohort)
    client.receive(cohort.server.delivery(cohort.names[0]))
    with pytest.raises(RefusedError, match="the model to train is not the one"):
        client.mask(values(CONTEXT, 9), "other")
    with pytest.raises(RefusedError, match="instead of"):
        client.mask(values(OTHERS["sizes"], 9), "model")
    with pytest.raises(RefusedError, match="instead of"):
        client.mask(tuple(vector.astype(np.int64) for vector in values(CONTEXT, 9)), "model")


def test_survivors_that_no_honest_server_names() -> None:
    cohort = Cohort(5).keys().shares(Cohort(5).names[:4]).uploads(Cohort(5).names[:4])
    client, names = first(cohort), cohort.names
    for members, told in (
        (names[:3], "3 stores survived, and the threshold is 4"),
        (names, "not sorted stores that have dealt shares"),
        ((names[1], names[0], names[2], names[3]), "not sorted"),
        ((names[0], *names[:4]), "not sorted"),
    ):
        with pytest.raises(RefusedError, match=told):
            client.confirm(Survivors(roster=cohort.roster.digest, members=members))
    cohort = Cohort(5).keys().shares().uploads()
    with pytest.raises(RefusedError, match="do not have this store"):
        first(cohort).confirm(Survivors(roster=cohort.roster.digest, members=names[1:]))


def test_a_sum_of_fewer_stores_than_the_store_allows() -> None:
    cohort = Cohort(6, min_cohort=7).keys()
    with pytest.raises(RefusedError, match="6 stores are in the round, and this store takes part in sums of at"):
        first(cohort).deal(cohort.roster)
    cohort = Cohort(6, min_cohort=6, context=replace(CONTEXT, threshold=5)).keys().shares().uploads(cohort.names[:5])
    with pytest.raises(RefusedError, match="5 stores survived, and this store takes part in sums of at least 6 only"):
        first(cohort).confirm(cohort.survivors)


def test_survivors_are_confirmed_once() -> None:
    cohort = Cohort(5).keys().shares().uploads()
    first(cohort).confirm(cohort.survivors)
    with pytest.raises(RefusedError, match="a second, different message of stage 'survivors'"):
        first(cohort).confirm(Survivors(roster=cohort.roster.digest, members=cohort.names[:4]))


def test_signatures_of_too_few_of_other_sets_of_strangers_and_forged_ones() -> None:
    cohort = signed_cohort(5).keys().shares().uploads().signatures()
    client, signatures = first(cohort), dict(cohort.signed.signatures)
    smaller = signed_cohort(5).keys().shares().uploads().signatures()
    few = dict(list(signatures.items())[:3])
    swapped = dict(zip(signatures, [*list(signatures.values())[1:], b""], strict=True))
    for wrong in (few, few | {"stranger": b"x", "store-003": b"x"}, dict(smaller.signed.signatures), swapped):
        with pytest.raises(
            RefusedError, match=r"confirmed these survivors, and the threshold is 4: this store reveals"
        ):
            client.reveal(Signatures(roster=cohort.roster.digest, signatures=wrong))
    assert not cohort.opened_sums[cohort.names[0]].known()
    client.reveal(cohort.signed)


def test_no_member_reveals_both_kinds_of_shares_of_one_store() -> None:
    cohort = Cohort(5).keys().shares().uploads(Cohort(5).names[:4]).signatures(Cohort(5).names[:4])
    for name in cohort.survivors.members:
        revealed = cohort.clients[name].reveal(cohort.signed)
        assert set(revealed.seeds) == set(cohort.survivors.members)
        assert set(revealed.mask_keys) == {"store-004"}
    with pytest.raises(RefusedError, match="a second, different message"):
        first(cohort).confirm(Survivors(roster=cohort.roster.digest, members=cohort.names))


def test_a_second_set_for_the_same_attempt_is_refused_after_a_restart_too() -> None:
    cohort = Cohort(4).keys().shares().uploads().signatures()
    cohort.opened()
    restarted = Cohort(4, opened_sums=cohort.opened_sums).keys().shares().uploads()
    with pytest.raises(RefusedError, match="another set of stores was confirmed for round 3, attempt 0"):
        restarted.signatures()


@pytest.mark.parametrize(("leaving", "allowed"), [(0, True), (1, False), (2, False), (3, True)])
def test_sums_over_one_model_are_equal_or_differ_by_the_minimum_cohort(leaving: int, allowed: bool) -> None:
    before = Cohort(10, context=replace(CONTEXT, threshold=7)).keys().shares().uploads().signatures()
    before.opened()
    later = Cohort(10, context=replace(CONTEXT, threshold=7, key=replace(CONTEXT.key, attempt=1)),
                   opened_sums=before.opened_sums)  # fmt: skip
    staying = later.names[leaving:]
    later.keys().shares().uploads(staying)
    if allowed:
        assert equal(later.signatures(staying).opened(staying), later.plain_sum())
        return
    with pytest.raises(RefusedError, match=f"differ by {leaving} store.* from those of a sum over the same model"):
        later.signatures(staying)


def test_an_older_attempt_is_not_opened_after_a_newer_one_with_other_survivors() -> None:
    opened_sums = {name: OpenedSums() for name in Cohort(4).names}
    context = replace(CONTEXT, threshold=3)
    older = Cohort(4, context=context, opened_sums=opened_sums).keys().shares().uploads().signatures()
    newer = Cohort(4, context=replace(context, key=replace(context.key, attempt=1)), opened_sums=opened_sums)
    newer.keys().shares().uploads(newer.names[1:]).signatures(newer.names[1:]).opened(newer.names[1:])
    with pytest.raises(RefusedError, match="differ by 1 store"):
        older.clients[older.names[1]].reveal(older.signed)


@pytest.mark.parametrize("change", [{"model": "one bit changed"}, {"key": replace(CONTEXT.key, round=4, attempt=0)}])
def test_the_difference_counts_for_one_round_and_for_one_model(change: dict[str, Any]) -> None:
    context = replace(CONTEXT, threshold=3)
    before = Cohort(4, context=context).keys().shares().uploads().signatures()
    before.opened()
    later = replace(context, **{"key": replace(CONTEXT.key, attempt=1)} | change)
    cohort = Cohort(4, context=later, opened_sums=before.opened_sums).keys().shares().uploads(before.names[1:])
    with pytest.raises(RefusedError, match="differ by 1 store from those of a sum over the same model or photos"):
        cohort.signatures(cohort.names[1:])


def test_another_model_may_have_other_survivors() -> None:
    before = Cohort(4, context=replace(CONTEXT, threshold=3)).keys().shares().uploads().signatures()
    before.opened()
    context = replace(CONTEXT, threshold=3, model="next", key=replace(CONTEXT.key, round=4))
    later = Cohort(4, context=context, opened_sums=before.opened_sums, seed=100).keys().shares()
    later.uploads(before.names[1:])
    assert equal(later.signatures(later.names[1:]).opened(later.names[1:]), later.plain_sum())


def test_another_model_for_which_a_member_sends_the_same_integers_may_not() -> None:
    """Sums over photos do not depend on the output layer: the two differ by exactly the member that is left out."""
    before = Cohort(4, context=replace(CONTEXT, threshold=3)).keys().shares().uploads().signatures()
    before.opened()
    context = replace(CONTEXT, threshold=3, model="next", key=replace(CONTEXT.key, round=4))
    later = Cohort(4, context=context, opened_sums=before.opened_sums).keys().shares().uploads(before.names[1:])
    with pytest.raises(RefusedError, match="differ by 1 store from those of a sum over the same model or photos"):
        later.signatures(later.names[1:])


EVALUATION = replace(CONTEXT, threshold=3, sizes=((64, 4),), purpose=MaskedPurpose.EVALUATE)


def test_evaluations_of_a_round_may_be_those_of_fewer_stores_than_its_uploads() -> None:
    trained = Cohort(4, context=replace(CONTEXT, threshold=3)).keys().shares().uploads().signatures()
    trained.opened()
    later = Cohort(4, context=EVALUATION, opened_sums=trained.opened_sums).keys().shares().uploads(trained.names[1:])
    assert equal(later.signatures(later.names[1:]).opened(later.names[1:]), later.plain_sum())


@pytest.mark.parametrize(
    "change", [{"purpose": MaskedPurpose.CHOOSE}, {"key": replace(CONTEXT.key, attempt=1)}, {"sizes": ((64, 9),)}]
)
def test_evaluations_of_a_round_are_not_opened_for_sets_that_differ_by_one_store(change: dict[str, Any]) -> None:
    before = Cohort(4, context=EVALUATION).keys().shares().uploads().signatures()
    before.opened()
    later = Cohort(4, context=replace(EVALUATION, **change), opened_sums=before.opened_sums)
    later.keys().shares().uploads(before.names[1:])
    with pytest.raises(RefusedError, match=r"differ by 1 store|another set of stores was confirmed for round 3"):
        later.signatures(later.names[1:])


def test_evaluations_of_another_round_may_have_other_survivors_though_a_store_sends_the_same_figures() -> None:
    """A store without validation photos sends zeros in every round."""
    before = Cohort(4, context=EVALUATION).keys().shares().uploads().signatures()
    before.opened()
    context = replace(EVALUATION, model="next", key=replace(CONTEXT.key, round=4))
    later = Cohort(4, context=context, opened_sums=before.opened_sums).keys().shares().uploads(before.names[1:])
    assert equal(later.signatures(later.names[1:]).opened(later.names[1:]), later.plain_sum())


def test_keys_for_an_evaluation_are_none_for_an_upload() -> None:
    sizes = replace(CONTEXT, sizes=((64, 4),))
    cohort = Cohort(4, context=replace(sizes, purpose=MaskedPurpose.EVALUATE))
    server = ServerRound(ServerRecord(context=sizes))
    with pytest.raises(RefusedError, match="for another round, attempt, model or configuration"):
        server.add_keys(first(cohort).advertisement)


def test_a_context_of_another_run_configuration_size_or_threshold() -> None:
    CONTEXT.check(run_id="run", config="config", sizes=CONTEXT.sizes, threshold=None)
    for name in ("run", "configuration", "sizes", "threshold"):
        told = f"another {'config' if name == 'configuration' else name} than this run's"
        with pytest.raises(RefusedError, match=told):
            OTHERS[name].check(run_id="run", config="config", sizes=CONTEXT.sizes, threshold=None)


def test_a_server_that_shows_two_models_opens_neither_sum() -> None:
    """Without identity keys, the server can relabel keys; the shares and masks of the two halves do not fit."""
    half = Cohort(6).names[:3]
    other = OTHERS["model"]
    clients = {
        name: ClientRound(name, CONTEXT if name in half else other, opened_sums=OpenedSums())
        for name in Cohort(6).names
    }
    servers = {}
    for context in (CONTEXT, other):
        servers[context.model] = server = ServerRound(ServerRecord(context=context))
        for client in clients.values():
            server.add_keys(replace(client.advertisement, context=context.digest))
        server.close_keys()
    dealt = {
        name: client.deal(servers["model" if name in half else "other"].record.roster)  # type: ignore[arg-type]
        for name, client in clients.items()
    }
    for server in servers.values():
        for shares in dealt.values():
            server.add_shares(replace(shares, roster=server._roster))
        server.close_shares()
    for name, client in clients.items():
        client.receive(servers["model" if name in half else "other"].delivery(name))
        assert set(client.unreadable) == set(clients) - set(half if name in half else set(clients) - set(half))
        server = servers["model" if name in half else "other"]
        vectors = tuple(np.zeros_like(vector) for vector in values(CONTEXT, 0))
        upload = client.mask(vectors, "model" if name in half else "other")
        for each in servers.values():
            each.add_upload(replace(upload, roster=each._roster))
    for label, server in servers.items():
        survivors = server.close_uploads()
        mine = [name for name in clients if (name in half) == (label == "model")]
        for name in mine:
            server.add_signature(clients[name].confirm(survivors))
        with pytest.raises(RefusedError, match="3 stores confirmed the survivors, and the threshold is 5"):
            server.signatures()
        forged = Signatures(roster=server._roster, signatures=dict.fromkeys(clients, b""))
        for name in mine:
            server.add_revealed(clients[name].reveal(forged))
        assert not server.can_open()


def test_the_key_of_a_task_is_part_of_what_is_announced() -> None:
    digests = {other.digest for other in OTHERS.values()} | {CONTEXT.digest}
    assert len(digests) == len(OTHERS) + 1
    assert replace(CONTEXT, key=TaskKey(run_id="run", round=3, attempt=0)).digest == CONTEXT.digest
