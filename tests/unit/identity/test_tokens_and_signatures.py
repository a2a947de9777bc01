"""Tokens in one line of text, and requests that cannot be repeated, altered, or passed on."""

import datetime
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.errors import IdentityError
from fedshelf.identity.keys import KeyPair, PublicKey
from fedshelf.identity.signatures import SIGNATURE, Nonces, SignedRequest
from fedshelf.identity.tokens import PREFIX, Token

TOKEN = Token(
    addresses=("hq.example:8080", "[2001:db8::1]:8080"), authority="ab" * 32, secret="AbCd" * 6, name="Zürich [1]",
    expires=datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC),
)  # fmt: skip
REQUEST = SignedRequest(
    method="POST", path="/fedshelf/push", digest=hashlib.sha256(b"body").hexdigest(), session="s", time=time.time(),
    nonce="n", server="cd" * 32,
)  # fmt: skip


def test_a_token_is_one_line_that_survives_a_mail_program() -> None:
    text = str(TOKEN)
    assert text.isascii()
    assert not any(c.isspace() for c in text)
    assert len(text) < 400
    assert Token.parse(f"  {text[:60]}\n {text[60:]}\n") == TOKEN


@pytest.mark.parametrize("text", ["", "fedshelf1.", str(TOKEN)[:-7], f"x{TOKEN}", PREFIX + "e30", "fedshelf1.é"])
def test_a_damaged_token_is_named_without_being_shown(text: str) -> None:
    with pytest.raises(IdentityError, match="the token is incomplete or was changed: paste the whole token") as caught:
        Token.parse(text)
    assert not text or text not in str(caught.value) or text == PREFIX


@given(st.text())
def test_any_text_is_a_token_or_a_clear_error(text: str) -> None:
    with pytest.raises(IdentityError):
        Token.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, method="PUT"),
        lambda r: replace(r, path="/fedshelf/pull"),
        lambda r: replace(r, digest="0" * 64),
        lambda r: replace(r, session="t"),
        lambda r: replace(r, time=r.time + 1),
        lambda r: replace(r, nonce="m"),
        lambda r: replace(r, server="ef" * 32),
    ],
)
def test_a_signature_covers_everything(change: Callable[[SignedRequest], SignedRequest]) -> None:
    keys = KeyPair.generate()
    signature = REQUEST.signed_by(keys)[SIGNATURE]
    assert REQUEST.is_signed(keys.public, signature)
    assert not change(REQUEST).is_signed(keys.public, signature)
    assert not REQUEST.is_signed(KeyPair.generate().public, signature)


@pytest.mark.parametrize("signature", ["", "=", "AAAA", "é", "x" * 5000])
def test_a_malformed_signature_is_no_signature(signature: str) -> None:
    assert not REQUEST.is_signed(KeyPair.generate().public, signature)


@pytest.mark.parametrize("text", ["", "x", "A" * 44, "A" * 5000, "é" * 44, " A" + "B" * 43])
def test_a_malformed_key_is_not_valid(text: str) -> None:
    assert not PublicKey(text).is_valid
    assert not REQUEST.is_signed(PublicKey(text), REQUEST.signed_by(KeyPair.generate())[SIGNATURE])


def test_a_nonce_is_new_once_for_each_key() -> None:
    nonces = Nonces()
    assert nonces.is_new("a", "1")
    assert not nonces.is_new("a", "1")
    assert nonces.is_new("b", "1")
    assert nonces.is_new("a", "2")
