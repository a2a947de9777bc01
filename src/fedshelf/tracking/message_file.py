"""A client's message as tensors and a JSON object, for files: the header is the wire's, the vectors stay tensors.

On the wire a message's vectors are bytes with a digest (`rounds.payload`); here they can be views of a mapped file.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from fedshelf.core.messages import ClientMessage, TaskKey, Upload
from fedshelf.rounds import payload

_DELTA = "delta"


def split(message: ClientMessage) -> tuple[dict[str, Tensor], str]:
    """The message's vectors by name, and its plain fields as JSON."""
    header = payload.encode_header(message, "")
    if not isinstance(message, Upload):
        return {}, header
    return {
        _DELTA: message.delta,
        **{payload.AUXILIARY + name: vector for name, vector in message.auxiliary.items()},
    }, header


def join(vectors: Mapping[str, Tensor], header: str) -> ClientMessage:
    """The message that `split` took apart, equal to the last bit; its vectors are the ones given.

    Raises:
        RefusedError: the header is not one of ours.
        KeyError, TypeError, ValueError: neither are its fields.
    """
    fields: dict[str, Any] = json.loads(header)
    if fields["kind"] != Upload.__name__.lower():
        return cast("ClientMessage", payload.decode(header, b""))  # `split` takes no other
    del fields["kind"], fields["body"]
    return Upload(
        key=TaskKey(**fields.pop("key")),
        delta=vectors[_DELTA],
        auxiliary={
            name.removeprefix(payload.AUXILIARY): vector
            for name, vector in vectors.items()
            if name.startswith(payload.AUXILIARY)
        },
        **fields,
    )
