"""A store checks the roster that a server shows, and keeps the newest."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedshelf.core.errors import IdentityError, RosterError
from fedshelf.identity import certificates, roster
from fedshelf.identity.chain import Chain
from fedshelf.identity.keys import KeyPair, PublicKey, text_of
from fedshelf.identity.roster import Roster
from fedshelf.identity.store_keys import Enrollment, StoreKeys


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "identity")


def enrolled(
    chain: Chain, folder: Path, name: str = "lyon", *, pin: PublicKey | None = None, replaces: bool = False
) -> StoreKeys:  # fmt: skip
    store = StoreKeys(folder, pin=pin)
    keys = store.next_pair()
    token = chain.add(name, authority="", addresses=("hq:8080",), replaces=replaces)
    _, certificate = chain.enroll(token.secret, name, certificates.signing_request(keys))
    pem = certificates.pem(certificate).decode("ascii")
    store.save(Enrollment(name=name, chain=chain.key, certificate=pem, authority=""), keys)
    return store


def test_the_roster_gives_the_active_keys_by_name_and_is_kept_privately(chain: Chain, tmp_path: Path) -> None:
    lyon, nice = enrolled(chain, tmp_path / "lyon"), enrolled(chain, tmp_path / "nice", "nice")
    enrolled(chain, tmp_path / "gone", "gone")
    chain.revoke("gone")
    assert lyon.roster() is None
    shown = lyon.accept(chain.signed_roster())
    assert shown.keys() == {"lyon": lyon.pair().public, "nice": nice.pair().public}
    assert StoreKeys(tmp_path / "lyon").roster() == shown
    assert stat.S_IMODE((tmp_path / "lyon" / "roster.json").stat().st_mode) == 0o600


def test_a_roster_that_another_key_has_signed_is_refused(chain: Chain, tmp_path: Path) -> None:
    store = enrolled(chain, tmp_path / "lyon")
    forged = chain.roster().signed(KeyPair.generate())
    with pytest.raises(RosterError, match="not signed by this chain's key"):
        store.accept(forged)
    assert store.roster() is None


def test_an_old_roster_is_refused_and_the_newest_is_kept(chain: Chain, tmp_path: Path) -> None:
    store = enrolled(chain, tmp_path / "lyon")
    old = chain.signed_roster()
    enrolled(chain, tmp_path / "nice", "nice")
    newest = store.accept(chain.signed_roster())
    with pytest.raises(RosterError, match="an older roster than number"):
        store.accept(old)
    assert StoreKeys(tmp_path / "lyon").roster() == newest


def test_two_rosters_of_one_number_are_refused(chain: Chain, tmp_path: Path) -> None:
    """A server that has the chain's key cannot show one store other members than the next, and hide it later."""
    store = enrolled(chain, tmp_path / "lyon")
    shown = store.accept(chain.signed_roster())
    other = Roster(number=shown.number, entries=shown.with_key("sybil", KeyPair.generate().public, "now").entries)
    with pytest.raises(RosterError, match="two rosters with the number"):
        store.accept(other.signed(chain._keys))


def test_a_roster_without_this_stores_key_is_refused(chain: Chain, tmp_path: Path) -> None:
    store = enrolled(chain, tmp_path / "lyon")
    enrolled(chain, tmp_path / "new", replaces=True)  # the name has another key
    with pytest.raises(RosterError, match="does not have this store's key as that of 'lyon'"):
        store.accept(chain.signed_roster())
    chain.revoke("lyon")
    with pytest.raises(RosterError, match="does not have this store's key"):
        store.accept(chain.signed_roster())


def test_a_restored_backup_is_accepted_once_its_roster_has_a_new_number(chain: Chain, tmp_path: Path) -> None:
    store = enrolled(chain, tmp_path / "lyon")
    backup = (tmp_path / "identity" / "roster.json").read_text()
    for name in ("nice", "lille", "metz"):
        enrolled(chain, tmp_path / name, name)
    store.accept(chain.signed_roster())
    (tmp_path / "identity" / "roster.json").write_text(backup)
    chain = Chain(tmp_path / "identity")
    with pytest.raises(RosterError, match="fedshelf enroll renumber"):
        store.accept(chain.signed_roster())
    while chain.roster().number <= (store.roster() or Roster()).number:  # more than one a second only in tests
        chain.renumber()
    assert set(store.accept(chain.signed_roster()).keys()) == {"lyon"}


def test_the_number_follows_the_clock_so_that_one_change_exceeds_all_before(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    enrolled(chain, tmp_path / "lyon")
    assert chain.roster().number == 2_000_000_000
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.0)  # a clock that was set back
    chain.renumber()
    assert chain.roster().number == 2_000_000_001
    newest = list(chain.audit.events())[-1]  # raises if the log does not continue
    assert (newest["event"], newest["roster"]) == ("roster signed again", 2_000_000_001)


def test_with_a_new_chain_the_roster_begins_anew(chain: Chain, tmp_path: Path) -> None:
    enrolled(chain, tmp_path / "lyon").accept(chain.signed_roster())
    other = Chain(tmp_path / "other")
    again = enrolled(other, tmp_path / "lyon")
    assert again.roster() is None
    assert again.accept(other.signed_roster()) == other.roster()


def test_a_pinned_key_is_checked_when_a_store_is_enrolled_and_with_each_roster(chain: Chain, tmp_path: Path) -> None:
    pin = KeyPair.generate().public
    with pytest.raises(RosterError, match=r"policy accepts .* only"):
        enrolled(chain, tmp_path / "lyon", pin=pin)
    assert StoreKeys(tmp_path / "lyon").enrollment() is None
    enrolled(chain, tmp_path / "nice", "nice", pin=chain.key).accept(chain.signed_roster())
    with pytest.raises(RosterError, match="roster-key"):
        StoreKeys(tmp_path / "nice", pin=pin).accept(chain.signed_roster())


def test_a_damaged_copy_is_named_with_what_to_do(chain: Chain, tmp_path: Path) -> None:
    store = enrolled(chain, tmp_path / "lyon")
    store.accept(chain.signed_roster())
    (tmp_path / "lyon" / "roster.json").write_text("{")
    with pytest.raises(IdentityError, match=r"roster.json' is damaged: .* delete it"):
        store.accept(chain.signed_roster())


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(number="7"),
        lambda fields: fields.update(number=-1),
        lambda fields: fields.update(number=2**70),
        lambda fields: fields.update(number=True),
        lambda fields: fields.update(stores={}),
        lambda fields: fields["stores"].append([]),
        lambda fields: fields["stores"][0].update(key="A" * 44),
        lambda fields: fields["stores"][0].update(key=["x"]),
        lambda fields: fields["stores"][0].update(name=3),
        lambda fields: fields["stores"][0].update(state="asleep"),
        lambda fields: fields["stores"].append({**fields["stores"][0], "name": "twin"}),
        lambda fields: fields["stores"].append({**fields["stores"][0], "key": KeyPair.generate().public.text}),
    ],
)
def test_what_the_chains_key_has_signed_is_checked_all_the_same(
    chain: Chain, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    store = enrolled(chain, tmp_path / "lyon")
    fields = json.loads(chain.signed_roster())
    del fields["signature"]
    change(fields)
    signature = text_of(chain._keys.sign(roster._content(fields)))
    with pytest.raises(RosterError):
        store.accept(json.dumps({**fields, "signature": signature}))


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, '{"number": ' + "9" * 5000 + "}", " " * (5 << 20)])
def test_text_that_is_no_roster_is_refused(chain: Chain, tmp_path: Path, text: str) -> None:
    store = enrolled(chain, tmp_path / "lyon")
    with pytest.raises(RosterError, match="not signed by this chain's key"):
        store.accept(text)


def test_nobody_is_enrolled_in_a_roster_that_stores_could_not_read(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled(chain, tmp_path / "lyon")
    monkeypatch.setattr("fedshelf.identity.chain.MAX_BYTES", 600)
    with pytest.raises(IdentityError, match="the roster has 2 entries and is full"):
        enrolled(chain, tmp_path / "nice", "nice")
    chain.revoke("lyon")  # always possible
