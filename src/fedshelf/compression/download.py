"""Downloads of the model: complete, or as the compressed difference to the model that a client holds.

    server:  d_t  <- encode(w_t - m_{t-1})                client, holding m_{t-1}:
             m_t  <- m_{t-1} + decode(d_t)                  m_t <- m_{t-1} + decode(d_t)

m_t is the model that all sides decode bit for bit; clients train on it, and it is evaluated and published. What d_t
leaves out is part of the next difference, so errors do not accumulate. Updates are added to w_t itself (an exact
central model, as in Philippenko & Dieuleveut 2021, "Preserved central model for faster bidirectional compression",
Algorithm 1, with m as the memory).

Statistics are few, and a rounded variance might be negative: differences contain their values instead.

A client that missed rounds is sent the differences in between, if they are smaller than the model; otherwise it is sent
the complete model. Models are named by digest, and a client verifies the name of what it has decoded.

Shapes: T shared trainable values, S shared values.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedshelf.compression.chain import decode, parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import AUXILIARY, PARAMS, STATISTICS, TRAINABLE, Broadcast, ModelDelta, Vector
from fedshelf.core.params import Layout
from fedshelf.core.state import ModelState
from fedshelf.serialization import blob

WHOLE = parse("none")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Difference:
    """A `ModelDelta` with its encoded vectors.

    Attributes:
        base: the model that the difference is added to.
        model: the resulting model.
        vectors: trainable [T] and statistics [S - T].
    """

    base: str
    model: str
    vectors: Mapping[str, Encoded]

    @property
    def num_bytes(self) -> int:
        return sum(encoded.num_bytes for encoded in self.vectors.values())


def name_of(model: Tensor) -> str:
    """A model's name: the digest of its values [S] in memory."""
    return blob.write({"": model}).digest


class Downloads:
    """The server's side: makes the differences, and tracks which client holds which model.

    Args:
        codec_policy: the codec of downloads.
        layout: the model's layout.
    """

    def __init__(self, codec_policy: CodecPolicy, layout: Layout) -> None:
        self._coding = codec_policy
        self._layout = layout
        self._holds: dict[str, str] = {}  # address -> name of a model
        self._sent: dict[str, str] = {}
        self._name = ""
        self._model: Tensor | None = None
        self._whole: _Difference | None = None
        self._recent: deque[_Difference] = deque()

    def start(self, model: ModelState) -> ModelState:
        """The model to start with: the first one is sent uncompressed."""
        return model if self._coding.is_plain or model.sent is not None else replace(model, sent=model.params)

    def advance(self, model: ModelState, round: int) -> ModelState:
        """Update `model.sent`, still that of the previous round, to the model that clients will decode."""
        before = model.sent
        if self._coding.is_plain or before is None:
            return model
        if self._model is not before:  # the first round of this process
            self._model, self._name = before, name_of(before)
        difference, after = self._encode(model.params, before, round)
        self._recent.append(difference)
        while sum(recent.num_bytes for recent in self._recent) >= 4 * self._layout.num_shared:
            self._recent.popleft()
        self._model, self._name, self._whole = after, difference.model, None
        return replace(model, sent=after)

    def restart(self) -> None:
        """Forget all differences: the newest model was rolled back, so they no longer lead to the current one."""
        self._recent.clear()

    def message(self, address: str, broadcast: Broadcast, *, held_at_join: str) -> Broadcast:
        """Encode a broadcast of the current model for one client.

        Args:
            address: the client's connection.
            broadcast: the broadcast with the plain model.
            held_at_join: the model that the client held when it joined.
        """
        if self._coding.is_plain:
            return broadcast
        if self._model is not broadcast.params:
            self._model, self._name, self._whole = broadcast.params, name_of(broadcast.params), None
        self._sent[address] = self._name
        path = self._path_from(self._holds.get(address, held_at_join))
        vectors: dict[str, Vector] = {
            f"{number}/{segment}": encoded
            for number, difference in enumerate(path)
            for segment, encoded in difference.vectors.items()
        }
        deltas = tuple(ModelDelta(base=difference.base, model=difference.model) for difference in path)
        return replace(broadcast, model=self._name, deltas=deltas, vectors={**vectors, **_without_params(broadcast)})

    def confirm(self, address: str, *, failed: bool) -> None:
        """Record that the client replied: it holds the model that it was sent, or an unknown one after a failure."""
        self._holds[address] = "" if failed else self._sent.get(address, "")

    def _path_from(self, held: str) -> tuple[_Difference, ...]:
        if held == self._name:
            return ()
        bases = [difference.base for difference in self._recent]
        if held in bases and self._recent[-1].model == self._name:
            return tuple(self._recent)[bases.index(held) :]
        if self._whole is None and self._model is not None:
            parts = self._model.split([self._layout.num_trainable, len(self._model) - self._layout.num_trainable])
            encoded = {n: WHOLE.encode(part, seed=0) for n, part in zip((TRAINABLE, STATISTICS), parts, strict=True)}
            self._whole = _Difference(base="", model=self._name, vectors=encoded)
        return (self._whole,) if self._whole is not None else ()

    def _encode(self, target: Tensor, before: Tensor, round: int) -> tuple[_Difference, Tensor]:
        """The encoded difference from `before` toward `target`, and the resulting model."""
        count = self._layout.num_trainable
        trainable = target[:count] - before[:count]
        vectors = {STATISTICS: WHOLE.encode(target[count:], seed=0)}
        vectors[TRAINABLE] = self._coding.encode(trainable, list(vectors.values()), purpose="codec-down", round=round)
        after = _apply(before, vectors, self._layout)
        return _Difference(base=self._name, model=name_of(after), vectors=vectors), after


class HeldModel(Protocol):
    """Stores the model that a client decoded last."""

    def load(self) -> tuple[str, Tensor] | None:
        """Its name and values [S]; None if there is none."""

    def save(self, name: str, model: Tensor) -> None: ...


class MemoryHeldModel:
    """A `HeldModel` in memory."""

    def __init__(self) -> None:
        self._held: tuple[str, Tensor] | None = None

    def load(self) -> tuple[str, Tensor] | None:
        return self._held

    def save(self, name: str, model: Tensor) -> None:
        self._held = (name, model)


def open_broadcast(message: Broadcast, held: HeldModel, layout: Layout | None = None) -> Broadcast:
    """Decode the model of a broadcast, and hold it as the base of the next difference.

    A plain broadcast is returned unchanged.

    Args:
        message: the broadcast as received.
        held: stores the decoded model.
        layout: the model's layout; vectors of other sizes are refused before anything is decoded. None trusts the
            sender, as in a simulation.

    Raises:
        RefusedError: the differences do not start at the held model, are malformed, or do not give the named model; the
            server then sends the complete model.
    """
    if message.is_plain:
        return message
    known = held.load()
    name, model = known if known is not None else ("", None)
    bases = [delta.base for delta in message.deltas]
    if name == message.model and model is not None:
        first = len(bases)
    elif name in bases:
        first = bases.index(name)
    elif "" in bases:
        first, model = bases.index(""), None
    else:
        raise RefusedError("this client does not hold the model that the server's difference begins at")
    for number in range(first, len(bases)):
        model = _apply(model, _segments(message, number), layout)
    if model is None or (first < len(bases) and name_of(model) != message.model):
        raise RefusedError("the decoded model is not the one that the server means: another version of FedShelf?")
    if first < len(bases):
        held.save(message.model, model)
    return replace(message, model="", deltas=(), vectors={PARAMS: model, **_without_params(message)})


def _segments(message: Broadcast, number: int) -> dict[str, Encoded]:
    """The encoded vectors of difference `number`."""
    prefix = f"{number}/"
    return {
        name.removeprefix(prefix): vector
        for name, vector in message.vectors.items()
        if name.startswith(prefix) and isinstance(vector, Encoded)
    }


def _without_params(message: Broadcast) -> dict[str, Vector]:
    """The algorithm's vectors."""
    return {name: vector for name, vector in message.vectors.items() if name.startswith(AUXILIARY)}


def _apply(before: Tensor | None, vectors: Mapping[str, Encoded], layout: Layout | None) -> Tensor:
    """Apply a difference to `before` [S], or decode a complete model if `before` is None."""
    if set(vectors) != {TRAINABLE, STATISTICS}:
        raise RefusedError(
            f"a difference has the vectors {', '.join(sorted(vectors))}, not {TRAINABLE} and {STATISTICS}"
        )
    count, size = vectors[TRAINABLE].size, vectors[TRAINABLE].size + vectors[STATISTICS].size
    if layout is not None and (count, size) != (layout.num_trainable, layout.num_shared):
        raise RefusedError(f"an encoded model has {size:,} values, not the {layout.num_shared:,} of this one")
    if before is not None and len(before) != size:
        raise RefusedError(f"a difference has {size:,} values, the model that it begins at {len(before):,}")
    changed = decode(vectors[TRAINABLE])
    if before is not None:  # adding a complete model to zero would turn -0.0 into 0.0
        changed += before[:count]
    return torch.cat([changed, decode(vectors[STATISTICS])])
