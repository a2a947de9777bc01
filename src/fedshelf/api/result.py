"""What a run returns: history, model and results of the stores."""

import shutil
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedshelf.api.datasets import to_pixels
from fedshelf.app.differential_privacy import delta_of
from fedshelf.app.model import ModuleFactory, bound_model_of, load_initial, module_of
from fedshelf.config import places
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.events import ClientStatus, RoundFinished, RunStatus
from fedshelf.data.augmentation import normalize
from fedshelf.data.catalogue import Catalogue
from fedshelf.models.build import normalization_of
from fedshelf.reporting.privacy_report import PrivacyReport, privacy_report
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.model_files import CARD, load_model_files
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.product_results import ProductResults
from fedshelf.tracking.queries import RunSummary, run_summary

if TYPE_CHECKING:
    import polars


Table = Literal["history", "stores", "products"]
_NOT_IN_ROWS = frozenset({"clients", "model_digest"})


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreResult:
    """One store's part in a run.

    Attributes:
        name: the store's name.
        num_examples: photos that it last trained on; None if it never did.
        num_rounds: rounds in which its upload was counted.
        accuracy: accuracy of the newest model on its validation photos; None if it has none.
        kept: the model that it keeps after the comparison of models: local, global or personalized; None without one.
        accuracies: accuracy of each compared model.
    """

    name: str
    num_examples: int | None
    num_rounds: int
    accuracy: float | None
    kept: str | None
    accuracies: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """A run that has ended or was stopped.

    Attributes:
        status: finished or stopped.
        reason: why it was stopped; empty if it has finished.
        history: the finished rounds.
        best_round: number of the best round; None without any.
        model: the model after the last finished round, on the CPU, in evaluation mode; None without any.
        classes: class names by output of the model.
        stores: the stores' results by name.
        products: results by product, of a run that has reached its last round.
        image_size: side of the model's photos in pixels.
        run_dir: the run's folder. A temporary one is deleted with this object.
    """

    status: RunStatus
    reason: str
    history: tuple[RoundFinished, ...]
    best_round: int | None
    model: nn.Module | None
    classes: tuple[str, ...]
    stores: Mapping[str, StoreResult]
    products: ProductResults
    image_size: int
    run_dir: Path
    _config: RunConfig
    _make_module: ModuleFactory | None = None

    @classmethod
    def of(
        cls, directory: RunDirectory, config: RunConfig, make_module: ModuleFactory | None = None, *,
        temporary: Path | None = None,
    ) -> "Result":  # fmt: skip
        """Read a run's folder.

        Args:
            directory: the folder.
            config: the run's configuration.
            make_module: creates the caller's own model, if there is one.
            temporary: a folder to delete with the result.
        """
        summary = run_summary(directory.path)
        config = config.model_copy(update={"pretrained": False})  # the weights come from the run
        catalogue = Catalogue.load(directory.catalogue) if directory.catalogue.exists() else None
        result = cls(
            status=summary.status,
            reason=summary.reason,
            history=summary.rounds,
            best_round=summary.best_round,
            model=_newest_model(directory, summary, catalogue, config, make_module) if catalogue else None,
            classes=catalogue.names if catalogue else (),
            stores=_stores(summary),
            products=summary.results,
            image_size=config.image_size,
            run_dir=directory.path,
            _config=config,
            _make_module=make_module,
        )
        if temporary is not None:
            weakref.finalize(result, shutil.rmtree, temporary, ignore_errors=True)
        return result

    def best_model(self) -> nn.Module:
        """Load the model of the best round.

        Raises:
            ModelError: no round has finished.
        """
        return _load(RunDirectory.open(self.run_dir).best_model, self._config, self._make_module)

    def store_model(self, name: str) -> nn.Module:
        """Load the model that a simulated store keeps after the comparison of models (`compare`, `personalize`).

        Args:
            name: the store's name.

        Raises:
            UsageError: it keeps none.
        """
        folder = RunDirectory.open(self.run_dir).stores / places.folder_name(name)
        if not (folder / CARD).is_file():
            raise UsageError(
                f"the store '{name}' keeps no model of its own in this run: models are compared after the last round, "
                "with personalize=... or compare=True, in a Federation"
            )
        return _load(folder, self._config, self._make_module)

    def privacy(self) -> PrivacyReport | None:
        """Compute the guarantee of a run with differential privacy; None of one without.

        Raises:
            UsageError: `dp-accounting` is not installed.
        """
        summary = run_summary(self.run_dir)
        if not summary.noise:
            return None
        return privacy_report(summary.noise, summary.rounds, summary.voids, delta=delta_of(self._config))

    def transform(self, photo: object) -> Tensor:
        """Prepare a photo for the model: resized and normalized as in training.

        Args:
            photo: a Pillow image or an array, as a Dataset yields it.

        Returns:
            float32 [3, H, W].

        Raises:
            DataError: it is no photo.
            UsageError: there is no model.
        """
        if self.model is None:
            raise UsageError("no round has finished: there is no model")
        values = normalization_of(self.model)
        pixels_BHWC = torch.from_numpy(to_pixels(photo, self.image_size)[None].copy())
        return normalize(pixels_BHWC, device=torch.device("cpu"), mean=values.mean, std=values.std)[0]

    def rows(self, what: Table = "history") -> list[dict[str, Any]]:
        """Return plain dictionaries with one row per round, store or product, for any data frame library.

        Args:
            what: which table.
        """
        if what == "products":
            return [asdict(product) for product in self.products.products]
        if what == "stores":
            return [
                {**{k: v for k, v in asdict(store).items() if k != "accuracies"}, **store.accuracies}
                for store in self.stores.values()
            ]
        return [
            {k: v for k, v in asdict(round_).items() if k not in _NOT_IN_ROWS} | {"num_counted": _num_counted(round_)}
            for round_ in self.history
        ]

    def to_frame(self, what: Table = "history") -> "polars.DataFrame":
        """Return `rows` as a Polars data frame. Its method `to_pandas` makes one of pandas.

        Args:
            what: which table.

        Raises:
            UsageError: Polars is not installed.
        """
        try:
            import polars
        except ImportError:
            raise UsageError(
                "data frames need Polars: pip install 'fedshelf[frames]'. Or use Result.rows(), for instance with "
                "pandas.DataFrame"
            ) from None
        return polars.DataFrame(self.rows(what), infer_schema_length=None)

    def __repr__(self) -> str:
        last = self.history[-1] if self.history else None
        figures = {
            "rounds": len(self.history), "stores": len(self.stores), "accuracy": last and last.accuracy,
            "central_accuracy": last and last.central_accuracy,
        }  # fmt: skip
        shown = ", ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in figures.items()
            if value is not None
        )
        return f"Result({self.status.value}, {shown})"


def _newest_model(
    directory: RunDirectory, summary: RunSummary, catalogue: Catalogue, config: RunConfig,
    make_module: ModuleFactory | None,
) -> nn.Module | None:  # fmt: skip
    """Return the model after the last finished round; a stopped run has it in its checkpoint only."""
    if summary.status is RunStatus.FINISHED and (directory.model / CARD).is_file():
        return _load(directory.model, config, make_module)
    state = FileCheckpoints(directory.checkpoints).load()
    if state is None:
        return None
    known = catalogue.num_first(state.classes)  # products may have been added since
    catalogue = catalogue if known is None else catalogue.first(known)
    bound = bound_model_of(config, catalogue, device="cpu", make_module=make_module)
    if (directory.initial_model / CARD).is_file():  # has the frozen values
        load_initial(bound, directory.initial_model, catalogue)
    bound.load(state.model.published)
    return _loaded(bound.module.state_dict(), len(catalogue), config, make_module)


def _load(folder: Path, config: RunConfig, make_module: ModuleFactory | None) -> nn.Module:
    tensors, labels, _ = load_model_files(folder)
    return _loaded(tensors, len(labels), config, make_module)


def _loaded(
    tensors: Mapping[str, Tensor], num_classes: int, config: RunConfig, make_module: ModuleFactory | None
) -> nn.Module:
    module = module_of(config, num_classes, make_module)
    module.load_state_dict(tensors)
    return module.eval()


def _stores(summary: RunSummary) -> dict[str, StoreResult]:
    parts = [client for round_ in summary.rounds for client in round_.clients]
    compared = {store.client: store for store in summary.stores}
    results = {}
    for name in sorted({client.client for client in parts} | compared.keys()):
        own = [client for client in parts if client.client == name]
        comparison = compared.get(name)
        results[name] = StoreResult(
            name=name,
            num_examples=next((c.num_examples for c in reversed(own) if c.num_examples is not None), None),
            num_rounds=sum(client.status is ClientStatus.COUNTED for client in own),
            accuracy=next((c.accuracy for c in reversed(own) if c.accuracy is not None), None),
            kept=comparison.best.value if comparison and comparison.best else None,
            accuracies={found.value: value for found, value in comparison.accuracies.items()} if comparison else {},
        )
    return results


def _num_counted(round_: RoundFinished) -> int:
    return sum(client.status is ClientStatus.COUNTED for client in round_.clients)
