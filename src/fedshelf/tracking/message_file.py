"""A client's message as tensors and a JSON object, for files: the header is the wire's, the vectors stay tensors.

On the wire a message's vectors are bytes with a digest (`rounds.payload`); here they can be views of a mapped file.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from fedshelf.core.messages import ClientMessage
from fedshelf.rounds import payload


def split(message: ClientMessage) -> tuple[dict[str, Tensor], str]:
    """The message's vectors by name, and its plain fields as JSON."""
    return payload.vectors_of(message), payload.encode_header(message, "")


def join(vectors: Mapping[str, Tensor], header: str) -> ClientMessage:
    """The message that `split` took apart, equal to the last bit; its vectors are the ones given.

    Raises:
        RefusedError: they are not.
    """
    return cast("ClientMessage", payload.join(header, vectors))  # `split` takes no other
