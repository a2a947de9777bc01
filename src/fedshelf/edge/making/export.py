"""Exports a trained model as one ONNX file: a photo's pixels in, probabilities out.

1  T, threshold <- labeled photos, if there are any
2  the network to ONNX (torch's exporter, opset 18), joined with the resize, normalization and answer
3  for each photo: compare the file's probabilities with torch's; over the tolerance, fail
4  write the file and its card, together
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedshelf.app.predictor import Predictor
from fedshelf.core.errors import ModelError
from fedshelf.core.text import counted
from fedshelf.data.decode import DECODER_VERSION
from fedshelf.edge.making.calibration import (
    UNCALIBRATED_THRESHOLD,
    best_temperature,
    best_threshold,
    softmax,
)
from fedshelf.edge.making.card import card_file_of, to_markdown
from fedshelf.edge.making.card_content import card_of, is_without_personal
from fedshelf.edge.making.check_photos import CheckPhotos, drawn, from_folder
from fedshelf.edge.making.graph import LOGITS, OPSET, PIXELS, Preparation, digest_of, whole_graph, with_info
from fedshelf.edge.making.libraries import import_extra
from fedshelf.edge.making.updatable import head_of, solution_of
from fedshelf.edge.model_info import ModelInfo
from fedshelf.edge.serving.local_head import head_file_of
from fedshelf.edge.serving.session import Session
from fedshelf.storage.atomic_files import temporary_folder, write_together
from fedshelf.storage.model_files import load_model_files
from fedshelf.training.trainer import EVALUATION_BATCH

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference of a probability from torch's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Calibration:
    temperature: float
    threshold: float
    record: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How a model file's answers differ from those of the model that it was made from.

    Attributes:
        num_photos: number of photos.
        max_difference: largest difference of a probability.
        num_same: photos with the same most likely product.
        foreign_max_difference: largest difference of the probability of the most likely product, with pixels of another
            decoder.
        foreign_num_same: photos with the same most likely product, with pixels of another decoder.
    """

    num_photos: int
    max_difference: float
    num_same: int
    foreign_max_difference: float
    foreign_num_same: int


def export(
    predictor: Predictor, out: Path, *, check: Path | None, calibrate: Path | None, precision: float,
    updatable: bool = False,
) -> ModelInfo:  # fmt: skip
    """Write a model file, and its model card beside it.

    Args:
        predictor: the model.
        out: the file, whose name ends in `.onnx`; replaced if it exists.
        check: folder of photos to compare the file with torch on; None draws some.
        calibrate: folder of labeled photos, one folder per product, to calibrate on; None does not calibrate.
        precision: share of sure answers that must be right.
        updatable: also write the file with which a till learns from corrections at once (`making.updatable`).

    Returns:
        The file's metadata.

    Raises:
        UsageError: a library is missing, `out` is not named like a model file, or the model cannot be updatable.
        DataError: a folder of photos cannot be used.
        ModelError: the model cannot be exported, or the file's answers are not the model's. Nothing is written.
        RunError: the file cannot be written.
    """
    card_file = card_file_of(out)
    solution = solution_of(predictor) if updatable else None
    for module, extra in (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "edge")):
        import_extra(module, extra)
    photos = from_folder(check) if check is not None else drawn()
    calibration = _calibrated(predictor, calibrate, precision)
    given = predictor.normalization
    model = whole_graph(
        _network(predictor.module, predictor.image_size),
        Preparation(image_size=predictor.image_size, mean=given.mean, std=given.std),
        num_products=len(predictor.labels), temperature=calibration.temperature, with_features=updatable,
    )  # fmt: skip
    model_card = load_model_files(predictor.folder)[2]
    if is_without_personal(model_card):
        logger.warning(
            "this run's stores each have tensors of their own, such as an output layer; in the global model these are "
            "at their first values. Export a store's model: a client's state directory, or RUN/stores/STORE"
        )
    card = card_of(
        model_card, predictor.folder, num_products=len(predictor.labels),
        num_parameters=sum(parameter.numel() for parameter in predictor.module.parameters()),
    )  # fmt: skip
    info = ModelInfo(
        labels=predictor.labels, paths=predictor.tree.paths, image_size=predictor.image_size, decoder=DECODER_VERSION,
        threshold=calibration.threshold, temperature=calibration.temperature, digest=digest_of(model),
        precision="float32", card={**card, "calibration": calibration.record, "updatable": updatable},
    )  # fmt: skip
    with temporary_folder("fedshelf-export-") as folder:
        candidate = Path(folder) / "model.onnx"
        candidate.write_bytes(with_info(model, info))
        found = compare(predictor, Session.open(candidate, num_threads=1), photos)
    _check(found, photos.source)
    info = replace(info, card={**info.card, **_records(found, photos.source)})
    files: dict[Path, str | bytes] = {card_file: to_markdown(info)}
    if solution is not None:
        files[head_file_of(out)] = head_of(solution, info).to_bytes()
    write_together({**files, out: with_info(model, info)})
    return info


def compare(predictor: Predictor, session: Session, photos: CheckPhotos) -> Comparison:
    """Compare the answers of a model file with those of the model that it was made from, photo by photo.

    Args:
        predictor: the model.
        session: the model file.
        photos: the photos.

    Raises:
        DataError: none of the photos can be decoded.
    """
    num_photos, num_same, foreign_num_same, differences, foreign = 0, 0, 0, [0.0], [0.0]
    for pixels, full_size in photos.decoded(predictor.image_size):
        logits_K = predictor.logits(pixels[None]).numpy()[0].astype(np.float64)
        expected_K = softmax(logits_K[None] / session.info.temperature)[0]
        answer_K, foreign_K, best = session.predict(pixels), session.predict(full_size), int(expected_K.argmax())
        num_photos += 1
        num_same += int(answer_K.argmax()) == best
        foreign_num_same += int(foreign_K.argmax()) == best
        differences.append(float(np.abs(answer_K - expected_K).max()))
        foreign.append(float(abs(foreign_K[best] - expected_K[best])))
    return Comparison(
        num_photos=num_photos, max_difference=float(np.max(differences)), num_same=num_same,
        foreign_max_difference=float(np.max(foreign)), foreign_num_same=foreign_num_same,
    )  # fmt: skip


def _check(found: Comparison, source: str) -> None:
    if found.max_difference <= TOLERANCE and found.num_same == found.num_photos:  # false if a value is not a number
        return
    raise ModelError(
        f"the exported model does not answer as the trained one: on {source}, probabilities differ by up to "
        f"{found.max_difference:.1e} (at most {TOLERANCE:.0e} is allowed), and the most likely product differs in "
        f"{counted(found.num_photos - found.num_same, 'photo')} of {found.num_photos:,}. No file was written. Try "
        "other versions of torch, onnx and onnxruntime, or report this model as a bug"
    )


def _records(found: Comparison, source: str) -> dict[str, Any]:
    return {
        "parity": {
            "photos": source, "max_difference": found.max_difference, "agreement": found.num_same / found.num_photos,
        },
        "foreign_decoder": {
            "photos": source, "max_difference": found.foreign_max_difference,
            "agreement": found.foreign_num_same / found.num_photos,
        },
    }  # fmt: skip


def _calibrated(predictor: Predictor, folder: Path | None, precision: float) -> _Calibration:
    if folder is None:
        return _Calibration(temperature=1.0, threshold=UNCALIBRATED_THRESHOLD, record=None)
    photos = predictor.labeled_photos(folder).photo_set
    batches = [
        predictor.logits(photos.images[start : start + EVALUATION_BATCH]).numpy()
        for start in range(0, len(photos), EVALUATION_BATCH)
    ]
    logits_NK = np.concatenate(batches).astype(np.float64)
    if not np.isfinite(logits_NK).all():
        raise ModelError(
            "the model's answers to photos are not numbers: its training has diverged. Export another round"
        )
    temperature = best_temperature(logits_NK, photos.labels)
    probabilities_NK = softmax(logits_NK / temperature)
    found = best_threshold(
        probabilities_NK.max(1), probabilities_NK.argmax(1) == photos.labels, precision=precision
    )  # fmt: skip
    record = {
        "photos": len(photos), "folder": folder.name, "target": precision, "sure": found.sure,
        "precision": found.precision,
    }  # fmt: skip
    # The file computes in float32: the photo at the threshold stays above it.
    threshold = found.value * (1 - TOLERANCE) if found.precision is not None else found.value
    return _Calibration(temperature=temperature, threshold=threshold, record=record)


def _network(module: nn.Module, image_size: int) -> Any:
    """Convert the network to an `onnx.ModelProto` from `pixels` to `logits`."""
    example = torch.zeros(1, 3, image_size, image_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporter about parts of torch
            program = torch.onnx.export(
                module, (example,), dynamo=True, opset_version=OPSET, input_names=[PIXELS], output_names=[LOGITS],
                verbose=False,
            )  # fmt: skip
    except Exception as error:
        reason = next((str(one) for one in (error.__cause__, error) if one is not None and str(one)), repr(error))
        raise ModelError(
            f"torch cannot export this model to ONNX: {reason.strip().splitlines()[0]:.300}. A model of your own must "
            "not choose its layers by the values of its input"
        ) from error
    if program is None:
        raise ModelError("torch cannot export this model to ONNX")
    return program.model_proto
