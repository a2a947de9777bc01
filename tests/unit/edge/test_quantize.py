"""A model file becomes int8 in the store, if it is good enough there."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from fedshelf.core.errors import DataError, ModelError, UsageError
from fedshelf.edge.making import quantize as module
from fedshelf.edge.making.int8 import mean_shift
from fedshelf.edge.making.quantize import Certificate, quantize
from fedshelf.edge.serving.session import Session
from tests.edge_models import info, write_color_model
from tests.model_folders import write_tinted
from tests.unit.cli.screen import run
from tests.unit.edge.conftest import Exported

GOOD = Certificate(
    photos=1000, agreement=0.999, accuracy=0.9, float_accuracy=0.905, bytes_ratio=0.27, processor="p", runtime="1"
)  # fmt: skip


@pytest.fixture
def photos(home: Path) -> Path:
    return write_tinted(Path("photos"), 40)


def test_the_network_is_int8_and_what_is_around_it_stays_float(photos: Path, colors: Exported) -> None:
    code, text = run("edge", "quantize", str(colors.file), "--data-dir", "photos", "--out", "m8.onnx", "--json")
    assert code == 0, text
    record = json.loads(text)
    assert record["photos"] == 24
    assert record["agreement"] == 1.0
    assert record["accuracy"] > 0.9
    model = onnx.load("m8.onnx")
    onnx.checker.check_model(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QLinearConv"] == 12
    assert kinds["QGemm"] == 1
    assert kinds["Softmax"] == 1
    assert kinds["Conv"] == kinds["Gemm"] == 0 == kinds["QLinearSoftmax"]
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    values = [onnx.numpy_helper.to_array(tensor) for tensor in weights if len(tensor.dims) == 4]
    assert len(values) == 12
    assert max(int(np.abs(value.astype(int)).max()) for value in values) <= 64
    before, after = Session.open(colors.file), Session.open(Path("m8.onnx"))
    assert (after.info.precision, after.info.labels) == ("int8", before.info.labels)
    assert after.info.digest == record["digest"] != before.info.digest
    assert (after.info.threshold, after.info.temperature) == (before.info.threshold, before.info.temperature)
    assert after.info.card["int8"]["photos"] == 24
    assert "int8, certified on 24 photos" in Path("m8.card.md").read_text()
    path = next((photos / "Blue").iterdir())
    assert after.top(after.predict(after.decode(path.read_bytes())), 1)[0].label == "Blue"
    assert after.predict(np.zeros((70, 9, 3), np.uint8)).sum() == pytest.approx(1, abs=1e-5), "any size is taken"
    with pytest.raises(UsageError, match="is quantized already"):
        quantize(Path("m8.onnx"), photos, Path("again.onnx"), test_dir=None)


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (replace(GOOD, agreement=0.9949), "names the same product in 99.49 % of the photos"),
        (replace(GOOD, accuracy=0.89), "loses 1.50 points of accuracy on 1,000 photos: 89.00 % instead of 90.50 %"),
        (replace(GOOD, bytes_ratio=0.32), "32.0 % of the bytes"),
        (replace(GOOD, photos=19), "19 validation photos certify nothing"),
    ],
)
def test_a_model_that_is_not_good_enough_is_refused_with_the_reason(certificate: Certificate, reason: str) -> None:
    assert GOOD.problems() == []
    assert replace(GOOD, agreement=0.995, accuracy=0.895, bytes_ratio=0.31, photos=20).problems() == []
    (problem,) = certificate.problems()
    assert reason in problem


def test_without_a_certificate_nothing_is_written_and_the_command_fails(
    photos: Path, colors: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 0.2)
    code, text = run("edge", "quantize", str(colors.file), "--data-dir", "photos", "--out", "m8.onnx")
    assert code == 1
    assert "the float32 model stays, no file was written: it has" in text
    assert "% of the bytes" in text
    assert not Path("m8.onnx").exists()
    assert not Path("m8.card.md").exists()


def test_test_photos_certify_instead_of_validation_photos(photos: Path, colors: Exported) -> None:
    test_dir = write_tinted(Path("test"), 11, seed=500)
    for path in (test_dir / "Red").iterdir():
        path.rename(test_dir / "Green" / f"moved-{path.name}")  # all wrong, for either model
    (test_dir / "Red").rmdir()
    _, certificate = quantize(colors.file, photos, Path("m8.onnx"), test_dir=test_dir)
    assert certificate.photos == 33
    assert certificate.float_accuracy == pytest.approx(2 / 3, abs=0.1)


def test_rounding_a_layers_weights_shifts_its_mean_by_what_is_computed() -> None:
    generator = torch.Generator().manual_seed(0)
    for groups, width in ((1, 6), (2, 6), (6, 6)):
        weight = torch.randn(12, width // groups, 3, 3, generator=generator)
        images = torch.rand(5, width, 9, 9, generator=generator) * torch.arange(1, width + 1).view(-1, 1, 1)
        images = images.mean((0, 2, 3)).view(1, -1, 1, 1).expand(1, -1, 9, 9)
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 64
        rounded = (weight / scale).round() * scale
        shift = F.conv2d(images, rounded, groups=groups) - F.conv2d(images, weight, groups=groups)
        found = mean_shift(weight.numpy(), images.mean((0, 2, 3)).numpy(), groups=groups)
        assert np.abs(found).max() > 1e-3
        assert found == pytest.approx(shift.mean((0, 2, 3)).numpy(), abs=1e-4)


def test_files_and_photos_that_do_not_fit_are_errors(
    photos: Path, colors: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="is the float32 file, which stays"):
        quantize(colors.file, photos, colors.file, test_dir=None)
    with pytest.raises(DataError, match="holds no usable photos of products that the model knows"):
        quantize(write_color_model(Path("c.onnx"), info(["X", "Y", "Z"])), photos, Path("m8.onnx"), test_dir=None)
    Path("bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot open model file"):
        quantize(Path("bad.onnx"), photos, Path("m8.onnx"), test_dir=None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"pip install 'fedshelf\[export\]'"):
        quantize(colors.file, photos, Path("m8.onnx"), test_dir=None)


def test_quantizing_needs_no_torch(home: Path) -> None:
    code = "import sys, fedshelf.edge.making.quantize; assert not {'torch', 'timm', 'flwr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
