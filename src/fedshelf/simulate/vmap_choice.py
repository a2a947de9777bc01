"""Chooses whether to train clients together, by a measurement once at the start of a run."""

import json
import logging
from dataclasses import asdict, dataclass
from typing import Literal

from fedshelf.app.model import ModuleFactory, bound_model_of
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import EngineName
from fedshelf.core.errors import RunError
from fedshelf.data.catalogue import Catalogue
from fedshelf.scheduling.cohort import size
from fedshelf.simulate.stores import Stores
from fedshelf.storage.atomic_files import write_atomically
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.training.stack_check import measure

logger = logging.getLogger(__name__)

LOOKED_AT = 20  # number of stores whose classes suffice to estimate the model's size


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineChoice:
    """The faster engine for a run.

    Attributes:
        engine: the engine.
        reason: the measurement, for the user.
    """

    engine: Literal["local", "vmap"]
    reason: str


def engine_of(
    directory: RunDirectory, config: RunConfig, stores: Stores, make_module: ModuleFactory | None
) -> EngineName:  # fmt: skip
    """Return a run's engine: the configured one, or the one chosen and saved at its start.

    Args:
        directory: the run's directory.
        config: the run's configuration.
        stores: the clients' photos.
        make_module: creates the caller's own model, if there is one.

    Raises:
        RunError: the saved choice is damaged.
    """
    if config.engine != "auto":
        return config.engine
    try:
        choice = EngineChoice(**json.loads(directory.engine.read_text(encoding="utf-8")))
    except FileNotFoundError:
        choice = choose_engine(config, stores, make_module=make_module)
        write_atomically(directory.engine, json.dumps(asdict(choice)))
    except (ValueError, TypeError) as error:
        raise RunError(f"'{directory.engine}' is damaged ({error}): which engine the run used is not known") from error
    logger.info("engine %s: %s", choice.engine, choice.reason)
    return choice.engine


def choose_engine(config: RunConfig, stores: Stores, *, make_module: ModuleFactory | None = None) -> EngineChoice:
    """Time one small chunk of clients both ways, on the run's kind of model and random photos.

    What is faster in one process is faster in each of `config.workers`. The run itself is not affected. For models
    small enough that the answer is open, this takes a fraction of a second.

    Args:
        config: the run's configuration.
        stores: the clients' photos.
        make_module: creates the caller's own model, if there is one.

    Returns:
        The faster engine.

    Raises:
        FedShelfError: the model cannot be built.
    """
    names = stores.names()
    catalogue = Catalogue.resolve({name: stores.classes(name) for name in names[:LOOKED_AT]})
    plain = config.model_copy(update={"init": None, "pretrained": False})  # the weights do not affect the time
    bound = bound_model_of(plain, catalogue, device=config.device, make_module=make_module)
    cohort_size = size(len(names), fraction=config.fraction)
    found = measure(bound, config.image_size, cohort_size=cohort_size // max(1, config.workers))
    if found.together is None:
        return EngineChoice(engine="local", reason=found.reason)
    reason = (
        f"a client's step takes {1000 * found.alone:.2f} ms by itself, "
        f"{1000 * found.together:.2f} ms in a chunk of {found.chunk}"
    )
    return EngineChoice(engine="vmap" if found.is_faster else "local", reason=reason)
