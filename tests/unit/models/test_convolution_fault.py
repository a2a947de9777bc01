"""The layer that torch's CPU convolutions corrupt memory in: the bare one, and what models train with instead.

Whatever may die runs in a process of its own. `ONEDNN_MAX_CPU_ISA=AVX2` makes a processor with AVX-512 compute as one
without does, so both kinds are tried on either.
"""

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedshelf.core.process_exit import CRASHES, signal_of
from fedshelf.models.build import build
from fedshelf.models.convolution_fault import MOST_FLOATS_IN_A_VECTOR, avoid_convolution_fault
from fedshelf.models.resnet import resnet10
from fedshelf.models.settings import ModelSettings

ROOT = Path(__file__).parents[3]
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
needs_avx2 = pytest.mark.skipif(
    platform.machine() != "x86_64" or " avx2 " not in CPU, reason="the fault is in oneDNN's code for AVX2 and AVX-512"
)

TRAIN = """
import resource, sys
import torch
from fedshelf.models.build import build
from fedshelf.models.settings import ModelSettings
from fedshelf.models.convolution_fault import avoid_convolution_fault

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for threads in (1, 2):
    torch.set_num_threads(threads)
    for width in map(int, sys.argv[2:]):
        layer = torch.nn.Conv2d(width, 2 * width, 1, stride=2).to(memory_format=torch.channels_last)
        if sys.argv[1] == "safe":
            avoid_convolution_fault(layer)
        images = torch.rand(9, 24, 24, width).permute(0, 3, 1, 2).requires_grad_()
        for _ in range(200):
            layer(images).sum().backward()
"""


def train(form: str, *widths: int, instructions: str = "AVX2") -> str:
    """Train one layer of each of these `widths` for 200 steps, with one thread and with two; returns the signal that
    ended the process, if one did.

    Args:
        form: `bare`, or `safe`: as models have it.
        widths: input channels.
        instructions: the widest that oneDNN may use.
    """
    environment = {
        **os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT / "src"),
    }  # fmt: skip
    command = [sys.executable, "-c", TRAIN, form, *map(str, widths)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode <= 0, ended.stderr
    return signal_of(ended.returncode)


@needs_avx2
def test_torch_still_has_the_fault() -> None:
    assert train("bare", 3, 4, 5, 7) in CRASHES, (
        f"torch {torch.__version__} trains the bare layer unharmed: remove models/convolution_fault.py, its call in "
        "training/bound_model.py, and this file, once the oldest torch that pyproject.toml allows does so"
    )


@needs_avx2
@pytest.mark.parametrize("instructions", ["AVX2", "ALL"])
@pytest.mark.parametrize("widths", [(3, 4, 5, 7), pytest.param(range(1, 17), marks=pytest.mark.long)], ids=str)
def test_the_layer_that_models_train_with_survives(widths: Sequence[int], instructions: str) -> None:
    assert train("safe", *widths, instructions=instructions) == ""


def gradients(layer: nn.Module, images: Tensor) -> list[Tensor]:
    """What the layer computes, and the gradients of its input and its tensors, for a loss that weighs all pixels."""
    given = images.clone().requires_grad_()
    out = layer(given)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    found = torch.autograd.grad((out * weights).sum(), [given, *layer.parameters()])
    return [out.detach(), *found]


@pytest.mark.parametrize("stride", [(2, 2), (3, 1), (1, 2)])
@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_the_bare_layer_computes(stride: tuple[int, int], size: int, bias: bool) -> None:
    bare = nn.Conv2d(5, 7, 1, stride=stride, bias=bias).double()  # oneDNN computes in float32 alone
    safe = copy.deepcopy(bare)
    avoid_convolution_fault(safe)
    assert safe.stride == (1, 1)
    images = torch.randn(3, 5, size, size + 1, dtype=torch.float64)
    for found, expected in zip(gradients(safe, images), gradients(bare, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(MOST_FLOATS_IN_A_VECTOR, 8, 1, stride=2),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(4, 8, 1, stride=2, groups=4),
        nn.Conv2d(4, 8, 1, stride=2, padding=1),
        nn.ConvTranspose2d(4, 8, 1, stride=2),
        nn.Conv1d(4, 8, 1, stride=2),
    ],
    ids=str,
)
def test_layers_without_the_fault_are_left_alone(layer: nn.Module) -> None:
    before = str(layer)
    avoid_convolution_fault(layer)
    assert str(layer) == before
    assert not layer._forward_pre_hooks


def test_a_layer_deep_in_one_of_timms_models_is_found() -> None:
    model = build(ModelSettings(name="mobileone_s0", num_classes=3, image_size=32), seed=0)
    avoid_convolution_fault(model)
    changed = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer._forward_pre_hooks]
    assert [(layer.in_channels, layer.kernel_size, layer.stride) for layer in changed] == [(3, (1, 1), (1, 1))]


def test_a_model_is_changed_once_and_its_copies_compute_alike() -> None:
    torch.manual_seed(0)
    bare = resnet10(3, width=8).double().eval()
    safe = copy.deepcopy(bare)
    for _ in range(2):
        avoid_convolution_fault(safe)
    assert sum(len(layer._forward_pre_hooks) for layer in safe.modules()) == 1  # of 8, 16 and 32 channels in
    assert safe.state_dict().keys() == bare.state_dict().keys()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(safe(images), bare(images), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(safe)(images), bare(images), rtol=1e-12, atol=1e-12)
