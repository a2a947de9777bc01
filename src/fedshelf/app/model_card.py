"""Models on disk, published by a run or kept by a store, with everything needed to use and assess them."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedshelf import __version__
from fedshelf.app.store_sales import StoreSales
from fedshelf.config.schema import RunConfig
from fedshelf.core.events import RoundFinished, WeightsLoaded
from fedshelf.core.messages import Comparison, Evaluation
from fedshelf.core.params import Segment
from fedshelf.data.catalogue import Catalogue
from fedshelf.storage.model_files import save_model
from fedshelf.tracking.product_results import ProductResults, product_results
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.forecast import forecast_errors

MOST_MIXED_UP = 20  # pairs of products in a card
_LIMITS = (
    "Tells apart the products in labels.json and no others: a photo of anything else is given the nearest of them. "
    "Accuracy is that of the photos named above; other cameras and shelves may differ."
)


def save_global(
    folder: Path, bound: BoundModel, config: RunConfig, catalogue: Catalogue, *, run_id: str, record: RoundFinished,
    loaded: WeightsLoaded | None,
) -> None:  # fmt: skip
    """Save the global model after a round.

    Args:
        folder: created if it does not exist.
        bound: contains the model.
        config: the run's configuration.
        catalogue: names the model's outputs.
        run_id: the run's id.
        record: the round's result.
        loaded: the weights that the run started from, if any.

    Raises:
        RunError: a file cannot be written, for example on a full disk; the previous model stays intact.
    """
    num_counted: int | None = sum(member.status == "counted" for member in record.clients)
    if config.dp == "client":  # the card is published with the model, and what stores report has no noise
        num_counted, record = None, replace(record, accuracy=None, train_loss=None, report=None)
    card = {
        **_card(config, bound, catalogue, run_id=run_id, round=record.round),
        "training": {
            **_training(config, record.round),
            "clients_counted_last_round": num_counted,
            "initial_weights": asdict(loaded) if loaded else None,
        },
        "metrics": {
            "accuracy": record.accuracy,
            "central_accuracy": record.central_accuracy,
            "train_loss": record.train_loss,
            **_by_product(product_results(record.report, catalogue)),
        },
        "limits": f"{_LIMITS} Tensors named under personal are at their first values here: each store has its own.",
    }
    save_model(folder, _tensors(bound), catalogue.names, card)


def save_initial(folder: Path, bound: BoundModel, catalogue: Catalogue, loaded: WeightsLoaded | None) -> None:
    """Save the model before the first round.

    Args:
        folder: created if it does not exist.
        bound: contains the model.
        catalogue: names the model's outputs.
        loaded: which of a file's weights are used, if any.

    Raises:
        RunError: see `save_global`.
    """
    save_model(folder, _tensors(bound), catalogue.names, {"initial_weights": asdict(loaded) if loaded else None})


def save_chosen(
    folder: Path, bound: BoundModel, config: RunConfig, catalogue: Catalogue, *, client: str, comparison: Comparison,
    sales: StoreSales | None = None,
) -> None:  # fmt: skip
    """Save the model that a store has chosen.

    Args:
        folder: created if it does not exist.
        bound: contains the model.
        config: the run's configuration.
        catalogue: names the model's outputs.
        client: the store's name.
        comparison: the comparison that chose the model.
        sales: the store's sales, if the run uses them.

    Raises:
        RunError: see `save_global`.
    """
    key = comparison.key
    forecast = forecast_errors(bound, sales.history) if sales and sales.history else {}
    card = {
        **_card(config, bound, catalogue, run_id=key.run_id, round=key.round),
        "store": client,
        "candidate": comparison.best.value if comparison.best else None,
        "training": {**_training(config, key.round), "personalize": config.personalize},
        "metrics": {
            "own_mix_accuracy": {candidate.value: value for candidate, value in comparison.accuracies.items()},
            "measured_on": "test photos" if comparison.on_test else "validation photos",
            "chosen_on_validation_photos": comparison.num_validation,
            **({"forecast_wape": dict(forecast)} if forecast else {}),
        },
        "limits": f"{_LIMITS} It is one store's own, chosen for the mix of products that this store sells.",
    }
    save_model(folder, _tensors(bound), catalogue.names, card)


def save_received(
    folder: Path, bound: BoundModel, config: RunConfig, catalogue: Catalogue, *, client: str, run_id: str,
    num_rounds: int, evaluation: Evaluation | None,
) -> None:  # fmt: skip
    """Save the model that a store has received.

    Args:
        folder: created if it does not exist.
        bound: contains the model.
        config: the run's configuration.
        catalogue: names the model's outputs.
        client: the store's name.
        run_id: the run's id.
        num_rounds: number of rounds it was trained for.
        evaluation: its result on the store's validation photos, if it was evaluated.

    Raises:
        RunError: see `save_global`.
    """
    card = {
        **_card(config, bound, catalogue, run_id=run_id, round=num_rounds),
        "store": client,
        "training": {**_training(config, num_rounds), "personalize": config.personalize},
        "metrics": {
            "accuracy": evaluation.num_correct / evaluation.num_examples if evaluation else None,
            "measured_on": "validation photos",
        },
        "limits": _LIMITS,
    }
    save_model(folder, _tensors(bound), catalogue.names, card)


def _card(config: RunConfig, bound: BoundModel, catalogue: Catalogue, *, run_id: str, round: int) -> dict[str, Any]:
    """Return the content common to all cards."""
    return {
        "fedshelf": __version__,
        "run_id": run_id,
        "round": round,
        "architecture": {
            "name": config.model,
            "norm": config.norm,
            "width": config.width,
            **({"sales": True} if config.sales else {}),
            **({"source_digest": config.model_digest} if config.model_digest else {}),
        },
        "num_parameters": bound.params.layout.num_parameters,
        "input": {
            "image_size": config.image_size,
            "resize": "squash",
            "channels": "RGB",
            "scale": "0..1",
            "mean": list(bound.normalization.mean),
            "std": list(bound.normalization.std),
        },
        "paths": list(catalogue.tree.paths) if catalogue.tree.depth > 1 else [],
        "personal": [spec.name for spec in bound.params.layout.tensors if spec.segment is Segment.PERSONAL],
    }


def _by_product(results: ProductResults) -> dict[str, Any]:
    """Return the results by product and level, and the products most often mixed up; nothing before the last round."""
    record = results.to_record()
    mixed_up = record.pop("confusion")[:MOST_MIXED_UP]
    return {**record, "mixed_up": mixed_up} if results.products else {}


def _training(config: RunConfig, rounds: int) -> dict[str, Any]:
    adapter = {"adapter": {"rank": config.adapter_rank, "alpha": config.adapter_alpha, "merged": True}}
    distilled = {
        "distillation": {
            "teacher": config.teacher_digest, "weight": config.distill_weight, "temperature": config.temperature,
        }
    }  # fmt: skip
    ensemble = {"ensemble": {"steps": config.ensemble_steps, "learning_rate": config.ensemble_lr}}
    return {
        "algorithm": config.algorithm, "rounds": rounds, "seed": config.seed, "train": config.train,
        **({"dp": config.dp} if config.dp != "none" else {}),
        **(adapter if config.train == "adapter" else {}),
        **(distilled if config.teacher_digest else {}),
        **(ensemble if config.unlabelled_dir else {}),
    }  # fmt: skip


def _tensors(bound: BoundModel) -> dict[str, Tensor]:
    """Return the module's tensors by name.

    Batch counters of batch normalization are zeroed: they are not used, and depend on every client that ran in this
    process.
    """
    counters = {
        f"{layer}.num_batches_tracked" if layer else "num_batches_tracked"
        for layer, child in bound.module.named_modules()
        if isinstance(child, _BatchNorm)
    }
    return {
        name: torch.zeros_like(tensor, device="cpu")
        if name in counters
        else tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in bound.module.state_dict().items()
    }
