"""A trained model as one file for the store."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedshelf.app.predictor import Predictor
from fedshelf.core.errors import DataError, ModelError, UsageError
from fedshelf.data.decode import DECODER_VERSION
from fedshelf.edge.making import export as module
from fedshelf.edge.making.card import to_markdown
from fedshelf.edge.making.card_content import card_of
from fedshelf.edge.making.check_photos import MOST_CHECKED, drawn, from_folder
from fedshelf.edge.making.export import compare, export
from fedshelf.edge.model_info import ModelInfo
from fedshelf.edge.serving.session import Session
from fedshelf.models.adapters import add_adapters
from fedshelf.models.build import build
from fedshelf.models.settings import ModelSettings
from fedshelf.storage.model_files import save_model
from tests.model_folders import COLORS, tinted, write_model, write_tinted
from tests.unit.cli.screen import run
from tests.unit.data.samples import write_pack, write_photo
from tests.unit.edge.conftest import Exported


def exported(folder: Path, out: Path, *, check: Path | None = None, calibrate: Path | None = None) -> ModelInfo:
    return export(Predictor.load(folder), out, check=check, calibrate=calibrate, precision=0.95)


@pytest.mark.parametrize(
    ("name", "image_size", "norm"),
    [
        ("resnet10", 16, "group"), ("tf_efficientnet_lite0", 32, "batch"),
        pytest.param("mobilenetv3_small_050", 32, "batch", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_the_file_answers_as_the_model_whose_normalization_it_has(
    home: Path, name: str, image_size: int, norm: str
) -> None:
    write_model(Path("model"), name, image_size=image_size, norm=norm, trained=False)
    info = exported(Path("model"), Path("m.onnx"))
    assert info.card["parity"]["max_difference"] <= 1e-5
    assert info.card["parity"]["photos"] == "16 generated photos"
    predictor, session = Predictor.load(Path("model")), Session.open(Path("m.onnx"))
    photo = write_photo(Path("photo.jpg"), 7, 90, 50)
    answer = session.predict(session.decode(photo.read_bytes()))
    for guess in predictor.predict(photo, top=3):
        assert answer[session.info.labels.index(guess.label)] == pytest.approx(guess.probability, abs=1e-5)


def test_a_transformer_with_merged_adapters_is_exported(home: Path) -> None:
    settings = ModelSettings(name="vit_tiny_patch16_224", num_classes=3, image_size=32)
    vit = build(settings, seed=0).eval()
    add_adapters(vit, rank=2, alpha=4.0, seed=1)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.05)
    write_model(Path("model"), settings.name, image_size=32, trained=False)
    card = json.loads(Path("model/model_card.json").read_text())
    save_model(Path("model"), {k: v.clone() for k, v in vit.state_dict().items()}, list(COLORS), card)
    exported(Path("model"), Path("m.onnx"))
    pixels = tinted("Red", 1, 32, 32)
    expected = Predictor.load(Path("model")).logits(pixels[None])
    given = vit(((torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5).permute(2, 0, 1)[None])
    assert torch.allclose(expected, given, atol=1e-4), "the adapters are merged"
    found = Session.open(Path("m.onnx")).predict(pixels)
    assert np.abs(found - expected.softmax(1).numpy()[0]).max() < 1e-5


def test_the_file_takes_photos_of_any_size_and_says_what_it_is(colors: Exported) -> None:
    model = onnx.load(colors.file)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [18]
    (entry,), (answer,) = model.graph.input, model.graph.output
    shape = [size.dim_value or size.dim_param for size in entry.type.tensor_type.shape.dim]
    assert (entry.name, entry.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert shape == [1, "height", "width", 3]
    assert (answer.name, answer.type.tensor_type.elem_type) == ("probabilities", onnx.TensorProto.FLOAT)
    assert [size.dim_value for size in answer.type.tensor_type.shape.dim] == [1, 3]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["labels"]) == list(COLORS)
    assert json.loads(metadata["paths"]) == ["Warm/Red", "Cold/Green", "Cold/Blue"]
    assert (metadata["decoder"], metadata["precision"]) == (str(DECODER_VERSION), "float32")
    session = Session.open(colors.file)
    for height, width in ((1, 1), (32, 32), (3, 200), (300, 7)):
        for label in COLORS:
            answers = session.predict(tinted(label, 0, height, width))
            assert answers.sum() == pytest.approx(1, abs=1e-5)
            assert height == 1 or session.top(answers, 1)[0].label == label


def test_the_file_names_no_file_of_this_machine(colors: Exported) -> None:
    data = colors.file.read_bytes()
    for word in (b"site-packages", b".py", str(colors.folder.parent).encode(), b"stack_trace"):
        assert word not in data


def test_the_digest_is_that_of_the_weights_and_the_graph(home: Path, colors: Exported) -> None:
    first, card = Session.open(colors.file).info.digest, json.loads((colors.folder / "model_card.json").read_text())
    network = Predictor.load(colors.folder).module
    save_model(Path("same"), network.state_dict(), list(COLORS), card | {"run_id": "another"})
    assert exported(Path("same"), Path("same.onnx")).digest == first
    changed = {
        name: tensor * (1.01 if tensor.is_floating_point() else 1) for name, tensor in network.state_dict().items()
    }
    save_model(Path("other"), changed, list(COLORS), card)
    assert exported(Path("other"), Path("other.onnx")).digest != first


def test_calibration_finds_the_temperature_and_a_threshold_and_the_card_says_so(home: Path, colors: Exported) -> None:
    photos = write_tinted(Path("photos"), 20)
    info = exported(colors.folder, Path("m.onnx"), calibrate=photos)
    plain = Session.open(colors.file).info
    assert (plain.temperature, plain.threshold, plain.card["calibration"]) == (1.0, 0.5, None)
    assert info.temperature != 1.0
    assert info.card["calibration"]["photos"] == 60
    assert info.card["calibration"]["precision"] >= 0.95
    assert "Not calibrated" in colors.file.with_suffix(".card.md").read_text()
    assert "Calibrated on 60 labeled photos" in Path("m.card.md").read_text()
    session = Session.open(Path("m.onnx"))
    sure = [session.is_sure(session.predict(session.decode(path.read_bytes()))) for path in photos.rglob("*.png")]
    assert np.mean(sure) == pytest.approx(info.card["calibration"]["sure"]), (
        "the threshold of the file, on the same photos"
    )
    predictor = Predictor.load(colors.folder)
    pixels = session.decode(next(photos.rglob("*.png")).read_bytes())
    calm = (predictor.logits(pixels[None]) / info.temperature).softmax(1).numpy()[0]
    assert np.abs(session.predict(pixels) - calm).max() < 1e-5


def test_over_the_tolerance_nothing_is_written_and_the_old_file_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch, colors: Exported
) -> None:
    Path("m.onnx").write_bytes(b"the old one")
    convert = module._network

    def shifted(network: nn.Module, image_size: int) -> object:
        return convert(nn.Sequential(network, Shift()), image_size)

    monkeypatch.setattr(module, "_network", shifted)
    with pytest.raises(ModelError, match=r"does not answer as the trained one: on 16 generated photos.*No file was"):
        exported(colors.folder, Path("m.onnx"))
    assert Path("m.onnx").read_bytes() == b"the old one"
    assert [path.name for path in Path().iterdir()] == ["m.onnx"]


class Shift(nn.Module):
    """Adds a little to the first product's logit."""

    def forward(self, logits_BK: torch.Tensor) -> torch.Tensor:
        return logits_BK + torch.tensor([1e-3, 0.0, 0.0])


def test_a_model_that_has_diverged_is_not_exported(home: Path) -> None:
    network = write_model(Path("model"))
    card = json.loads(Path("model/model_card.json").read_text())
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    save_model(Path("model"), network.state_dict(), list(COLORS), card)
    with pytest.raises(ModelError, match="No file was written"):
        exported(Path("model"), Path("m.onnx"))
    with pytest.raises(ModelError, match="its training has diverged"):
        exported(Path("model"), Path("m.onnx"), calibrate=write_tinted(Path("photos"), 2))
    assert not Path("m.onnx").exists()


def test_photos_that_cannot_be_read_are_left_out_of_the_check(home: Path, colors: Exported) -> None:
    write_photo(Path("photos/a/b/deep.jpg"), 1)
    write_photo(Path("photos/top.png"), 2)
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    photos = from_folder(Path("photos"))
    found = compare(Predictor.load(colors.folder), Session.open(colors.file), photos)
    assert (found.num_photos, found.num_same) == (2, 2)
    assert photos.source == "3 photos in 'photos'"
    Path("photos/top.png").unlink()
    Path("photos/a/b/deep.jpg").unlink()
    with pytest.raises(DataError, match=r"not one of 1 photo in 'photos' can be used"):
        compare(Predictor.load(colors.folder), Session.open(colors.file), from_folder(Path("photos")))
    with pytest.raises(DataError, match="no file below it has the name of a photo"):
        from_folder(colors.folder)


def test_of_many_photos_some_from_everywhere_are_checked(home: Path) -> None:
    for number in range(2 * MOST_CHECKED):
        Path(f"photos/{number % 10}").mkdir(parents=True, exist_ok=True)
        Path(f"photos/{number % 10}/{number:05}.jpg").touch()
    found = from_folder(Path("photos"))
    assert len(found.readers) == MOST_CHECKED
    assert found.source == f"{MOST_CHECKED} of 1,000 photos in 'photos'"


def test_drawn_photos_are_the_same_each_time_and_of_many_sizes() -> None:
    first, second = (list(drawn().decoded(16)) for _ in range(2))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert len({full.shape for _, full in first}) == len(first) == 16


@pytest.mark.parametrize(
    ("library", "extra"), [("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "edge")]
)  # fmt: skip
def test_a_missing_library_is_named_with_its_extra(
    home: Path, monkeypatch: pytest.MonkeyPatch, colors: Exported, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"pip install 'fedshelf\[{extra}\]'"):
        exported(colors.folder, Path("m.onnx"))


def test_a_model_that_torch_cannot_export_is_an_error_that_says_why(home: Path, colors: Exported) -> None:
    predictor = Predictor.load(colors.folder)
    object.__setattr__(predictor, "module", Fickle())
    with pytest.raises(ModelError, match="torch cannot export this model to ONNX"):
        export(predictor, Path("m.onnx"), check=None, calibrate=None, precision=0.95)


class Fickle(nn.Module):
    """Chooses what it computes by the values of its input."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.mean((2, 3)) if images_BCHW.sum().item() > 0 else images_BCHW.amax((2, 3))


def test_the_command_writes_file_and_card_and_says_what_was_checked(home: Path, colors: Exported) -> None:
    write_model(
        Path("model"),
        labels=("a|b", "<i>x</i>", "c"),
        trained=False,
        metrics={
            "products": [
                {"product": "a|b", "correct": 1, "total": 2},
                {"product": "<i>x</i>", "correct": 1, "total": 2},
            ]
        },
    )
    code, text = run("export", "model", "--format", "onnx", "--out", "m.onnx", "--json")
    assert code == 0, text
    record = json.loads(text)
    assert (record["model"], record["card"], record["products"]) == ("m.onnx", "m.card.md", 3)
    assert record["parity"]["agreement"] == 1.0
    assert record["calibration"] is None
    assert record["digest"] == Session.open(Path("m.onnx")).info.digest
    card = Path("m.card.md").read_text()
    assert "a\\|b" in card
    assert "<i>" not in card.replace("\\<", "")
    assert "checked on 16 generated photos" in colors.text
    assert "not calibrated" in colors.text
    code, text = run("export", "model", "--out", "model.pt")
    assert code == 2
    assert "ends in .onnx" in text


def test_a_store_is_told_that_a_global_model_lacks_its_personal_tensors(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(Path("model"), personal=["head.weight"])
    info = exported(Path("model"), Path("m.onnx"))
    assert "Export a store's model" in caplog.text
    assert "each store has its own" in info.card["limits"]
    card = json.loads(Path("model/model_card.json").read_text()) | {"store": "lyon"}
    found = card_of(card, Path("model"), num_parameters=1, num_products=3)
    assert "each store has its own" not in found["limits"]
    assert "the model of store lyon" in to_markdown(replace(info, card=found))


def test_the_card_has_the_runs_protection_and_no_store_by_name(home: Path) -> None:
    write_pack(Path("stores/lyon-secret"), {"apple": 6, "milk": 6})
    write_pack(Path("stores/oslo-secret"), {"apple": 6, "milk": 6})
    code, text = run(
        "simulate", "--data-dir", "stores", "--run-dir", "r", "--image-size", "16", "--width", "8", "--batch-size", "4",
        "--device", "cpu", "--rounds", "1", "--clip-norm", "1.5", "--min-clients", "2",
    )  # fmt: skip
    assert code == 0, text
    card = json.loads(Path("r/model/model_card.json").read_text())
    found = card_of(card, Path("r/model"), num_parameters=1, num_products=2)
    assert found["privacy"]["protections"] == ["clip-norm 1.5"]
    assert found["privacy"]["guarantee"] is None
    assert found["data"]["stores"] == 2
    assert found["data"]["training_photos"] > 12
    assert "secret" not in json.dumps(found)
    Path("r/model").rename("elsewhere")
    assert (
        "Not known here" in card_of(card, Path("elsewhere"), num_parameters=1, num_products=2)["privacy"]["statement"]
    )
