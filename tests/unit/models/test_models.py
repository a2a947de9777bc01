"""Models by name, and weights from files."""

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fedshelf.core.errors import ModelError
from fedshelf.core.params import bind
from fedshelf.models.build import ModelSettings, build, load_weights, normalization_of
from fedshelf.models.resnet import resnet10


def make(name: str = "resnet10", classes: int = 3, seed: int = 0, **settings: Any) -> nn.Module:
    given: dict[str, Any] = {"image_size": 32, "width": 4, **settings}
    return build(ModelSettings(name=name, num_classes=classes, **given), seed=seed)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet10_has_the_benchmarks_number_of_parameters(norm: Any) -> None:
    module = make(classes=81, width=16, norm=norm)
    assert bind(module).layout.num_parameters == 317_985
    assert module(torch.zeros(2, 3, 48, 48)).shape == (2, 81)


def test_resnet10_has_the_benchmarks_shape() -> None:
    module = resnet10(3, width=4)
    shapes = []
    for layer in (module.stem, *module.blocks):
        layer.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[1:])))
    module.eval()(torch.zeros(1, 3, 48, 48))
    assert shapes == [(4, 24, 24), (4, 24, 24), (8, 12, 12), (16, 6, 6), (32, 3, 3)]


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "mobilenetv3_small_100"])
def test_group_norm_models_have_no_batch_norm_anywhere(name: str) -> None:
    def batch_norms(norm: Any) -> int:
        return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in make(name, norm=norm).modules())

    assert batch_norms("group") == 0
    assert batch_norms("batch") > 5
    module = make(name, norm="group").eval()
    images = torch.randn(2, 3, 32, 32)
    alone = torch.cat([module(images[:1]), module(images[1:])])
    torch.testing.assert_close(module(images), alone, rtol=1e-4, atol=1e-4)
    assert not bind(module).layout.num_shared - bind(module).layout.num_trainable, "no statistics to share"


def test_group_norm_keeps_the_activation_that_was_fused_with_batch_norm() -> None:
    def activations(norm: Any) -> list[str]:
        normalizations = ("BatchNormAct2d", "GroupNormAct")
        modules = make("mobilenetv3_small_100", norm=norm).modules()
        return [type(m.act).__name__ for m in modules if type(m).__name__ in normalizations]

    assert activations("batch") == activations("group")
    assert {"Hardswish", "ReLU", "Identity"} <= set(activations("group"))


def test_the_seed_alone_decides_the_weights_and_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, same, other = (bind(make(seed=seed)).vector for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_transformer_takes_the_image_size() -> None:
    module = make("vit_tiny_patch16_224", image_size=32)
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert normalization_of(module).mean == (0.5, 0.5, 0.5)
    assert normalization_of(make()).std == (0.229, 0.224, 0.225)


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(ModelError, match="unknown model 'resnet_18': did you mean 'resnet18'"):
        make("resnet_18")
    with pytest.raises(ModelError, match="resnet18"):
        make("qqq")


def test_an_image_size_the_model_cannot_take_is_an_error_that_says_so() -> None:
    with pytest.raises(ModelError, match="8 px"):
        make("vit_tiny_patch16_224", image_size=8)


def test_pretrained_weights_without_internet_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("network is unreachable")

    from fedshelf.models.timm_models import import_timm

    import_timm()
    import timm.models._builder as builder

    monkeypatch.setattr(builder, "load_pretrained", offline)
    with pytest.raises(ModelError, match=r"'resnet18' could not be fetched.*--init FILE"):
        make("resnet18", pretrained=True)
    with pytest.raises(ModelError, match="no pretrained weights"):
        make(pretrained=True)


def saved(path: Path, tensors: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "wrapped.pth"])
def test_weights_are_loaded_whole_from_either_kind_of_file(tmp_path: Path, name: str) -> None:
    source, target = make(seed=1), make(seed=2)
    tensors: Any = source.state_dict()
    path = saved(tmp_path / name, {"state_dict": tensors, "epoch": 3} if "wrapped" in name else tensors)
    load_weights(target, path)
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in tensors.items())


def test_a_head_for_other_classes_stays_fresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = make(classes=7, seed=1), make(seed=2)
    fresh = {n: t.clone() for n, t in target.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_weights(target, saved(tmp_path / "w.safetensors", source.state_dict()))
    loaded = target.state_dict()
    assert torch.equal(loaded["head.weight"], fresh["head.weight"])
    assert torch.equal(loaded["head.bias"], fresh["head.bias"])
    assert torch.equal(loaded["stem.0.weight"], source.state_dict()["stem.0.weight"])
    assert "head.bias, head.weight" in caplog.text


def test_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = make(seed=1).state_dict()
    tensors["stem.0.weight"] = torch.zeros(9, 3, 3, 3)
    del tensors["blocks.1.body.0.weight"]
    path = saved(tmp_path / "w.safetensors", tensors)
    with pytest.raises(ModelError, match=r"2 tensors differ") as caught:
        load_weights(make(), path)
    assert "stem.0.weight (9, 3, 3, 3) for (4, 3, 3, 3)" in str(caught.value)
    assert "blocks.1.body.0.weight absent for (8, 4, 3, 3)" in str(caught.value)


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"stem.0.weight": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="more than plain tensors"):
        load_weights(make(), tmp_path / "w.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("name", "content"), [("w.pt", b"hello"), ("w.safetensors", b"hello"), ("w.pt", b"")])
def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_weights(make(), tmp_path / name)
    with pytest.raises(ModelError, match="there is no file"):
        load_weights(make(), tmp_path / "absent.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="not a dictionary of tensors"):
        load_weights(make(), tmp_path / "list.pt")
