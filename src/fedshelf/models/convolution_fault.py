"""Works around a memory fault in torch's CPU convolutions.

In the backward pass of a 1×1 convolution with a stride, oneDNN (3.7 in torch 2.9 as 3.12 in torch 2.13) writes past the
end of its workspace if the input, in channels_last, has fewer channels than the processor's vectors hold float32
values: 8 with AVX2, 16 with AVX-512. Heap corruption follows: SIGSEGV, SIGBUS or SIGABRT, at once or much later. Narrow
residual networks have such layers in their shortcuts, RepVGG, MobileOne and FastViT in their stem.

The stride of a 1×1 convolution only selects which pixels are read. Selecting them first, and then convolving with
stride 1, computes the same result and uses another path in oneDNN.

`tests/unit/models/test_convolution_fault.py` runs the bare layer in a separate process: it fails once torch is fixed,
and this module can be removed.
"""

from torch import Tensor, nn

MOST_FLOATS_IN_A_VECTOR = 16  # float32 values in 512 bits, the widest vectors of x86-64


def avoid_convolution_fault(module: nn.Module) -> None:
    """Make every layer of `module` that would trigger the fault select its pixels first, in place.

    The result, tensors and their names are unchanged. The same layers are changed on every machine, so that a model
    trains identically on all of them. A second call does nothing.

    Args:
        module: any model; layers are found by type and shape.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and _is_at_risk(layer):
            layer.register_forward_pre_hook(_Subsample(*layer.stride))
            layer.stride = (1, 1)


class _Subsample:
    """A forward pre-hook that keeps every n-th row and every m-th column of a layer's input."""

    def __init__(self, n: int, m: int) -> None:
        self._n, self._m = n, m

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        (images_BCHW,) = inputs
        return images_BCHW[..., :: self._n, :: self._m]


def _is_at_risk(layer: nn.Conv2d) -> bool:
    return (
        layer.in_channels < MOST_FLOATS_IN_A_VECTOR
        and layer.groups == 1
        and all(size == 1 for size in layer.kernel_size)
        and any(step > 1 for step in layer.stride)
        and layer.padding in ((0, 0), "valid")
    )
