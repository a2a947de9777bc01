"""`tests.odd_client`, which also tells the test, on its standard output, each secret of a masked round that it makes.

Secrets of a round are in a client's memory only. A test that looks for them elsewhere has to know their bytes.
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from fedshelf.privacy.secure_aggregation import client, masking, shares
from fedshelf.privacy.secure_aggregation.keys import RoundSecrets
from fedshelf.privacy.secure_aggregation.shares import HeldShares
from tests import odd_client


def _bytes_in(made: Any) -> list[bytes]:
    match made:
        case bytes():
            return [made]
        case RoundSecrets():
            return [made.seed, made.mask_key.private_bytes_raw(), made.seal_key.private_bytes_raw()]
        case HeldShares():
            return [made.seed, made.mask_key]
        case dict():
            return [part for value in made.values() for part in _bytes_in(value)]
        case tuple():
            return _bytes_in(made[0])  # the secrets before what is shown of them
    return []


def telling(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, which tells the secrets that it returns."""

    @wraps(make)
    def wrapped(*given: Any) -> Any:
        made = make(*given)
        for secret in _bytes_in(made):
            print(json.dumps({"event": "secret", "made_by": make.__name__, "value": secret.hex()}), flush=True)
        return made

    return wrapped


if __name__ == "__main__":
    for module, name in (
        (client, "advertise"), (client, "deal"), (client, "agree"), (masking, "agree"), (masking, "derive"),
        (shares, "derive"),
    ):  # fmt: skip
        setattr(module, name, telling(getattr(module, name)))
    sys.exit(odd_client.main())
