"""Shorter floats: float32 unchanged, float16, or bfloat16.

    code = round_to_nearest_even(x)

| form | bits | largest value | relative error |
|------|------|---------------|----------------|
| fp16 | 16   | 65504         | 2^-11 (values under 6e-5: absolute, 3e-8) |
| bf16 | 16   | 3e38          | 2^-8           |

Differs from the paper: there is none; IEEE 754 binary16, and the upper half of binary32. Rounding is to nearest, hence
deterministic and (by less than half a unit in the last place) biased.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedshelf.compression.stage import Floats, Parts, Properties, Specs
from fedshelf.core.errors import FedShelfError, RefusedError

FORMS = {"": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Float:
    """Values as floats of another width.

    Attributes:
        text: how the stage is written; empty for float32, which is lossless.
    """

    text: str = ""

    @property
    def properties(self) -> Properties:
        exact = self.text == ""
        return Properties(lossless=exact, unbiased=exact, linear=exact)

    def specs(self, size: int) -> Specs:
        return {"values": (FORMS[self.text], size)}

    def encode(self, values: Floats, seed: int) -> Parts:
        given = torch.from_numpy(values)
        if self.text == "":
            return {"values": torch.from_numpy(values.copy())}
        short = given.to(FORMS[self.text])
        if not _finite(short):
            largest = torch.finfo(short.dtype).max
            raise FedShelfError(
                f"the codec {self.text} cannot hold a value beyond ±{largest:g}, and the vector has "
                f"{float(np.abs(values).max()):g}. Use bf16 or int8, or find out why the values grew"
            )
        return {"values": short}

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Floats:
        if not _finite(parts["values"]):
            raise RefusedError("the encoded vector holds values that are not finite")
        decoded = np.empty(size, np.float32)
        torch.from_numpy(decoded).copy_(parts["values"])
        return decoded


fp16, bf16 = partial(Float, "fp16"), partial(Float, "bf16")


def _finite(values: Tensor) -> bool:
    return values.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(values))
