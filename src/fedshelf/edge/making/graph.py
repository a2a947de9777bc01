"""The graph of a model file: from the pixels of a photo to probabilities.

    image     uint8 [1, H, W, 3]
    resized   float32 [1, 3, S, S], gray levels           as `data.decode.squash`
    pixels    float32 [1, 3, S, S], normalized            as `data.augmentation.normalize`
    logits    float32 [1, K]                              the network
    features  float32 [1, D], what its output layer takes; an output of the file if it is asked for
    probabilities = softmax(logits / temperature)

A resize is two matrices, one for each side: R · image · Cᵀ. A row of R says which share each of the H rows of the image
has in a row of the result. Where the side shrinks, from n to S pixels, it averages areas: pixel j has in i the share

    |[i·n/S, (i+1)·n/S] ∩ [j, j+1]| / (n/S)

and where it is enlarged, neighbors are interpolated: max(0, 1 - |x_i - j|), with x_i = (i + 1/2)·n/S - 1/2 limited to
[0, n-1]. `squash` shrinks first and then enlarges, which is the same, because each side does one of the two. A photo
that is S x S already skips this.

Shapes: H, W the photo's size in pixels, S the network's, K products, D features.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from fedshelf.core.errors import ModelError
from fedshelf.edge.making.libraries import import_extra
from fedshelf.edge.model_info import FEATURES, ModelInfo

OPSET = 18
PIXELS, LOGITS = "pixels", "logits"
"""What the network takes and returns."""
NETWORK = "network/"
"""Prefix of the names of the network's own tensors and nodes."""

# The matrix [S, n] of the side `n`. Names are of the side, `rows` or `columns`.
_MATRIX = """
    {side}_n = Cast<to=1>({n})
    {side}_scale = Div({side}_n, size)
    {side}_stop = Squeeze({n})
    {side}_index = Range(first, {side}_stop, step)
    {side}_left = Cast<to=1>({side}_index)
    {side}_right = Add({side}_left, one)
    {side}_start = Mul(output_index, {side}_scale)
    {side}_end = Add({side}_start, {side}_scale)
    {side}_later = Max({side}_start, {side}_left)
    {side}_earlier = Min({side}_end, {side}_right)
    {side}_overlap = Sub({side}_earlier, {side}_later)
    {side}_common = Relu({side}_overlap)
    {side}_areas = Div({side}_common, {side}_scale)
    {side}_half = Mul({side}_scale, half)
    {side}_middle = Add({side}_start, {side}_half)
    {side}_center = Sub({side}_middle, half)
    {side}_last = Sub({side}_n, one)
    {side}_limited = Min({side}_center, {side}_last)
    {side}_x = Relu({side}_limited)
    {side}_difference = Sub({side}_x, {side}_left)
    {side}_distance = Abs({side}_difference)
    {side}_closeness = Sub(one, {side}_distance)
    {side}_linear = Relu({side}_closeness)
    {side}_shrinks = Greater({side}_n, size)
    {side} = Where({side}_shrinks, {side}_areas, {side}_linear)
"""
_RESIZE = """
    {rows}
    {columns}
    floats = Cast<to=1>(channels_first)
    columns_t = Transpose<perm=[1, 0]>(columns)
    shorter = MatMul(rows, floats)
    narrower = MatMul(shorter, columns_t)
    computed = Round(narrower)
"""
_INPUT = """
<ir_version: 10, opset_import: ["": 18]>
prepare (uint8[1, height, width, 3] image) => (float[1, 3, {S}, {S}] pixels)
<float size = {{{S}}}, float one = {{1}}, float half = {{0.5}}, int64 first = {{0}}, int64 step = {{1}},
 int64[1] side = {{{S}}}, float[{S}, 1] output_index = {{{index}}},
 float[1, 3, 1, 1] scale = {{{scale}}}, float[1, 3, 1, 1] shift = {{{shift}}}>
{{
    height_1 = Shape<start=1, end=2>(image)
    width_1 = Shape<start=2, end=3>(image)
    is_height = Equal(height_1, side)
    is_width = Equal(width_1, side)
    are_both = And(is_height, is_width)
    is_size = Squeeze(are_both)
    channels_first = Transpose<perm=[0, 3, 1, 2]>(image)
    resized = If(is_size) <
        then_branch = keep () => (float[1, 3, {S}, {S}] kept) {{ kept = Cast<to=1>(channels_first) }},
        else_branch = resize () => (float[1, 3, {S}, {S}] computed) {{ {resize} }}
    >
    scaled = Mul(resized, scale)
    pixels = Add(scaled, shift)
}}
"""
_OUTPUT = """
<ir_version: 10, opset_import: ["": 18]>
answer (float[1, {K}] logits) => (float[1, {K}] probabilities)
<float temperature = {{{temperature!r}}}>
{{
    calibrated = Div(logits, temperature)
    probabilities = Softmax<axis = 1>(calibrated)
}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What happens to a photo before the network.

    Attributes:
        image_size: S.
        mean: of each channel, of values scaled to [0, 1].
        std: of each channel.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def input_graph(preparation: Preparation) -> Any:
    """Make the graph from `image` to `pixels`.

    Args:
        preparation: what it computes.

    Returns:
        An `onnx.ModelProto`.
    """
    size = preparation.image_size
    matrices = {side: _MATRIX.format(side=side, n=n) for side, n in (("rows", "height_1"), ("columns", "width_1"))}
    text = _INPUT.format(
        S=size, index=_listed(range(size)), resize=_RESIZE.format(**matrices),
        scale=_listed(1 / (255 * std) for std in preparation.std),
        shift=_listed(-mean / std for mean, std in zip(preparation.mean, preparation.std, strict=True)),
    )  # fmt: skip
    return import_extra("onnx.parser", "export").parse_model(text)


def whole_graph(
    network: Any, preparation: Preparation, *, num_products: int, temperature: float, with_features: bool = False
) -> Any:
    """Join photo, network and answer.

    Args:
        network: an `onnx.ModelProto` from `pixels` to `logits`.
        preparation: what happens to a photo before it.
        num_products: K.
        temperature: the logits are divided by it.
        with_features: add the output `features`.

    Returns:
        The `onnx.ModelProto` from `image` to `probabilities`, checked, without names of files on this machine.

    Raises:
        ModelError: features are asked for, and the network does not end in a linear layer.
    """
    onnx = import_extra("onnx", "export")
    compose = import_extra("onnx.compose", "export")
    _strip(network.graph)
    own = compose.add_prefix(network, NETWORK)
    head = import_extra("onnx.parser", "export").parse_model(_OUTPUT.format(K=num_products, temperature=temperature))
    before = compose.merge_models(
        input_graph(preparation), own, io_map=[(PIXELS, f"{NETWORK}{PIXELS}")], producer_name="fedshelf"
    )
    model = compose.merge_models(before, head, io_map=[(f"{NETWORK}{LOGITS}", LOGITS)], producer_name="fedshelf")
    model.graph.name = "fedshelf"
    del model.opset_import[1:]  # one from each part
    if with_features:
        _add_features(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def with_info(model: Any, info: ModelInfo) -> bytes:
    """Serialize a model with its metadata; `digest_of(model)` is its digest."""
    onnx = import_extra("onnx", "export")
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, info.to_metadata())
    return bytes(model.SerializeToString(deterministic=True))


def digest_of(model: Any) -> str:
    """The SHA-256 of the weights and everything in the graph, in hex."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def without_features(model: Any) -> Any:
    """A copy of a model file without the output `features`."""
    onnx = import_extra("onnx", "export")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for part in (copy.graph.output, copy.graph.node):
        for at, found in reversed([*enumerate(part)]):
            if FEATURES in (found.name, *getattr(found, "output", ())):
                del part[at]
    return copy


def _add_features(model: Any) -> None:
    """Make what the output layer takes an output of the graph."""
    onnx = import_extra("onnx", "export")
    layer = next((node for node in model.graph.node if f"{NETWORK}{LOGITS}" in node.output), None)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    if layer is None or layer.op_type != "Gemm" or layer.input[1] not in weights:
        raise ModelError("the network does not end in a linear layer: export it without --updatable")
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in layer.attribute)
    width = weights[layer.input[1]].dims[1 if is_transposed else 0]
    model.graph.node.append(onnx.helper.make_node("Identity", [layer.input[0]], [FEATURES], name=FEATURES))
    model.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, [1, width]))


def _strip(graph: Any) -> None:
    """Remove what the exporter notes of the source code: paths of this machine, and about a tenth of a small file."""
    graph.doc_string = ""
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.doc_string = ""
        del part.metadata_props[:]


def _listed(values: Any) -> str:
    return ", ".join(map(repr, values))
