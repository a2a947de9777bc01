"""A federation on this machine: stores, a model and settings."""

import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from fedshelf.algorithms.base import Algorithm
from fedshelf.api.models import GivenModel, ModelArgument, name_of
from fedshelf.api.progress import shown_progress
from fedshelf.api.result import Result
from fedshelf.api.settings import config_of
from fedshelf.api.stores import PathOrDataset, StoresArgument, by_name, open_stores
from fedshelf.app.components import algorithm_of
from fedshelf.app.run import with_own_model
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.stopping import stop_on_signals
from fedshelf.simulate.engine import simulate_stores
from fedshelf.training.loop import alone
from fedshelf.training.own_training import LocalTraining, OwnTraining

_OTHER_NAMES = {"data_dir": "stores", "test_dir": "test"}


class Federation:
    """Stores on this machine that train one model together, as `fedshelf simulate` does and with the same results.

    Args:
        stores: a folder with one folder of photos per store; or a mapping of names to folders or Datasets; or a list of
            them. A Dataset yields (photo, label). A photo is a Pillow image, uint8 [H, W, 3], or float [3, H, W] from 0
            to 1. A label indexes the Dataset's `classes`, or is a number if it has none.
        model: `resnet10`, a model of timm, or `module:function`; or a function that takes the number of classes and
            returns a module; or a module, which is copied.
        algorithm: a name, or an instance of a class of `fedshelf.algorithms`.
        test: photos for central evaluation, a folder or a Dataset.
        local_training: a function `(module, batches, client_lr, hooks) -> mean loss` that trains the model at one
            client for one round, instead of FedShelf's training loop.
        **settings: any flag of `fedshelf simulate`, such as `client_lr=0.01`. Without `run_dir`, the run is kept in a
            temporary folder, which is deleted with the result. With it, the run can be resumed.

    Raises:
        UsageError: an argument is invalid (all problems are listed).
        DataError: the folder does not hold stores.
    """

    def __init__(
        self, stores: StoresArgument, *, model: ModelArgument = "resnet10", algorithm: str | Algorithm = "fedavg",
        test: PathOrDataset | None = None, local_training: LocalTraining | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        if problems := [f"{name}: give it as {other}" for name, other in _OTHER_NAMES.items() if name in settings]:
            raise UsageError(*problems)
        self._stores = by_name(stores)
        self._folder = stores if isinstance(stores, Path | str) else None
        self._model = model
        self._algorithm = algorithm
        self._test = test
        self._training = alone if local_training is None else OwnTraining(local_training)
        self._settings = settings
        config, _ = self._config(None)
        if local_training is not None and algorithm_of(config).sums:
            raise UsageError(
                f"algorithm={config.algorithm!r} with local_training: stores send sums instead of training. Leave "
                "local_training out"
            )
        if local_training is not None and config.engine in ("vmap", "auto"):
            raise UsageError(
                f"engine={config.engine!r} with local_training: such a function trains one client at a time. Leave "
                "engine out"
            )

    def run(self, rounds: int | None = None, *, progress: bool = True) -> Result:
        """Train.

        Ctrl-C (or a notebook's stop button) stops after the current step, and the result is that of the last finished
        round. A second one raises KeyboardInterrupt.

        Args:
            rounds: number of rounds, instead of the setting.
            progress: show progress.

        Returns:
            History, model, and results of the stores.

        Raises:
            FedShelfError: an argument is invalid, photos or the model cannot be used, or the run failed.
        """
        temporary = None
        if self._settings.get("run_dir") is None:
            temporary = Path(tempfile.mkdtemp(prefix="fedshelf-run-"))
        try:
            config, make_module = self._config(rounds)
            if temporary is not None:
                config = config.model_copy(update={"run_dir": temporary / "run"})
            source = open_stores(self._stores, self._test, config)
            with (
                shown_progress(progress=progress) as watchers,
                stop_on_signals(signals=(signal.SIGINT,)) as stop,
            ):
                _, directory = simulate_stores(
                    config, source, model=make_module, watchers=watchers, stop=stop, training=self._training
                )
                return Result.of(directory, with_own_model(config, make_module), make_module, temporary=temporary)
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _config(self, rounds: int | None) -> tuple[RunConfig, GivenModel | None]:
        """Validate all settings.

        Returns:
            The configuration, and what creates the module, unless it is found by its name.
        """
        in_memory = self._test is not None and not isinstance(self._test, Path | str)
        given = {
            **self._settings, "data_dir": self._folder, "test_dir": Path() if in_memory else self._test,
            "model": self._model if isinstance(self._model, str) else name_of(self._model),
            **({} if rounds is None else {"rounds": rounds}),
        }  # fmt: skip
        config = config_of(RunConfig, "simulate", given, algorithm=self._algorithm)
        if in_memory:  # the folder stood for it when the settings were validated
            config = config.model_copy(update={"test_dir": None})
        made = None if isinstance(self._model, str) else GivenModel(model=self._model, image_size=config.image_size)
        return config, made
