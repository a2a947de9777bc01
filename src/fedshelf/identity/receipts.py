"""Receipts: what a server states of a round, signed by the chain's key.

Anybody with the chain's public key can check one, without FedShelf: see `scripts/check_receipt.py`.
"""

import json
from collections.abc import Mapping
from typing import Any

from fedshelf.core.errors import RefusedError
from fedshelf.identity.keys import KeyPair, PublicKey, bytes_of, text_of

_CONTEXT = b"fedshelf receipt 1\n"


def signed(fields: Mapping[str, Any], keys: KeyPair) -> str:
    """A receipt as JSON text.

    Args:
        fields: what it states; plain values of JSON.
        keys: the chain's.
    """
    stated = {**fields, "chain": keys.public.text}
    return (
        json.dumps({**stated, "signature": text_of(keys.sign(_content(stated)))}, indent=1, ensure_ascii=False) + "\n"
    )


def verified(text: str, key: PublicKey) -> dict[str, Any]:
    """The fields of a receipt.

    Args:
        text: the receipt.
        key: the chain's key.

    Raises:
        RefusedError: it is not a receipt, was altered, or is signed by another key.
    """
    try:
        fields = json.loads(text)
        signature = bytes_of(fields.pop("signature"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise RefusedError("this is not a receipt: it is not JSON with a signature") from None
    if not key.is_valid or fields.get("chain") != key.text or not key.verifies(signature, _content(fields)):
        raise RefusedError("the receipt was altered, or another chain's key has signed it")
    found: dict[str, Any] = fields
    return found


def _content(fields: Mapping[str, Any]) -> bytes:
    return _CONTEXT + json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
