"""Corrections that change the answers at once, with the exact head of a run."""

import json
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fedshelf.app.predictor import Predictor, model_folder
from fedshelf.app.trained_photos import TrainedPhotos, trained_on
from fedshelf.core.errors import ModelError
from fedshelf.data.photo_set import PhotoSet
from fedshelf.edge.making.graph import digest_of, without_features
from fedshelf.edge.model_info import FEATURES, OUTPUT
from fedshelf.edge.serving.corrections import Corrections
from fedshelf.edge.serving.guard import Access
from fedshelf.edge.serving.http_api import make_app
from fedshelf.edge.serving.local_head import ExactHead, LocalHead, head_file_of, with_constant
from fedshelf.edge.serving.serve import _local_head
from fedshelf.edge.serving.session import Session
from fedshelf.models.head import linear_head
from fedshelf.storage.trained_photos import TrainedPhotosLog, photo_key
from tests.model_folders import write_tinted
from tests.unit.cli.screen import run
from tests.unit.edge.test_http_api import asker

NOBODY = TrainedPhotos(data_dir=Path(), runs=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A run with an exact head, and its model file.

    Attributes:
        stores: the stores' photos.
        run: the run's folder.
        file: the model file.
    """

    stores: Path
    run: Path
    file: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("updatable")
    for number in range(2):
        write_tinted(place / "stores" / f"store-{number}", 6, seed=100 * number)
    flags = ("--algorithm", "ridge", "--rounds", "1", "--model", "resnet10", "--width", "8", "--image-size", "16")
    done = run("simulate", "--data-dir", str(place / "stores"), *flags, "--run-dir", str(place / "run"))
    assert done[0] == 0, done[1]
    done = run("export", str(place / "run"), "--out", str(place / "m.onnx"), "--updatable")
    assert done[0] == 0, done[1]
    return Trained(stores=place / "stores", run=place / "run", file=place / "m.onnx")


@pytest.fixture
def session(trained: Trained) -> Session:
    return Session.open(trained.file)


@pytest.fixture
def head(trained: Trained, session: Session) -> ExactHead:
    return ExactHead.read(head_file_of(trained.file), session)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for label in ("Red", "Green", "Blue"):
        (tmp_path / "store" / label).mkdir(parents=True)
    return tmp_path / "store"


def jpeg(color: tuple[int, int, int]) -> bytes:
    noise = np.random.default_rng(sum(color)).integers(-20, 20, (40, 40, 3))
    image, data = Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)), BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def filed(store: Path, session: Session) -> Corrections:
    return Corrections(store, labels=session.info.labels, paths=session.info.paths)


def features_of(session: Session, photo: bytes) -> NDArray[np.float32]:
    return session.predict_with_features(session.decode(photo))[1]


def unsure(session: Session) -> bytes:
    """A photo for which no product is so probable that a correction is held for review."""
    mixtures = (jpeg((red, green, 120)) for red in range(20, 240, 20) for green in range(20, 240, 20))
    return next(photo for photo in mixtures if session.predict(session.decode(photo)).max() < 0.8)


PURPLE, TEAL = jpeg((150, 30, 160)), jpeg((30, 150, 150))


def test_the_files_inverse_is_that_of_the_second_moments_of_all_stores_photos(
    trained: Trained, head: ExactHead
) -> None:
    """Without its diagonal, which lambda raises."""
    predictor = Predictor.load(model_folder(str(trained.run), best=False))
    photos: list[PhotoSet] = [predictor.labeled_photos(store).photo_set for store in sorted(trained.stores.iterdir())]
    sessions = Session.open(trained.file)
    features = [sessions.predict_with_features(image)[1] for found in photos for image in found.images]
    features_NE = with_constant(np.stack(features))
    moments_EE, found_EE = features_NE.T @ features_NE, np.linalg.inv(head.inverse)
    away = ~np.eye(len(moments_EE), dtype=bool)
    assert np.abs(found_EE - moments_EE)[away].max() < 1e-5 * np.abs(moments_EE).max()
    raised_E = np.diagonal(found_EE - moments_EE)
    assert raised_E[:-1].min() > 0
    assert np.allclose(raised_E[:-1], raised_E[0], rtol=1e-3)


def test_the_head_with_corrections_is_the_one_of_all_photos_together(session: Session, head: ExactHead) -> None:
    features_ND = np.stack([features_of(session, photo) for photo in (PURPLE, TEAL, jpeg((90, 90, 90)))])
    labels_N = np.array([2, 0, 1])
    damped_EE, features_NE = np.linalg.inv(head.inverse), with_constant(features_ND)
    solved_EK = np.linalg.solve(
        damped_EE + features_NE.T @ features_NE, damped_EE @ head.weights + features_NE.T @ np.eye(3)[labels_N]
    )
    updated_EK = head.with_photos(features_ND, labels_N)
    assert np.abs(updated_EK - solved_EK).max() < 1e-6 * np.abs(solved_EK).max()
    assert np.abs(updated_EK - head.weights).max() > 1e-3 * np.abs(solved_EK).max()


def test_a_correction_changes_the_answers_at_once_and_undone_leaves_no_trace(
    store: Path, session: Session, head: ExactHead
) -> None:
    corrections = filed(store, session)
    local = LocalHead(session, head, corrections, NOBODY)
    pixels = session.decode(PURPLE)
    before = local.predict(pixels)
    assert np.array_equal(before, session.predict(pixels))
    wrong = int(before.argmin())
    correction = corrections.file(PURPLE, session.info.labels[wrong], source="a" * 64)
    after = local.predict(pixels)
    assert after[wrong] > before[wrong]
    assert local.refresh() == {correction.id}
    filed(store, session).undo(correction.id)  # by another process
    assert np.array_equal(local.predict(pixels), before)
    assert not local.refresh()


def test_the_order_of_corrections_and_a_restart_change_nothing(
    tmp_path: Path, session: Session, head: ExactHead
) -> None:
    answers = []
    for name, order in (("one", (PURPLE, TEAL)), ("two", (TEAL, PURPLE))):
        for label in session.info.labels:
            (tmp_path / name / label).mkdir(parents=True)
        corrections = filed(tmp_path / name, session)
        for photo in order:
            corrections.file(photo, "Blue" if photo is PURPLE else "Red", source=str(len(photo)))
        for _ in range(2):
            local = LocalHead(session, head, filed(tmp_path / name, session), NOBODY)
            answers.append(local.predict(session.decode(jpeg((90, 90, 90)))))
    for other in answers[1:]:
        assert np.abs(answers[0] - other).max() < 1e-6


def test_a_correction_that_the_model_was_trained_on_is_not_learned_again(
    tmp_path: Path, store: Path, session: Session, head: ExactHead
) -> None:
    corrections = filed(store, session)
    correction = corrections.file(PURPLE, "Blue", source="a" * 64)
    key = photo_key(correction.photo, "Blue")

    def learned(run_id: str, in_round: int) -> frozenset[str]:
        log = TrainedPhotosLog(tmp_path / f"{run_id}-{in_round}", run_id)
        log.start([])
        log.add(in_round, [key])
        return LocalHead(session, head, corrections, TrainedPhotos(data_dir=store, runs=(log,))).refresh()

    model_run = session.info.card["run_id"]
    assert learned(model_run, 1) == frozenset()
    assert learned(model_run, 2) == {correction.id}  # the model is that of round 1
    assert learned("another", 1) == {correction.id}


def test_a_deleted_photo_and_an_unknown_product_are_left_out(
    store: Path, session: Session, head: ExactHead, caplog: pytest.LogCaptureFixture
) -> None:
    corrections = filed(store, session)
    gone = corrections.file(PURPLE, "Blue", source="a" * 64)
    corrections.file(TEAL, "Kiwi", source="b" * 64)
    (store / gone.path).unlink()
    local = LocalHead(session, head, corrections, NOBODY)
    assert local.refresh() == frozenset()
    assert gone.id in caplog.text


def test_the_page_is_told_that_the_answers_have_changed(store: Path, session: Session, head: ExactHead) -> None:
    corrections = filed(store, session)
    local = LocalHead(session, head, corrections, trained_on(store))
    ask = asker(make_app(session, access=Access.of("127.0.0.1", token=""), corrections=corrections, local_head=local))
    photo = unsure(session)

    def probability(of: str) -> float:
        found: httpx.Response = ask("POST", "/v1/predict", files={"file": photo})
        return float({one["product"]: one["probability"] for one in found.json()["predictions"]}[of])

    assert ask("GET", "/v1/model").json()["learns_at_once"] is True
    before = probability("Green")
    sent = ask("POST", "/v1/corrections", files={"file": photo}, data={"product": "Green"})
    assert sent.json()["learned"] is True
    assert probability("Green") > before
    unknown = ask("POST", "/v1/corrections", files={"file": TEAL}, data={"product": "Kiwi"})
    assert unknown.json()["learned"] is False


def test_a_head_of_another_model_or_a_damaged_one_is_refused(
    tmp_path: Path, trained: Trained, session: Session, head: ExactHead
) -> None:
    cases = {
        "belongs to model": replace(head, model="0" * 64).to_bytes(),
        "do not fit": replace(head, weights=head.weights[:, :2].copy()).to_bytes(),
        "not finite": replace(head, inverse=head.inverse * np.nan).to_bytes(),
        "out of range": replace(head, temperature=0.0).to_bytes(),
        "cannot be read": head.to_bytes()[:-9],
    }
    for problem, content in cases.items():
        (tmp_path / "bad.head.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=problem):
            ExactHead.read(tmp_path / "bad.head.safetensors", session)


def test_features_are_an_output_that_changes_no_probability_and_can_be_removed(
    trained: Trained, session: Session, tmp_path: Path
) -> None:
    assert session.has_features
    assert "second moments" in trained.file.with_suffix(".card.md").read_text()
    plain = without_features(onnx.load(trained.file))
    assert [output.name for output in plain.graph.output] == [OUTPUT]
    assert not any(FEATURES in node.output for node in plain.graph.node)
    assert digest_of(plain) != session.info.digest
    onnx.save(plain, tmp_path / "plain.onnx")
    opened = Session.open(tmp_path / "plain.onnx")
    assert not opened.has_features
    pixels = session.decode(PURPLE)
    assert np.array_equal(opened.predict(pixels), session.predict_with_features(pixels)[0])


def test_the_features_are_what_the_output_layer_takes(trained: Trained, session: Session) -> None:
    predictor = Predictor.load(model_folder(str(trained.run), best=False))
    taken = []
    layer = linear_head(predictor.module)[1]
    layer.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    pixels = session.decode(PURPLE)
    with torch.inference_mode():
        predictor.logits(pixels[None])
    assert np.abs(taken[0].numpy()[0] - session.predict_with_features(pixels)[1]).max() < 1e-4


def test_only_a_run_with_an_exact_head_can_be_updatable(trained: Trained, tmp_path: Path) -> None:
    flags = ("--rounds", "1", "--model", "resnet10", "--width", "8", "--image-size", "16", "--local-epochs", "1")
    done = run("simulate", "--data-dir", str(trained.stores), *flags, "--run-dir", str(tmp_path / "other"))
    assert done[0] == 0, done[1]
    for folder, problem in ((tmp_path / "other", "--algorithm ridge"), (trained.run / "model", "")):
        code, text = run("export", str(folder), "--out", str(tmp_path / "m.onnx"), "--updatable", "--json")
        assert (code == 0) == (not problem)
        assert problem in text
    assert json.loads(text)["head"] == str(tmp_path / "m.head.safetensors")


def test_serving_says_whether_corrections_change_the_answers(trained: Trained, store: Path, tmp_path: Path) -> None:
    session = Session.open(trained.file)
    corrections = filed(store, session)
    found, said = _local_head(trained.file, session, corrections, in_browser=False)
    assert found is not None
    assert "at once: 0 corrections" in said
    assert _local_head(trained.file, session, corrections, in_browser=True)[0] is None
    missing, said = _local_head(tmp_path / "elsewhere.onnx", session, corrections, in_browser=False)
    assert missing is None
    assert "with the next model" in said
