"""The output layer at the till, which learns from a correction at once.

    W' <- W + P F^T (I + F P F^T)^-1 (Y - F W)

W and P = (A + lambda · s · R)^-1 are those of the run's exact head (`algorithms.ridge`), F holds the features of the
corrected photos, and Y their products. W' is the head that the run would have computed with these photos among the
others, at the same regularization (Woodbury's identity; Hager 1989, "Updating the Inverse of a Matrix", eq. 1). It is
computed from W each time, so a correction that is taken back leaves no trace.

A correction that the model was trained on is left out, because A and the products' sums contain it.

Shapes: N corrected photos, D features, E = D + 1 with a constant 1, K products.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedshelf.core.errors import DataError, ModelError
from fedshelf.core.text import counted, to_filesystem
from fedshelf.edge.serving.correction_journal import Correction, Status
from fedshelf.edge.serving.corrections import Corrections
from fedshelf.edge.serving.session import Session

if TYPE_CHECKING:  # loads the cryptography of identities
    from fedshelf.app.trained_photos import TrainedPhotos

logger = logging.getLogger(__name__)

HEAD_SUFFIX = ".head.safetensors"
MOST_CORRECTIONS = 500
"""Corrections that are learned from at once: the newest ones."""
_FORMAT = "1"
_WEIGHTS, _INVERSE = "weights", "inverse"

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ExactHead:
    """An exact output layer, and what is needed to add photos to it.

    Attributes:
        model: digest of the model file that it belongs to.
        weights: W [E, K].
        inverse: P [E, E].
        temperature: logits are divided by it before the model file's own temperature.
    """

    model: str
    weights: Doubles
    inverse: Doubles
    temperature: float

    def to_bytes(self) -> bytes:
        """The content of its file."""
        metadata = {"format": _FORMAT, "model": self.model, "temperature": json.dumps(self.temperature)}
        return bytes(save({_WEIGHTS: self.weights, _INVERSE: self.inverse}, metadata=metadata))

    @classmethod
    def read(cls, path: Path, session: Session) -> "ExactHead":
        """Read the file of a model.

        Args:
            path: the file.
            session: the model.

        Raises:
            ModelError: the file cannot be read, is damaged, or belongs to another model.
        """
        try:
            with safe_open(path, framework="numpy") as opened:
                metadata = opened.metadata() or {}
                weights_EK, inverse_EE = opened.get_tensor(_WEIGHTS), opened.get_tensor(_INVERSE)
            found = cls(
                model=metadata["model"], weights=weights_EK, inverse=inverse_EE,
                temperature=float(json.loads(metadata["temperature"])),
            )  # fmt: skip
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ModelError(f"'{path}' cannot be read as the head of a model: {error!r:.200}") from error
        problem = found._problem(metadata, session)
        if problem:
            raise ModelError(f"'{path}': {problem}. Export the model again with --updatable")
        return found

    def with_photos(self, features_ND: NDArray[np.float32], labels_N: NDArray[np.int64]) -> Doubles:
        """W' [E, K], with some photos added.

        Args:
            features_ND: their features.
            labels_N: the index of each one's product.
        """
        features_NE = with_constant(features_ND)
        errors_NK = -features_NE @ self.weights
        errors_NK[np.arange(len(labels_N)), labels_N] += 1
        spread_EN = self.inverse @ features_NE.T
        gain_NN = features_NE @ spread_EN
        gain_NN[np.diag_indices_from(gain_NN)] += 1
        updated_EK: Doubles = self.weights + spread_EN @ np.linalg.solve(gain_NN, errors_NK)
        return updated_EK

    def _problem(self, metadata: Mapping[str, str], session: Session) -> str:
        size, num_products = len(self.inverse), len(session.info.labels)
        if metadata.get("format") != _FORMAT:
            return f"its format is {metadata.get('format', 'none')[:40]!r} instead of {_FORMAT!r}"
        if self.model != session.info.digest:
            return f"it belongs to model {self.model[:12]}, and this is model {session.info.digest[:12]}"
        if self.inverse.shape != (size, size) or self.weights.shape != (size, num_products):
            return f"its values do not fit {counted(num_products, 'product')}"
        arrays = (self.weights, self.inverse)
        if any(array.dtype != np.float64 or not np.isfinite(array).all() for array in arrays):
            return "its values are not finite numbers of 64 bits"
        if not 0 < self.temperature < float("inf"):
            return "its temperature is out of range"
        return ""


class LocalHead:
    """Names photos with the corrections of a store in its output layer. For one thread.

    Args:
        session: a model file with features.
        head: its exact head.
        corrections: the store's corrections.
        trained: which photos the store's clients have trained on.
    """

    def __init__(
        self, session: Session, head: ExactHead, corrections: Corrections, trained: "TrainedPhotos"
    ) -> None:  # fmt: skip
        self._session, self._head, self._corrections, self._trained = session, head, corrections, trained
        self._labels = {label: at for at, label in enumerate(session.info.labels)}
        self._features: dict[str, NDArray[np.float32]] = {}  # [D], by digest of the photo
        self._learned: frozenset[str] = frozenset()
        self._weights_EK: Doubles | None = None
        self._version: int | None = None

    def refresh(self) -> frozenset[str]:
        """Learn what was corrected, and forget what was taken back, since the last call.

        Returns:
            The ids of the corrections that are in the answers.
        """
        version = self._corrections.version
        if version != self._version:
            self._learn([found for found in self._corrections.all() if self._is_news(found)][-MOST_CORRECTIONS:])
            self._version = version
        return self._learned

    def predict(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probability of each product: float32 [K]; the model file's own as long as there are no corrections.

        Args:
            pixels_HW3: see `Session.predict`.
        """
        self.refresh()
        if self._weights_EK is None:
            return self._session.predict(pixels_HW3)
        features_D = self._session.predict_with_features(pixels_HW3)[1]
        logits_K = (with_constant(features_D[None]) @ self._weights_EK)[0]
        logits_K /= self._head.temperature * self._session.info.temperature
        odds_K = np.exp(logits_K - logits_K.max())
        probabilities_K: NDArray[np.float32] = (odds_K / odds_K.sum()).astype(np.float32)
        return probabilities_K

    def _is_news(self, correction: Correction) -> bool:
        """Whether a correction is trained on, but not in the model yet."""
        if correction.status is not Status.TRAINING or correction.product not in self._labels:
            return False
        run_id, newest = self._session.info.card.get("run_id"), self._session.info.card.get("round")
        if not isinstance(run_id, str) or not isinstance(newest, int):
            return True
        return not self._trained.is_in(correction.photo, correction.path, run_id=run_id, round=newest)

    def _learn(self, corrections: Iterable[Correction]) -> None:
        known = [(found, features) for found in corrections if (features := self._features_of(found)) is not None]
        self._features = {found.photo: features for found, features in known}
        self._learned = frozenset(found.id for found, _ in known)
        self._weights_EK = None
        if known:
            labels_N = np.array([self._labels[found.product] for found, _ in known])
            self._weights_EK = self._head.with_photos(np.stack([features for _, features in known]), labels_N)

    def _features_of(self, correction: Correction) -> NDArray[np.float32] | None:
        """Features [D] of a corrected photo; None if it cannot be read any more."""
        if (found := self._features.get(correction.photo)) is not None:
            return found
        path = self._corrections.data_dir / to_filesystem(correction.path)
        try:
            return self._session.predict_with_features(self._session.decode(path.read_bytes()))[1]
        except (OSError, DataError) as error:
            logger.warning("correction %s is not in the answers: '%s' cannot be read: %s", correction.id, path, error)
            return None


def with_constant(features_ND: NDArray[np.float32]) -> Doubles:
    """Features and a constant 1: float64 [N, E]."""
    return np.concatenate([features_ND.astype(np.float64), np.ones((len(features_ND), 1))], axis=1)


def head_file_of(model: Path) -> Path:
    """The file of a model's exact head, beside the model file."""
    return model.with_name(model.name.removesuffix(".onnx") + HEAD_SUFFIX)
