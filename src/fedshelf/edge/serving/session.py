"""A model file in use: pixels in, probabilities of the products and of the folders above them out.

Shapes: K products, D features, H × W pixels, S the side in pixels of the network's input.
"""

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.errors import DataError, ModelError
from fedshelf.core.guess import Guess
from fedshelf.core.text import counted
from fedshelf.data.decode import DECODER_VERSION, UnusablePhotoError, decode
from fedshelf.data.filesystem import file_problem
from fedshelf.data.product_tree import ProductTree
from fedshelf.edge.model_info import FEATURES, INPUT, OUTPUT, ModelInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """A model file, opened with ONNX Runtime on the processor. Safe to use from several threads.

    Attributes:
        info: what the file says about itself.
        tree: the folders above the products.
        runtime: the `onnxruntime.InferenceSession`.
    """

    info: ModelInfo
    tree: ProductTree
    runtime: Any

    @classmethod
    def open(cls, path: Path, *, num_threads: int = 0, optimize: bool = True) -> "Session":
        """Open a model file.

        Args:
            path: the file, from `fedshelf export`.
            num_threads: processor threads for one photo; 0 leaves the number to ONNX Runtime.
            optimize: let ONNX Runtime rewrite the graph for this processor.

        Raises:
            ModelError: ONNX Runtime is not installed, or the file is missing, damaged or not a model file.
        """
        runtime = _open(path, num_threads=num_threads, optimize=optimize)
        try:
            info = ModelInfo.from_metadata(runtime.get_modelmeta().custom_metadata_map)
        except ModelError as error:
            raise ModelError(f"model file '{path}': {error}") from None
        if problem := _signature_problem(runtime, len(info.labels)):
            raise ModelError(f"model file '{path}': {problem}; write it with 'fedshelf export'")
        if problem := _text_problem(info):
            raise ModelError(f"the metadata of model file '{path}' is damaged: {problem}")
        if info.decoder != DECODER_VERSION:
            logger.warning(
                "model file '%s' was made for version %d of the photo decoder, this is version %d: its answers may "
                "differ slightly. Export it again with this version of FedShelf",
                path, info.decoder, DECODER_VERSION,
            )  # fmt: skip
        return cls(info=info, tree=ProductTree(info.paths), runtime=runtime)

    def check(self) -> None:
        """Name a blank photo, so that a broken model is noticed, and the first real photo waits for nothing.

        Raises:
            ModelError: the answer is not a probability for each product.
        """
        probabilities_K = self.predict(np.zeros((self.info.image_size, self.info.image_size, 3), np.uint8))
        num_products = len(self.info.labels)
        if probabilities_K.shape != (num_products,) or not abs(float(probabilities_K.sum()) - 1) < 1e-3:
            raise ModelError(
                f"its answer is not the probabilities of {counted(num_products, 'product')}: export it again"
            )

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """Decode a photo exactly as in training: uint8 [S, S, 3], RGB.

        Args:
            data: the file's bytes.

        Raises:
            DataError: it is not a photo, or larger than a photo is.
        """
        try:
            return decode(data, self.info.image_size)
        except UnusablePhotoError as error:
            raise DataError(f"the photo cannot be decoded: {error}") from error

    def predict(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probability of each product: float32 [K].

        Args:
            pixels_HW3: uint8, RGB, upright; of any size, but only `decode` gives the pixels that training saw.
        """
        (probabilities_1K,) = self.runtime.run([OUTPUT], {INPUT: pixels_HW3[None]})
        probabilities_K: NDArray[np.float32] = probabilities_1K[0]
        return probabilities_K

    @property
    def has_features(self) -> bool:
        """Whether the file was exported with --updatable."""
        return any(output.name == FEATURES for output in self.runtime.get_outputs())

    def predict_with_features(
        self, pixels_HW3: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """The probability of each product, float32 [K], and what the output layer takes, float32 [D].

        Args:
            pixels_HW3: see `predict`.
        """
        probabilities_1K, features_1D = self.runtime.run([OUTPUT, FEATURES], {INPUT: pixels_HW3[None]})
        return probabilities_1K[0], features_1D[0]

    def top(self, probabilities_K: NDArray[np.float32], count: int) -> tuple[Guess, ...]:
        """The most likely products, most likely first; equal ones in the order of the labels."""
        order = np.argsort(-probabilities_K, kind="stable")[:count]
        return tuple(Guess(label=self.info.labels[at], probability=float(probabilities_K[at])) for at in order)

    def top_folders(self, probabilities_K: NDArray[np.float32], count: int = 1) -> tuple[tuple[Guess, ...], ...]:
        """The most likely folders at each level above the products, coarsest level first.

        A folder's probability is the sum of its products'.

        Args:
            probabilities_K: see `predict`.
            count: folders per level.

        Returns:
            By level, the folders, most likely first; empty without folders. A product that lies no deeper stands for
            its own folder.
        """
        levels = []
        for names, groups_K in self._folders:
            sums = np.bincount(groups_K, weights=probabilities_K, minlength=len(names))
            order = np.argsort(-sums, kind="stable")[:count]
            levels.append(tuple(Guess(label=names[at], probability=min(1.0, float(sums[at]))) for at in order))
        return tuple(levels)

    @cached_property
    def _folders(self) -> tuple[tuple[list[str], NDArray[np.intp]], ...]:
        """By level above the products: the folders' names, and each product's [K] index among them."""
        levels = []
        for level in range(1, self.tree.depth):
            names, groups_K = np.unique(np.asarray(self.tree.nodes(level), dtype=object), return_inverse=True)
            levels.append((names.tolist(), groups_K))
        return tuple(levels)

    def sure_folder(self, probabilities_K: NDArray[np.float32]) -> Guess | None:
        """The deepest folder that reaches the model's threshold, such as "some apple"; None if none does."""
        found = None
        for best, *_ in self.top_folders(probabilities_K):
            if best.probability >= self.info.threshold and best.label not in self.info.paths:
                found = best
        return found

    def is_sure(self, probabilities_K: NDArray[np.float32]) -> bool:
        """Whether the most likely product reaches the model's threshold."""
        return float(probabilities_K.max()) >= self.info.threshold


def _open(path: Path, *, num_threads: int, optimize: bool) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ModelError("a model file needs ONNX Runtime: pip install 'fedshelf[edge]'") from None
    if problem := file_problem(path):
        raise ModelError(f"model file '{path}': {problem}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 4  # failures are exceptions, and are reported as errors
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"ONNX Runtime cannot open model file '{path}': {reason:.300}") from error


def _text_problem(info: ModelInfo) -> str:
    """Why the model's texts cannot be sent as JSON; empty if they can."""
    try:
        json.dumps([info.labels, info.paths, info.card], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        return f"{error!r:.200}"
    return ""


def _signature_problem(runtime: Any, num_products: int) -> str:
    inputs = {value.name: value for value in runtime.get_inputs()}
    outputs = {value.name: value for value in runtime.get_outputs()}
    if list(inputs) != [INPUT] or inputs[INPUT].type != "tensor(uint8)" or len(inputs[INPUT].shape) != 4:
        return f"its only input is not '{INPUT}', uint8 [1, H, W, 3]"
    if OUTPUT not in outputs or outputs[OUTPUT].type != "tensor(float)":
        return f"it has no output '{OUTPUT}' of float32"
    width = outputs[OUTPUT].shape[-1]
    if isinstance(width, int) and width != num_products:
        return f"it has {num_products} labels for {width} outputs"
    return ""
