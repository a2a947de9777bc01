"""What the model card of a model file says of the run: data in counts, metrics, what protects the photos, limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedshelf.privacy.base import DEFAULT_DELTA
from fedshelf.reporting.privacy_report import privacy_report
from fedshelf.reporting.receipt import finite, protections_of, unprotected_by
from fedshelf.storage.run_directory import RunDirectory, differences, is_run
from fedshelf.tracking.queries import run_summary

_KEPT = ("fedshelf", "run_id", "round", "store", "candidate", "architecture", "input", "metrics")
_LIMITS = (
    "Tells apart the products that it lists and no others: a photo of anything else is given the nearest of them. "
    "Accuracy is that of the photos named here; other cameras and shelves may differ."
)
_PERSONAL = (
    " Some of its tensors are personal: here they are at their first values, and each store has its own. Export the "
    "model of a store instead."
)
_OF_A_STORE = " What this store trained on its own photos after that is not covered by the run's protection."


def card_of(model_card: Mapping[str, Any], folder: Path, *, num_parameters: int, num_products: int) -> dict[str, Any]:
    """The parts of a card that are known before the model is exported.

    Args:
        model_card: the card of the model's folder.
        folder: that folder.
        num_parameters: number of all parameters.
        num_products: number of products.

    Raises:
        UsageError: the run has noise, and `dp-accounting` is not installed.
    """
    training = dict(model_card.get("training") or {})
    weights = training.pop("initial_weights", None) or {}
    counted_stores = training.pop("clients_counted_last_round", None)
    run = _run_of(folder)
    data = {"products": num_products, "stores": counted_stores, "training_photos": _num_photos(run, counted_stores)}
    return {
        **{key: model_card[key] for key in _KEPT if key in model_card},
        "num_parameters": num_parameters,
        "training": {**training, "initial_weights": weights.get("file")},
        "data": data,
        "privacy": _privacy(run, is_stores="store" in model_card),
        "limits": _LIMITS + _PERSONAL * is_without_personal(model_card),
    }


def is_without_personal(model_card: Mapping[str, Any]) -> bool:
    """Whether a model is the global one of a run whose stores each have tensors of their own."""
    return bool(model_card.get("personal")) and "store" not in model_card


def _run_of(folder: Path) -> RunDirectory | None:
    for above in folder.absolute().parents[:2]:
        if is_run(above):
            return RunDirectory.open(above)
    return None


def _num_photos(run: RunDirectory | None, counted_stores: int | None) -> int | None:
    """Training photos of the last round; None if the server does not know each store's number, or must not tell."""
    rounds = run_summary(run.path).rounds if run is not None and counted_stores is not None else ()
    numbers = [client.num_examples for client in rounds[-1].clients] if rounds else []
    known = [number for number in numbers if number is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def _privacy(run: RunDirectory | None, *, is_stores: bool) -> dict[str, Any]:
    if run is None:
        return {"statement": "Not known here: the model's folder is not in its run's. The run's report has it."}
    settings = {found.key: found.new for found in differences("", run.config_toml)}
    summary, protections, report = run_summary(run.path), protections_of(settings), None
    if summary.noise:
        delta = float(settings.get("delta", DEFAULT_DELTA))
        report = privacy_report(summary.noise, summary.rounds, summary.voids, delta=delta)
    guarantee = report.guarantee if report else None
    said = "Photos stayed in the stores." + _OF_A_STORE * is_stores
    return {
        "statement": said,
        "protections": protections,
        "guarantee": finite(
            {
                "epsilon": guarantee.epsilon, "delta": guarantee.delta, "unit": guarantee.unit,
                "assumptions": list(guarantee.assumptions),
            }
        ) if guarantee else None,
        "not_covered": unprotected_by(protections),
    }  # fmt: skip
