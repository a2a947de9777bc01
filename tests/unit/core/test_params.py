"""A module bound to one vector computes what it computed before, and every tensor is a view."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedshelf.core.params import Segment, bind, bind_gradients
from fedshelf.models.build import build
from fedshelf.models.settings import ModelSettings

MODELS = [
    ("resnet10", "batch"), ("resnet10", "group"), ("mobilenetv3_small_100", "batch"), ("resnet18", "batch"),
    ("resnet18", "group"),
]  # fmt: skip


def make(name: str, norm: str) -> Any:
    return build(ModelSettings(name=name, num_classes=5, image_size=32, norm=norm, width=16), seed=1)  # type: ignore[arg-type]


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize(("name", "norm"), MODELS)
def test_binding_leaves_the_forward_and_backward_pass_as_they_were(name: str, norm: str) -> None:
    plain, bound = make(name, norm), make(name, norm)
    gradients = bind_gradients(bound, params := bind(bound))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for module in (plain, bound):
        module.train()
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
    if hasattr(plain, "drop_rate"):
        plain.drop_rate = bound.drop_rate = 0.0
    outputs = [module(images) for module in (plain, bound)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    views = type(params)(gradients, params.layout).views()
    scale = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for parameter_name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(views[parameter_name], parameter.grad, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize(("name", "norm"), MODELS)
def test_every_floating_tensor_of_the_module_lies_in_the_vector_and_no_other(name: str, norm: str) -> None:
    module = make(name, norm)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    params = bind(module)
    floating = {n for n, t in before.items() if t.is_floating_point()}
    assert {spec.name for spec in params.layout.tensors} == floating
    assert params.layout.size == len(params.vector) == sum(before[n].numel() for n in floating)
    for n, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[n]), f"binding changed {n}"
    params.vector.fill_(0.25)
    for n, tensor in module.state_dict().items():
        if n in floating:
            assert (tensor == 0.25).all(), f"{n} is no view of the vector"
        else:
            assert torch.equal(tensor, before[n])
    for spec in params.layout.tensors:
        if len(spec.shape) == 4:
            assert dict(module.named_parameters())[spec.name].is_contiguous(memory_format=torch.channels_last)


def test_the_order_is_trainable_then_statistics_then_personal() -> None:
    module = tiny()
    params = bind(module, is_personal=lambda name: name.startswith("1."))
    layout = params.layout
    assert [(t.name, t.segment.value, t.trainable) for t in layout.tensors] == [
        ("0.weight", "trainable", True),
        ("0.bias", "trainable", True),
        ("3.weight", "trainable", True),
        ("3.bias", "trainable", True),
        ("1.weight", "personal", True),
        ("1.bias", "personal", True),
        ("1.running_mean", "personal", False),
        ("1.running_var", "personal", False),
    ]
    assert layout.num_trainable == layout.num_shared == 4 * 27 + 4 + 32 + 2
    assert layout.num_personal_trainable == 8
    assert layout.num_parameters == layout.num_shared + 8
    assert layout.size == layout.num_shared + 16
    assert len(params.personal) == 16
    assert [t.offset for t in layout.tensors] == [0, 108, 112, 144, 146, 150, 154, 158]


def test_shared_statistics_follow_the_trainable_values() -> None:
    params = bind(tiny())
    assert [t.name for t in params.layout.tensors if t.segment is Segment.STATISTICS] == [
        "1.running_mean", "1.running_var",
    ]  # fmt: skip
    assert params.layout.num_shared - params.layout.num_trainable == 8
    assert torch.equal(params.shared[-4:], torch.ones(4)), "the fresh variances"
    assert len(params.trainable) == params.layout.num_trainable
    params.trainable.zero_()
    assert params.vector[: params.layout.num_trainable].abs().sum() == 0


def test_the_digest_changes_with_what_travels_and_with_nothing_else() -> None:
    def digest(module: nn.Module, is_personal: Callable[[str], bool] = lambda name: False) -> str:
        return bind(module, is_personal=is_personal).layout.digest

    other = tiny()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(1)
    assert digest(tiny()) == digest(other), "values do not count"
    renamed = nn.Sequential()
    for name, child in zip("abcd", tiny(), strict=True):
        renamed.add_module(name, child)
    wider = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    reshaped = nn.Sequential(nn.Conv2d(3, 4, (9, 1)), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    personal = digest(tiny(), lambda name: name.startswith("3."))
    digests = [digest(tiny()), digest(renamed), digest(wider), digest(reshaped), personal]
    assert len(set(digests)) == 5
    only_head_differs = digest(wider, lambda name: name.startswith("3."))
    assert only_head_differs == personal, "personal tensors are not in the wire's layout"


def test_only_shared_variances_are_clamped_and_only_below_zero() -> None:
    layout = bind(tiny()).layout
    vector = torch.full((layout.num_shared,), -1.0)
    vector[-1] = 0.5
    clamped = layout.clamp(vector)
    assert clamped is vector, "in place"
    assert clamped[-4:].tolist() == [0, 0, 0, 0.5]
    assert (clamped[:-4] == -1).all()
    private = bind(tiny(), is_personal=lambda name: name.startswith("1.")).layout
    assert (private.clamp(torch.full((private.num_shared,), -1.0)) == -1).all()


def test_a_value_is_found_in_its_tensor() -> None:
    layout = bind(tiny()).layout
    assert [layout.at(i).name for i in (0, 107, 108, 111, 112)] == [
        "0.weight", "0.weight", "0.bias", "0.bias", "1.weight",
    ]  # fmt: skip
    for outside in (-1, layout.size):
        with pytest.raises(IndexError, match="outside"):
            layout.at(outside)


def test_gradients_accumulate_in_the_flat_vector_and_statistics_have_none() -> None:
    module = tiny()
    params = bind(module)
    gradients = bind_gradients(module, params)
    assert gradients.abs().sum() == 0
    module(torch.randn(3, 3, 4, 4)).sum().backward()
    once = gradients.clone()
    assert once[: params.layout.num_trainable].abs().sum() > 0
    assert once[params.layout.num_trainable :].abs().sum() == 0
    assert all(p.grad is not None and p.grad.untyped_storage().data_ptr() == gradients.data_ptr()
               for p in module.parameters())  # fmt: skip
