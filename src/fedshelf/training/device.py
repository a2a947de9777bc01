"""The device and precision of training."""

from dataclasses import dataclass

import torch

from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import UsageError
from fedshelf.training.resources import default_threads


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """The device and its precision.

    bfloat16 needs no loss scaling. CPUs without hardware support are 8 to 11 times slower with it, so there and on MPS
    training stays in float32.

    Attributes:
        device: the device.
        autocast: whether the forward pass runs in bfloat16.
    """

    device: torch.device
    autocast: bool


def choose(name: DeviceName, *, threads: int) -> Compute:
    """Choose the device and set torch's thread count for this process.

    Args:
        name: the configured device.
        threads: number of threads; 0: `default_threads`.

    Raises:
        UsageError: the requested device is not available.
    """
    torch.set_num_threads(threads or default_threads())
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not have[name]:
        raise UsageError(f"--device {name}: torch finds no such device here; use --device auto or cpu")
    chosen = name if name != "auto" else next(device for device in ("cuda", "mps", "cpu") if have[device])
    autocast = chosen == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Compute(device=torch.device(chosen), autocast=autocast)
