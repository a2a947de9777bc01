"""Serialization between the simulation's processes: large tensors in shared files, everything else through the pipe.

Any message can be sent, with any tensors in it. The format is pickle, used only between a parent and the children that
it has started: no data comes from or goes to the network.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedshelf.simulate.shared import Mappings, Reference

SMALL = 1024  # smaller tensors, in bytes, do not get a file


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, store: Callable[[Tensor], Reference]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._store = store

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if value.numel() * value.element_size() > SMALL:
            return self._store(value)
        flat = value.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes(), value.dtype, tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, load: Callable[[Reference], Tensor]) -> None:
        super().__init__(file)
        self._load = load

    def persistent_load(self, found: Any) -> Tensor:
        if isinstance(found, Reference):
            return self._load(found)
        data, dtype, shape = found
        values = torch.empty(shape, dtype=dtype)
        if data:
            values.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
        return values


def pack(message: object, store: Callable[[Tensor], Reference]) -> bytes:
    """Serialize a message.

    Args:
        message: any picklable object.
        store: writes a large tensor to a file.

    Returns:
        The serialized message.
    """
    file = io.BytesIO()
    _Packer(file, store).dump(message)
    return file.getvalue()


def unpack(data: bytes, load: Callable[[Reference], Tensor] | None = None) -> Any:
    """Deserialize a message.

    Args:
        data: the serialized message.
        load: reads a tensor from a file that any process has written.

    Returns:
        The message.
    """
    return _Unpacker(io.BytesIO(data), load or Mappings().read).load()
