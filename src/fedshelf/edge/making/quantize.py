"""Quantizes a model file in the store, and certifies the result there: on its photos and its processor.

The int8 file is kept only if

    same product with graph optimizations on and off     in at least 99.5 % of all photos
    accuracy                                             at most 1 point below float32, on the same photos
    size                                                 at most 31 % of the float32 file

because processors differ in how they compute with 8 bits, and models in how much they lose by it.
"""

import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedshelf.config import places
from fedshelf.core.errors import DataError, ModelError, UsageError
from fedshelf.core.text import counted
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.dataset import load_known
from fedshelf.data.folder import scan
from fedshelf.data.photo_set import PhotoSet
from fedshelf.edge.making.card import card_file_of, to_markdown
from fedshelf.edge.making.graph import digest_of, with_info, without_features
from fedshelf.edge.making.int8 import quantized
from fedshelf.edge.making.libraries import import_extra
from fedshelf.edge.model_info import ModelInfo
from fedshelf.edge.serving.session import Session
from fedshelf.storage.atomic_files import temporary_folder, write_together

LEAST_AGREEMENT, MOST_LOSS, MOST_BYTES = 0.995, 0.01, 0.31
CALIBRATION_PHOTOS = 200
LEAST_PHOTOS = 20
"""Fewer validation photos certify nothing."""
_VAL_FRACTION = 0.2


class NotCertifiedError(ModelError):
    """The int8 model is not good enough here. The float32 model stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What was measured of an int8 model, on the same photos as the float32 model.

    Attributes:
        photos: number of validation photos.
        agreement: share of them with the same product, with graph optimizations on and off.
        accuracy: of the int8 model.
        float_accuracy: of the float32 model.
        bytes_ratio: size of the file divided by that of the float32 file.
        processor: the processor.
        runtime: version of ONNX Runtime.
    """

    photos: int
    agreement: float
    accuracy: float
    float_accuracy: float
    bytes_ratio: float
    processor: str
    runtime: str

    @property
    def loss(self) -> float:
        """Accuracy that int8 costs."""
        return self.float_accuracy - self.accuracy

    def problems(self) -> list[str]:
        """Why the model is not good enough; empty if it is."""
        found = []
        if self.photos < LEAST_PHOTOS:
            found.append(
                f"{counted(self.photos, 'validation photo')} certify nothing: give at least {LEAST_PHOTOS}, for "
                "instance with --test-dir"
            )
        if self.agreement < LEAST_AGREEMENT:
            found.append(
                f"with and without graph optimizations, it names the same product in {100 * self.agreement:.2f} % of "
                f"the photos (at least {100 * LEAST_AGREEMENT:g} % is needed)"
            )
        if self.loss > MOST_LOSS + 1e-9:
            found.append(
                f"it loses {100 * self.loss:.2f} points of accuracy on {counted(self.photos, 'photo')}: "
                f"{100 * self.accuracy:.2f} % instead of {100 * self.float_accuracy:.2f} % (at most "
                f"{100 * MOST_LOSS:g} may be lost)"
            )
        if self.bytes_ratio > MOST_BYTES:
            found.append(
                f"it has {100 * self.bytes_ratio:.1f} % of the bytes (at most {100 * MOST_BYTES:g} % is worth it)"
            )
        return found

    def to_record(self) -> dict[str, Any]:
        """The value of `int8` in the model card."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def quantize(file: Path, photos: Path, out: Path, *, test_dir: Path | None) -> tuple[ModelInfo, Certificate]:
    """Write the int8 form of a model file, and its card, if it is certified on these photos and this processor.

    Args:
        file: a float32 model file.
        photos: the store's photos, one folder per product. Its training photos set the ranges of the numbers; its
            validation photos (`val/`, or a fifth) certify the result.
        out: the file to write, whose name ends in `.onnx`.
        test_dir: labeled photos that certify the result instead of the validation photos.

    Returns:
        The new file's metadata, and what was measured.

    Raises:
        NotCertifiedError: the int8 model is not good enough here. Nothing is written.
        UsageError: a library is missing, or a file name is wrong.
        DataError: the photos cannot be used.
        ModelError: `file` is not a float32 model file.
        RunError: `out` cannot be written.
    """
    card_file = card_file_of(out)
    onnx = import_extra("onnx", "export")
    float_session = Session.open(file)
    info = float_session.info
    if info.precision != "float32":
        raise UsageError(f"'{file}' is quantized already ({info.precision}): give the file of 'fedshelf export'")
    if out.absolute() == file.absolute():
        raise UsageError(f"--out {out} is the float32 file, which stays: choose another name")
    calibration, validation = _photos(info, photos, test_dir)
    with temporary_folder("fedshelf-quantize-") as folder:
        candidate = Path(folder) / "model.onnx"
        try:
            model = quantized(without_features(onnx.load(file)), _spread(calibration, CALIBRATION_PHOTOS), Path(folder))
        except (ValueError, RuntimeError, AssertionError, NotImplementedError, KeyError) as error:
            raise ModelError(f"onnxruntime cannot quantize this model: {str(error).splitlines()[0]:.300}") from error
        made = replace(info, precision="int8", digest=digest_of(model))
        candidate.write_bytes(with_info(model, made))
        certificate = _certify(file, candidate, validation)
    if problems := certificate.problems():
        raise NotCertifiedError(f"the float32 model stays, no file was written: {'; '.join(problems)}")
    made = replace(made, card={**info.card, "int8": certificate.to_record()})
    write_together({card_file: to_markdown(made), out: with_info(model, made)})
    return made, certificate


def _photos(info: ModelInfo, photos: Path, test_dir: Path | None) -> tuple[PhotoSet, PhotoSet]:
    """The photos to calibrate on, and those that certify."""
    members = tuple(
        (label,) if label == path else (label, path) for label, path in zip(info.labels, info.paths, strict=True)
    )
    catalogue, cache = Catalogue(info.labels, members), PhotoCache(root=places.photo_cache())
    seed = (info.card.get("training") or {}).get("seed", 0)  # those that training held out, too
    found = scan(photos, val_fraction=0.0 if test_dir else _VAL_FRACTION, seed=seed if isinstance(seed, int) else 0)
    held_out, whose = found.validation, str(photos)
    if test_dir is not None:
        held_out, whose = scan(test_dir, val_fraction=0.0, seed=0).train, str(test_dir)
    if not held_out:
        raise DataError(f"'{photos}' holds too few photos: none is left to certify the model on. Give --test-dir")
    calibration = load_known(found.train, catalogue, cache, info.image_size, whose=str(photos))
    validation = load_known(held_out, catalogue, cache, info.image_size, whose=whose)
    return calibration.photo_set, validation.photo_set


def _spread(photos: PhotoSet, most: int) -> Sequence[NDArray[np.uint8]]:
    count = min(len(photos), most)
    return [np.ascontiguousarray(photos.images[at * len(photos) // count]) for at in range(count)]


def _certify(file: Path, candidate: Path, photos: PhotoSet) -> Certificate:
    answers = [
        _answers(Session.open(path, optimize=optimize), photos)
        for path, optimize in ((file, True), (candidate, True), (candidate, False))
    ]
    float_N, optimized_N, plain_N = answers
    return Certificate(
        photos=len(photos), agreement=float((optimized_N == plain_N).mean()),
        accuracy=float((optimized_N == photos.labels).mean()), float_accuracy=float((float_N == photos.labels).mean()),
        bytes_ratio=candidate.stat().st_size / file.stat().st_size, processor=_processor(),
        runtime=import_extra("onnxruntime", "edge").__version__,
    )  # fmt: skip


def _answers(session: Session, photos: PhotoSet) -> NDArray[np.int64]:
    """The most likely product of each photo [N]."""
    return np.array([int(session.predict(np.ascontiguousarray(photo)).argmax()) for photo in photos.images])


def _processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
