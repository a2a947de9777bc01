"""Post-training quantization of a model file to 8 bits.

    1  W_q <- W rounded to 7 bits, one scale per output channel
    2  b <- b - (W_q - W) E[x], so that rounding W shifts no mean            bias correction
    3  ranges of all tensors of the network <- calibration photos
    4  activations are unsigned 8-bit, weights signed 7-bit; resize, normalization and softmax stay float32

Weights have 7 bits because processors without VNNI add pairs of products in 16 bits, which saturate with 8. The
quantized operators are written as such (`QLinearConv`), not as float operators between conversions: the file then
computes the same with any optimization of the graph.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2.
Differs from the paper: E[x] is measured on photos, and not derived from batch normalization.

Shapes: N photos, O output channels, I input channels of a group.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedshelf.edge.making.graph import NETWORK
from fedshelf.edge.making.libraries import import_extra
from fedshelf.edge.model_info import INPUT

_LEVELS = 64  # of 7 bits, on either side of 0
_FLOAT = 1  # onnx.TensorProto.FLOAT


def quantized(model: Any, photos: Sequence[NDArray[np.uint8]], folder: Path) -> Any:
    """Quantize the network of a model file.

    Args:
        model: an `onnx.ModelProto` from `graph.whole_graph`; its biases are changed.
        photos: decoded photos to calibrate on, uint8 [S, S, 3].
        folder: for temporary files.

    Returns:
        The quantized `onnx.ModelProto`, without metadata.

    Raises:
        UsageError: a library is not installed.
    """
    onnx, tools = import_extra("onnx", "export"), import_extra("onnxruntime.quantization", "edge")
    correct_biases(model, photos)
    out = folder / "int8.onnx"
    with _quiet():
        tools.quantize_static(
            model, out, _reader(tools, photos), quant_format=tools.QuantFormat.QOperator, per_channel=True,
            reduce_range=True, activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8,
            nodes_to_quantize=[node.name for node in model.graph.node if node.name.startswith(NETWORK)],
        )  # fmt: skip
    made = onnx.load(out)
    for part in (*made.graph.node, *made.graph.initializer, *made.graph.value_info):
        part.doc_string = ""
    del made.graph.value_info[:]
    return made


def correct_biases(model: Any, photos: Sequence[NDArray[np.uint8]]) -> None:
    """Change the biases of all convolutions such that rounding their weights shifts no mean (lines 1 and 2).

    Args:
        model: an `onnx.ModelProto`.
        photos: decoded photos, uint8 [S, S, 3].
    """
    onnx = import_extra("onnx", "export")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type == "Conv" and {*node.input[1:]} <= tensors.keys()]
    layers = [node for node in layers if len(node.input) == 3 and node.name.startswith(NETWORK)]
    means = _input_means(model, [node.input[0] for node in layers], photos)
    for node in layers:
        weight_OIHW = onnx.numpy_helper.to_array(tensors[node.input[1]])
        bias = tensors[node.input[2]]
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        shift_O = mean_shift(weight_OIHW, means[node.input[0]], groups=groups)
        corrected_O = (onnx.numpy_helper.to_array(bias) - shift_O).astype(np.float32)
        bias.CopyFrom(onnx.numpy_helper.from_array(corrected_O, bias.name))


def mean_shift(weight_OIHW: NDArray[np.float32], mean_C: NDArray[np.float32], *, groups: int) -> NDArray[np.float32]:
    """How much rounding a convolution's weights to 7 bits shifts the mean of its outputs [O].

    Args:
        weight_OIHW: the weights.
        mean_C: mean of each input channel, over photos and pixels.
        groups: number of groups of channels.
    """
    most_O111 = np.abs(weight_OIHW).max((1, 2, 3), keepdims=True)
    scale_O111 = np.where(most_O111 > 0, most_O111 / _LEVELS, 1)
    rounded_OIHW = np.clip(np.round(weight_OIHW / scale_O111), -_LEVELS, _LEVELS) * scale_O111
    errors_OI = (rounded_OIHW - weight_OIHW).sum((2, 3))
    inputs_GI = mean_C.reshape(groups, -1)
    shift_O: NDArray[np.float32] = (errors_OI * np.repeat(inputs_GI, len(errors_OI) // groups, axis=0)).sum(1)
    return shift_O


def _input_means(model: Any, names: Sequence[str], photos: Sequence[NDArray[np.uint8]]) -> Mapping[str, Any]:
    """Mean by channel of some tensors of the network, over photos and pixels."""
    onnx, ort = import_extra("onnx", "export"), import_extra("onnxruntime", "edge")
    wanted = sorted({*names})
    if not wanted:
        return {}
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    for at, name in enumerate(wanted):
        shown.graph.node.append(onnx.helper.make_node("Identity", [name], [f"shown_{at}"]))
        shown.graph.output.append(onnx.helper.make_tensor_value_info(f"shown_{at}", _FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    sums: list[Any] = [0.0] * len(wanted)
    for photo in photos:
        outputs = session.run(None, {INPUT: photo[None]})
        sums = [total + values.mean((0, 2, 3), dtype=np.float64) for total, values in zip(sums, outputs, strict=True)]
    return {name: total / len(photos) for name, total in zip(wanted, sums, strict=True)}


def _reader(tools: Any, photos: Sequence[NDArray[np.uint8]]) -> Any:
    """The photos as onnxruntime's quantizer reads them."""

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter(photos)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            photo = next(self._rest, None)
            return None if photo is None else {INPUT: photo[None]}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard the quantizer's advice on preprocessing, which it logs without a logger of its own."""
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
