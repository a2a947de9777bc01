"""Small ONNX model files for tests: they name a photo by its mean color."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedshelf.data.decode import DECODER_VERSION
from fedshelf.edge.model_info import INPUT, OUTPUT, ModelInfo

COLORS = ("Red", "Green", "Blue")


def info(
    labels: Sequence[str] = COLORS, paths: Sequence[str] = (), *, threshold: float = 0.8, decoder: int = DECODER_VERSION
) -> ModelInfo:
    """Metadata of a model with these products."""
    return ModelInfo(
        labels=tuple(labels), paths=tuple(paths or labels), image_size=32, decoder=decoder, threshold=threshold,
        temperature=1.0, digest=hashlib.sha256(repr((labels, paths)).encode()).hexdigest(), precision="float32",
        card={"name": "colors"},
    )  # fmt: skip


def write_color_model(path: Path, about: ModelInfo | None = None, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a model whose k-th logit is 20 times the mean of color channel k mod 3, less k // 3.

    Args:
        path: the file.
        about: its metadata; by default three products named by their colors.
        metadata: written instead of `about`'s.
    """
    about = about or info()
    num_products = len(about.labels)
    weights = np.zeros((3, num_products), np.float32)
    for k in range(num_products):
        weights[k % 3, k] = 20 / 255
    bias = -np.arange(num_products, dtype=np.float32) // 3
    nodes = [
        helper.make_node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "weights", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [OUTPUT], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "colors",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [1, "H", "W", 3])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [1, num_products])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"), numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, dict(about.to_metadata() if metadata is None else metadata))
    onnx.save(model, str(path))
    return path


def photo(color: Sequence[int], size: tuple[int, int] = (40, 30), *, format: str = "JPEG") -> bytes:
    """A photo of one color."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, tuple(color)).save(out, format, quality=95)
    return out.getvalue()
