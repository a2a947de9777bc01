"""Models by name."""

import errno
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedshelf.core.errors import ModelError
from fedshelf.core.params import bind
from fedshelf.models import hub
from fedshelf.models.build import build, normalization_of
from fedshelf.models.resnet import resnet10
from fedshelf.models.settings import ModelSettings


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


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (socket.gaierror(socket.EAI_NONAME, "?"), r"'resnet18' could not be fetched: name not known\..*--init FILE"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "could not be fetched: connection refused"),
        (PermissionError(errno.EPERM, "Operation not permitted"), "could not be fetched: operation not permitted"),
        (OSError(errno.ENOSPC, "No space left on device"), "could not be saved: no space left.*Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "could not be saved: permission denied.*HF_HOME"),
        (ImportError("No module named 'huggingface_hub'"), "could not be built: No module named 'huggingface_hub'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_why_pretrained_weights_cannot_be_had_is_said_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception, why: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        try:
            raise trouble
        except OSError as error:  # as huggingface_hub wraps what it meets
            raise FileNotFoundError("the file is neither on the Hub nor in the cache") from error

    from fedshelf.models.timm_models import import_timm

    import_timm()
    import timm.models._builder as builder

    monkeypatch.setattr(builder, "load_pretrained", fail)
    monkeypatch.setattr(hub, "problem_with", lambda address: "")
    with pytest.raises(ModelError, match=why):
        make("resnet18", pretrained=True)


def test_a_hub_that_does_not_answer_is_awaited_once_with_a_word_and_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        monkeypatch.setattr(hub, "SECONDS_IN_SILENCE", 0.1)
        with pytest.raises(ModelError, match=rf"{address}: (no answer within|timed out).*fedshelf\[weights\]"):
            make("resnet18", pretrained=True)
        assert [f"for {address}, where timm's weights are" in said for said in caplog.messages] == [True]
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has asked again
            silent.accept()
    assert not constants.HF_HUB_OFFLINE


def test_a_model_without_pretrained_weights_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(ModelError, match="no pretrained weights"):
        make(pretrained=True)
    with pytest.raises(ModelError, match=r"timm has no weights of beit3.*--init FILE"):
        make("beit3_giant_patch14_224", pretrained=True)


def test_a_pretrained_head_of_as_many_classes_starts_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        for parameter in model.parameters():
            nn.init.constant_(parameter, 7.0)

    from fedshelf.models.timm_models import import_timm

    import_timm()
    import timm.models._builder as builder

    monkeypatch.setattr(builder, "load_pretrained", load)
    monkeypatch.setattr("fedshelf.models.hub.problem_with", lambda address: "")
    module = make("resnet18", classes=1000, pretrained=True).state_dict()
    assert torch.all(module["layer1.0.conv1.weight"] == 7.0)
    assert not torch.any(module["fc.weight"] == 7.0), "the 1,000 classes of ImageNet are not 1,000 products"


@pytest.mark.parametrize("width", [6, 7, 12])
def test_group_normalization_takes_any_width(width: int) -> None:
    module = make(width=width, norm="group")
    assert module(torch.zeros(2, 3, 32, 32)).isfinite().all()
    for layer in (layer for layer in module.modules() if isinstance(layer, nn.GroupNorm)):
        assert layer.num_groups == max(n for n in range(1, 9) if layer.num_channels % n == 0)
