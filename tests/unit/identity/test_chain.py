"""Enrollment: tokens are used once, names belong to keys, and revoking takes effect at once."""

import datetime
import json
import stat
from pathlib import Path

import pytest
from cryptography import x509

from fedshelf.core.errors import IdentityError, IdentityFileError
from fedshelf.identity import certificates
from fedshelf.identity.chain import CERTIFICATE_LIFETIME, Chain
from fedshelf.identity.keys import PASSPHRASE_VARIABLE, KeyPair, PublicKey
from fedshelf.identity.roster import Roster, StoreState
from fedshelf.identity.tokens import Token

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "identity")


def token_for(chain: Chain, name: str, *, replaces: bool = False) -> Token:
    return chain.add(name, authority="ab" * 32, addresses=("hq:8080",), replaces=replaces)


def enroll(chain: Chain, token: Token, name: str = "", keys: KeyPair | None = None) -> KeyPair:
    keys = keys or KeyPair.generate()
    chain.enroll(token.secret, name, certificates.signing_request(keys))
    return keys


def test_a_token_admits_one_store_under_its_name(chain: Chain) -> None:
    token = token_for(chain, "lyon-03")
    keys = enroll(chain, token, "another name")
    entry = chain.find(keys.public)
    assert entry is not None
    assert (entry.name, entry.state) == ("lyon-03", StoreState.ACTIVE)
    with pytest.raises(IdentityError, match="unknown, used, or expired"):
        enroll(chain, token)


def test_the_certificate_is_for_the_stores_key_and_ends_after_ninety_days(chain: Chain) -> None:
    keys, now = KeyPair.generate(), datetime.datetime.now(datetime.UTC)
    _, certificate = chain.enroll(token_for(chain, "lyon").secret, "", certificates.signing_request(keys))
    authority = x509.load_pem_x509_certificate(chain.authority_file.read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert PublicKey.of(certificate.public_key()) == keys.public  # type: ignore[arg-type]
    assert abs(certificate.not_valid_after_utc - now - CERTIFICATE_LIFETIME) < datetime.timedelta(minutes=5)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=12)  # a slow clock accepts it


def test_an_invitation_admits_as_many_stores_as_it_says_each_under_its_own_name(chain: Chain) -> None:
    token = chain.invite(2, authority="", addresses=("hq:8080",))
    enroll(chain, token, "lyon")
    with pytest.raises(IdentityError, match="enrolled with another key"):
        enroll(chain, token, "lyon")
    enroll(chain, token, "paris")
    with pytest.raises(IdentityError, match="unknown, used, or expired"):
        enroll(chain, token, "nice")


def test_a_store_that_enrolls_twice_with_its_key_stays_one_store(chain: Chain) -> None:
    """The answer to the first time may have been lost on the way."""
    token = chain.invite(3, authority="", addresses=("hq:8080",))
    keys = enroll(chain, token, "lyon")
    enroll(chain, token, "lyon", keys)
    assert [entry.name for entry in chain.roster().entries] == ["lyon"]


def test_an_expired_token_admits_nobody(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    token = token_for(chain, "lyon")
    path = tmp_path / "tokens.json"
    tokens = json.loads(path.read_text())
    path.write_text(json.dumps([{**fields, "expires": NOW.timestamp() - 1} for fields in tokens]))
    with pytest.raises(IdentityError, match="unknown, used, or expired"):
        enroll(chain, token)


def test_without_a_token_only_an_open_server_admits_and_no_one_takes_anothers_name(tmp_path: Path) -> None:
    request = certificates.signing_request(KeyPair.generate())
    with pytest.raises(IdentityError, match="admits enrolled stores only"):
        Chain(tmp_path).enroll("", "lyon", request)
    chain = Chain(tmp_path, is_open=True)
    chain.enroll("", "lyon", request)
    with pytest.raises(IdentityError, match="enrolled with another key"):
        chain.enroll("", "lyon", certificates.signing_request(KeyPair.generate()))


def test_a_revoked_key_is_out_at_once_also_for_a_server_that_runs(tmp_path: Path) -> None:
    server, command_line = Chain(tmp_path), Chain(tmp_path)
    keys = enroll(server, token_for(command_line, "lyon"))
    assert server.find(keys.public).state is StoreState.ACTIVE  # type: ignore[union-attr]
    command_line.revoke("lyon")
    assert server.find(keys.public).state is StoreState.REVOKED  # type: ignore[union-attr]
    with pytest.raises(IdentityError, match="active key"):
        server.renew(keys.public, certificates.signing_request(keys))
    with pytest.raises(IdentityError, match="until it was revoked"):
        enroll(server, token_for(command_line, "lyon"), keys=keys)


def test_revoking_withdraws_a_token_that_was_not_used_yet(chain: Chain) -> None:
    token = token_for(chain, "lyon")
    chain.revoke("lyon")
    with pytest.raises(IdentityError, match="unknown, used, or expired"):
        enroll(chain, token)
    with pytest.raises(IdentityError, match="not enrolled"):
        chain.revoke("lyon")


def test_open_tokens_are_listed_without_their_secrets_and_ended(chain: Chain) -> None:
    chain.local_token()
    invitation = chain.invite(5, authority="", addresses=("hq:8080",))
    single = token_for(chain, "lyon")
    enroll(chain, invitation, "paris")
    first, second = chain.open_tokens()
    assert [(first.name, first.uses), (second.name, second.uses)] == [("", 4), ("lyon", 1)]
    with pytest.raises(IdentityError, match="no open token has the id beef"):
        chain.cancel([first.id, "beef"])
    assert chain.cancel([first.id]) == [first]
    with pytest.raises(IdentityError, match="unknown, used, or expired"):
        enroll(chain, invitation, "nice")
    assert chain.cancel(None) == [second]
    with pytest.raises(IdentityError, match="unknown, used, or expired"):
        enroll(chain, single)
    assert chain.open_tokens() == []
    chain.enroll(chain.local_token(), "local", certificates.signing_request(KeyPair.generate()))
    ended = [event for event in chain.audit.events() if event["event"] == "token ended"]
    assert [(event["id"], event.get("store")) for event in ended] == [(first.id, None), (second.id, "lyon")]
    assert all(event["operator"].startswith("user ") for event in ended)


def test_rotating_replaces_the_key_and_adding_does_not(chain: Chain) -> None:
    old = enroll(chain, token_for(chain, "lyon"))
    with pytest.raises(IdentityError, match="enrolled already"):
        token_for(chain, "lyon")
    new = enroll(chain, token_for(chain, "lyon", replaces=True))
    assert chain.find(old.public).state is StoreState.REVOKED  # type: ignore[union-attr]
    assert chain.roster().active("lyon").key == new.public  # type: ignore[union-attr]
    with pytest.raises(IdentityError, match="is not enrolled"):
        token_for(chain, "paris", replaces=True)


def test_a_new_token_for_a_store_replaces_the_one_before(chain: Chain) -> None:
    first, second = token_for(chain, "lyon"), token_for(chain, "lyon")
    with pytest.raises(IdentityError):
        enroll(chain, first)
    enroll(chain, second)


@pytest.mark.parametrize("name", ["", " lyon", "lyon ", "x" * 201])
def test_impossible_names_are_refused(chain: Chain, name: str) -> None:
    with pytest.raises(IdentityError, match="name has 1 to 200 characters"):
        token_for(chain, name)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\u2028b", "a\x07"])
def test_names_that_would_break_a_line_or_a_terminal_are_refused(chain: Chain, name: str) -> None:
    with pytest.raises(IdentityError, match="no line break and no control character"):
        token_for(chain, name)


def test_the_folder_is_private(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "identity")
    enroll(chain, token_for(chain, "lyon"))
    chain.local_token()
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "identity").iterdir()}
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700
    assert {name for name, mode in modes.items() if mode & 0o077} <= {"chain.pem"}


def test_no_secret_is_kept_or_logged(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    token = token_for(chain, "lyon")
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token.secret.encode() not in held
    assert {event["event"] for event in chain.audit.events()} == {"token made"}


def test_the_local_token_holds_also_after_the_open_tokens_were_deleted(tmp_path: Path) -> None:
    secret = Chain(tmp_path).local_token()
    (tmp_path / "tokens.json").unlink()
    chain = Chain(tmp_path)
    assert chain.local_token() == secret
    for name in ("lyon", "paris"):
        chain.enroll(secret, name, certificates.signing_request(KeyPair.generate()))


def test_a_roster_that_was_altered_is_not_used(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    enroll(chain, token_for(chain, "lyon"))
    path = tmp_path / "roster.json"
    path.write_text(path.read_text().replace("lyon", "nice"))
    with pytest.raises(IdentityError, match="damaged, or not signed"):
        chain.roster()


def test_a_store_can_check_the_roster_with_the_chains_key_alone(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    keys = enroll(chain, token_for(chain, "lyon"))
    text = (tmp_path / "roster.json").read_text()
    assert Roster.verified(text, chain.key).active("lyon").key == keys.public  # type: ignore[union-attr]
    with pytest.raises(IdentityError):
        Roster.verified(text, KeyPair.generate().public)


@pytest.mark.parametrize("damage", ["altered", "deleted"])
def test_nothing_starts_with_a_damaged_or_lost_roster_until_it_is_restored(tmp_path: Path, damage: str) -> None:
    """Revoked stores could come back."""
    chain = Chain(tmp_path)
    enroll(chain, token_for(chain, "lyon"))
    path = tmp_path / "roster.json"
    whole = path.read_text()
    path.write_text("x") if damage == "altered" else path.unlink()
    with pytest.raises(IdentityFileError, match=r"roster\.json.*restore it from a backup.*enroll renumber"):
        Chain(tmp_path)
    path.write_text(whole)
    assert Chain(tmp_path).roster().active("lyon") is not None


def test_a_chain_in_which_nobody_enrolled_needs_no_roster(tmp_path: Path) -> None:
    token_for(Chain(tmp_path), "lyon")
    assert Chain(tmp_path).roster() == Roster()


def test_the_chains_key_is_never_made_anew_while_stores_are_enrolled(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    enroll(chain, token_for(chain, "lyon"))
    (tmp_path / "chain.key").unlink()
    with pytest.raises(IdentityError, match="restore it from a backup"):
        Chain(tmp_path)


def test_a_passphrase_protects_the_chains_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    key = Chain(tmp_path).key
    assert b"ENCRYPTED" in (tmp_path / "chain.key").read_bytes()
    assert Chain(tmp_path).key == key
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "wrong")
    with pytest.raises(IdentityError, match="check FEDSHELF_PASSPHRASE"):
        Chain(tmp_path)
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    with pytest.raises(IdentityError, match="is encrypted: set FEDSHELF_PASSPHRASE"):
        Chain(tmp_path)


def test_the_authority_is_renewed_with_the_same_key_a_year_before_it_ends(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    old = x509.load_pem_x509_certificate(chain.authority_file.read_bytes())
    Chain(tmp_path, now=NOW + datetime.timedelta(days=700))
    assert x509.load_pem_x509_certificate(chain.authority_file.read_bytes()) == old
    Chain(tmp_path, now=NOW + datetime.timedelta(days=800))
    new = x509.load_pem_x509_certificate(chain.authority_file.read_bytes())
    assert new.not_valid_after_utc > old.not_valid_after_utc
    assert new.public_key() == old.public_key()  # what the old one issued is still valid
