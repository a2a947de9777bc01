"""What a model file for the store says about itself, in the metadata of its ONNX graph.

The graph's input `image` is uint8 [1, H, W, 3], RGB, upright, of any H and W; its output `probabilities` is float32
[1, K], after the temperature. Resizing and normalization are in the graph. A file from `fedshelf export --updatable`
also has the output `features`, float32 [1, D]: what the output layer takes.

Shapes: K products, D features.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedshelf.core.errors import ModelError

INPUT, OUTPUT, FEATURES = "image", "probabilities", "features"
FORMAT = "1"
"""Of the metadata. A reader refuses another one."""
MAX_PRODUCTS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Metadata of a model file.

    Attributes:
        labels: the products [K], in the order of the outputs.
        paths: the folders and name of each product [K], joined by "/"; the labels if there are no folders.
        image_size: side in pixels of the square that the network sees, for which photos are decoded.
        decoder: version of the decoder that training used (`data.decode.DECODER_VERSION`).
        threshold: least probability of the first product for a sure answer.
        temperature: the logits are divided by it.
        digest: identifies the weights and everything in the graph (SHA-256, hex).
        precision: `float32` or `int8`.
        card: the model card.
    """

    labels: tuple[str, ...]
    paths: tuple[str, ...]
    image_size: int
    decoder: int
    threshold: float
    temperature: float
    digest: str
    precision: str
    card: Mapping[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the graph, by key."""
        return {
            "format": FORMAT, "labels": json.dumps(self.labels, ensure_ascii=False),
            "paths": json.dumps(self.paths, ensure_ascii=False), "image_size": str(self.image_size),
            "decoder": str(self.decoder), "threshold": repr(self.threshold), "temperature": repr(self.temperature),
            "digest": self.digest, "precision": self.precision, "card": json.dumps(self.card, ensure_ascii=False),
        }  # fmt: skip

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "ModelInfo":
        """Parse the metadata of a graph.

        Raises:
            ModelError: it is not that of a model file of this version.
        """
        if metadata.get("format") != FORMAT:
            raise ModelError(
                "it is not a model file of this version of FedShelf: write it with 'fedshelf export' "
                f"(format {metadata.get('format', 'none')[:40]!r} instead of {FORMAT!r})"
            )
        try:
            labels, paths = json.loads(metadata["labels"]), json.loads(metadata["paths"])
            found = cls(
                labels=tuple(labels), paths=tuple(paths), image_size=int(metadata["image_size"]),
                decoder=int(metadata["decoder"]), threshold=float(metadata["threshold"]),
                temperature=float(metadata["temperature"]), digest=metadata["digest"],
                precision=metadata["precision"], card=json.loads(metadata["card"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ModelError(f"the metadata of the model file is damaged: {error!r:.200}") from None
        if problem := found._problem():
            raise ModelError(f"the metadata of the model file is damaged: {problem}")
        return found

    def _problem(self) -> str:
        names = (*self.labels, *self.paths)
        if not all(isinstance(name, str) for name in names) or not isinstance(self.card, dict):
            return "labels or paths are not texts, or the card is not an object"
        if not 0 < len(self.labels) == len(self.paths) <= MAX_PRODUCTS or len(set(self.labels)) < len(self.labels):
            return f"{len(self.labels):,} labels and {len(self.paths):,} paths, or a label twice"
        if not (0 < self.image_size <= 1 << 14 and 0 <= self.threshold <= 1 and 0 < self.temperature < float("inf")):
            return "a number is out of range"
        return ""
