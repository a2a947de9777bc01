"""The model card of a model file as text for people: data, accuracy, what protects the photos, checks, limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedshelf.core.errors import UsageError
from fedshelf.core.text import counted, printable
from fedshelf.edge.model_info import ModelInfo
from fedshelf.reporting.formatting import ABSENT, number, percent

_UPDATABLE = (
    "* updatable: the file NAME.head.safetensors contains the second moments of the features of all stores' photos "
    "together, in the form of an inverse matrix. Who has it can infer more of them than from the model alone"
)
SUFFIX, CARD_SUFFIX = ".onnx", ".card.md"


def card_file_of(out: Path) -> Path:
    """The file of the card beside a model file.

    Raises:
        UsageError: the model file's name does not end in .onnx.
    """
    if out.suffix != SUFFIX:
        raise UsageError(f"--out {out}: the name of a model file ends in {SUFFIX}")
    return out.with_suffix(CARD_SUFFIX)


def to_markdown(info: ModelInfo) -> str:
    """Format the card of a model file for people.

    Args:
        info: the file's metadata.

    Returns:
        Markdown. Names from outside are escaped.
    """
    card = info.card
    about, data = card.get("architecture") or {}, card.get("data") or {}
    lines = [
        f"# Model card: {_text(about.get('name', 'model'))}, {counted(len(info.labels), 'product')}", "",
        f"* run {_text(card.get('run_id'))}, after round {_text(card.get('round'))}",
        *([f"* the model of store {_text(card['store'])}"] if "store" in card else []),
        f"* {counted(card.get('num_parameters', 0), 'parameter')}, {info.precision}, photos of {info.image_size} "
        f"pixels a side, photo decoder {info.decoder}",
        f"* digest {info.digest}", "",
        "## Data", "",
        f"* stores in the last round: {_count(data.get('stores'))}",
        f"* training photos: {_count(data.get('training_photos'))}",
        f"* products: {len(info.labels):,}", "",
        "## Accuracy", "", *_metric_lines(card.get("metrics") or {}), "",
        "## Sure answers", "", _calibration(info), "",
        "## Privacy", "", *_privacy_lines(card.get("privacy") or {}), *([_UPDATABLE] if card.get("updatable") else []),
        "",
        "## Checks", "", *_comparison_lines(card), "",
        "## Limits", "", _text(card.get("limits", ABSENT)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    shown = {
        "accuracy": "on validation photos of the stores", "central_accuracy": "on the server's test photos",
    }  # fmt: skip
    lines = [f"* {percent(metrics[key])} {where}" for key, where in shown.items() if metrics.get(key) is not None]
    for name, value in (metrics.get("own_mix_accuracy") or {}).items():
        lines.append(f"* {percent(value)} on this store's photos, model: {_text(name)}")
    if levels := metrics.get("levels"):
        lines += ["", f"Accuracy by level of folders, coarsest first, on {_text(metrics.get('levels_on'))}:", ""]
        lines += [f"* level {level['depth']}: {percent(level['accuracy'])}" for level in levels]
    if products := metrics.get("products"):
        heading = f"product, on {_text(metrics.get('products_on'))}"
        lines += ["", f"| {heading} | right | photos |", "|---|---:|---:|"]
        lines += [f"| {_text(one['product'])} | {one['correct']} | {one['total']} |" for one in products]
    if mixed_up := metrics.get("mixed_up"):
        lines += ["", "Most often mixed up:", ""]
        lines += [f"* {_text(o['product'])} taken for {_text(o['taken_for'])}: {o['photos']}" for o in mixed_up[:10]]
    return lines or ["Not measured in the run."]


def _calibration(info: ModelInfo) -> str:
    found = info.card.get("calibration") or {}
    if not found:
        return (
            "Not calibrated: probabilities are the network's own, and an answer is called sure from "
            f"{info.threshold:g} on. Export with --calibrate and labeled photos."
        )
    base = f"Calibrated on {counted(found['photos'], 'labeled photo')}: temperature {info.temperature:.4g}"
    if found["precision"] is None:
        return (
            f"{base}. No threshold gives {percent(found['target'])} right among sure answers on them, so that no "
            "answer below a probability of 1 is called sure."
        )
    return (
        f"{base}. An answer is called sure from {info.threshold:.4g} on. On these photos, {percent(found['sure'])} of "
        f"the answers are sure, and {percent(found['precision'])} of these are right (target "
        f"{percent(found['target'])})."
    )


def _privacy_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [_text(found.get("statement", ABSENT))]
    if "protections" in found:
        lines += ["", f"* protections: {_text(', '.join(found['protections']) or 'none')}"]
    if guarantee := found.get("guarantee"):
        epsilon = number(guarantee["epsilon"]) if guarantee["epsilon"] is not None else "unbounded"
        lines += [f"* ε = {epsilon}, δ = {guarantee['delta']:g}, per {_text(guarantee['unit'])}"]
        lines += [f"* {_text(assumption)}" for assumption in guarantee["assumptions"]]
    return lines + [f"* not covered: {_text(what)}" for what in found.get("not_covered", ())]


def _comparison_lines(card: Mapping[str, Any]) -> list[str]:
    lines = []
    if parity := card.get("parity"):
        lines.append(
            f"* same as in training, on {_text(parity['photos'])}: probabilities differ by at most "
            f"{parity['max_difference']:.1e}, same product in {percent(parity['agreement'])}"
        )
    if foreign := card.get("foreign_decoder"):
        lines.append(
            f"* foreign decoder (full-size pixels from Pillow, resized in the file), on {_text(foreign['photos'])}: "
            f"same product in {percent(foreign['agreement'])}, probability of it differs by at most "
            f"{foreign['max_difference']:.2f}. FedShelf's own runtime uses the decoder of training"
        )
    if int8 := card.get("int8"):
        lines.append(
            f"* int8, certified on {counted(int8['photos'], 'photo')} on {_text(int8['processor'])}: same product with "
            f"and without optimization in {percent(int8['agreement'])}, accuracy {percent(int8['accuracy'])} "
            f"(float32 {percent(int8['float_accuracy'])}), {percent(int8['bytes_ratio'])} of the bytes"
        )
    return lines or ["None."]


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "not told"


def _text(value: object) -> str:
    """Text that is one line, and no Markdown or HTML."""
    shown = printable(str(value))
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in shown)
