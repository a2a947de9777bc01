"""A model file in use."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedshelf.core.errors import DataError, ModelError
from fedshelf.edge.serving.session import Session
from tests.edge_models import COLORS, info, photo, write_color_model


def test_a_photo_is_decoded_as_in_training_and_named(tmp_path: Path) -> None:
    session = Session.open(write_color_model(tmp_path / "m.onnx"))
    pixels = session.decode(photo((250, 5, 5), (300, 200)))
    assert pixels.shape == (32, 32, 3)
    probabilities = session.predict(pixels)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (3,)
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    best, second = session.top(probabilities, 2)
    assert best.label == "Red"
    assert best.probability > 0.99 > second.probability
    assert session.is_sure(probabilities)


def test_a_photo_below_the_threshold_is_unsure_and_its_folder_has_the_sum_of_its_products(tmp_path: Path) -> None:
    paths = ("Fruit/Apple/Gala", "Fruit/Apple/Fuji", "Fruit/Pear", "Fruit/Apple/Jazz", "Milk", "Soap")
    labels = [path.rsplit("/", 1)[-1] for path in paths]
    session = Session.open(write_color_model(tmp_path / "m.onnx", info(labels, paths)))
    probabilities = session.predict(np.full((20, 50, 3), (128, 128, 0), np.uint8))  # any size is taken
    assert not session.is_sure(probabilities)
    coarse, fine = session.top_folders(probabilities, 2)
    assert coarse[0].label == "Fruit"
    assert coarse[0].probability == pytest.approx(probabilities[:4].sum(), abs=1e-6)
    assert fine[0].label == "Fruit/Apple"
    assert fine[0].probability == pytest.approx(probabilities[[0, 1, 3]].sum(), abs=1e-6)


def test_products_without_folders_have_no_folder_guess(tmp_path: Path) -> None:
    session = Session.open(write_color_model(tmp_path / "m.onnx"))
    assert session.top_folders(session.predict(np.zeros((8, 8, 3), np.uint8))) == ()


def test_equal_products_come_in_the_order_of_the_labels(tmp_path: Path) -> None:
    session = Session.open(write_color_model(tmp_path / "m.onnx"))
    found = session.top(session.predict(np.zeros((8, 8, 3), np.uint8)), 9)
    assert [guess.label for guess in found] == list(COLORS)


def test_what_is_not_a_photo_is_refused(tmp_path: Path) -> None:
    session = Session.open(write_color_model(tmp_path / "m.onnx"))
    with pytest.raises(DataError, match="cannot be decoded: the file is not a JPEG"):
        session.decode(b"hello")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08" * 99])
def test_a_file_that_is_no_model_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot open model file '.*m\.onnx'"):
        Session.open(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Session.open(tmp_path / "none.onnx")


def test_a_model_without_our_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model file '.*m\.onnx': it is not a model file of this version"):
        Session.open(write_color_model(tmp_path / "m.onnx", metadata={}))


def test_labels_that_do_not_fit_the_outputs_are_refused(tmp_path: Path) -> None:
    path = write_color_model(tmp_path / "m.onnx", metadata=info(["A", "B"]).to_metadata())
    with pytest.raises(ModelError, match="2 labels for 3 outputs"):
        Session.open(path)


def test_a_model_whose_answer_is_no_probabilities_is_noticed_before_it_serves(tmp_path: Path) -> None:
    session = Session.open(write_color_model(tmp_path / "m.onnx"))
    session.check()

    class Broken:
        def run(self, *args: object) -> list[np.ndarray]:
            return [np.full((1, 3), np.nan, np.float32)]

    with pytest.raises(ModelError, match="not the probabilities of 3 products"):
        replace(session, runtime=Broken()).check()


@pytest.mark.parametrize("label", ["\ud800", "half \udfff"])
def test_labels_that_cannot_be_sent_are_refused(tmp_path: Path, label: str) -> None:
    metadata = {**info(["a", "b", "c"]).to_metadata(), "labels": json.dumps(["a", "b", label])}
    with pytest.raises(ModelError, match="is damaged: UnicodeEncodeError"):
        Session.open(write_color_model(tmp_path / "m.onnx", metadata=metadata))


def test_a_model_of_another_decoder_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Session.open(write_color_model(tmp_path / "m.onnx", info(decoder=1)))
    assert "version 1 of the photo decoder" in caplog.text


def test_a_missing_onnx_runtime_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_color_model(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"pip install 'fedshelf\[edge\]'"):
        Session.open(path)


def test_a_session_needs_no_torch(tmp_path: Path) -> None:
    path = write_color_model(tmp_path / "m.onnx")
    code = (
        "import sys; from pathlib import Path; from fedshelf.edge.serving.session import Session;"
        "import numpy as np; Session.open(Path(sys.argv[1])).predict(np.zeros((8, 8, 3), np.uint8));"
        "assert not {'torch', 'timm', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
