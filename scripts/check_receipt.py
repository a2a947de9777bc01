#!/usr/bin/env python3
"""Check a receipt of a round, with Python and the package `cryptography` alone.

    python check_receipt.py RECEIPT.json KEY

KEY is the chain's public key, as `fedshelf enroll key` prints it at headquarters: get it from there, not from the
receipt. Exit code 0: the key's owner has signed exactly this. 1: it was altered, or somebody else has signed it.
"""

import json
import sys
from base64 import urlsafe_b64decode
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec


def decoded(text: str) -> bytes:
    """Bytes from URL-safe base64 without padding."""
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def check(receipt: str, key: str) -> dict:
    """Return the receipt's fields; raise ValueError or InvalidSignature if it is not what the key's owner signed."""
    fields = json.loads(receipt)
    signature = decoded(fields.pop("signature"))
    if fields["chain"] != key:
        raise ValueError("it names another key")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), decoded(key))
    public.verify(signature, b"fedshelf receipt 1\n" + text.encode(), ec.ECDSA(hashes.SHA256()))
    return fields


def main() -> int:
    """Check the receipt that the arguments name, and print what it states."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    try:
        fields = check(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2])
    except OSError as error:
        print(f"cannot read the receipt: {error}")
        return 2
    except InvalidSignature:
        print("NOT VALID: it was altered, or the signature is not that of this key")
        return 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        print(f"NOT VALID: {error if isinstance(error, ValueError) else 'it is not a receipt'}")
        return 1
    print(f"valid: round {fields['round']} of run {fields['run']}, {fields['counted']} stores counted")
    print(f"protections: {', '.join(fields['protections']) or 'none'}")
    print(f"not protected: {'; '.join(fields['unprotected'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
