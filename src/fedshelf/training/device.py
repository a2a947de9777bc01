"""Which processor trains, and how."""

from dataclasses import dataclass

import torch

from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import UsageError
from fedshelf.training.threads import default_threads


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """The device and whether the forward pass runs in bfloat16 there.

    bfloat16 needs no loss scaling. CPUs without units for it are 8 to 11 times slower with it, so there and on MPS
    training stays in float32.
    """

    device: torch.device
    autocast: bool


def choose(name: DeviceName, *, threads: int) -> Compute:
    """Pick the device and set torch's thread count for this process (0: as many as `default_threads`).

    Raises:
        UsageError: a device was asked for by name and is not there.
    """
    torch.set_num_threads(threads or default_threads())
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not have[name]:
        raise UsageError(f"--device {name}: torch finds no such device here; use --device auto or cpu")
    chosen = name if name != "auto" else next(device for device in ("cuda", "mps", "cpu") if have[device])
    autocast = chosen == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Compute(device=torch.device(chosen), autocast=autocast)
