"""What an audit attacks: a store's photos, the model that it received, and its settings."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fedshelf.app.client_place import place_of
from fedshelf.app.components import plan_of
from fedshelf.app.model import bound_model_of
from fedshelf.app.photos import FEATURES, StorePhotos, store_photos
from fedshelf.app.setup import OpenedSetup, open_setup
from fedshelf.app.state_directories import state_dir_of
from fedshelf.app.work import work_for
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import ModelError, UsageError
from fedshelf.core.messages import Setup
from fedshelf.core.text import did_you_mean, some
from fedshelf.data.cache import PhotoCache
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.folder import scan
from fedshelf.data.layout import store_folders
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.own_model import use_model_path
from fedshelf.rounds.client import Work
from fedshelf.rounds.plan import setup_of
from fedshelf.serialization import messages as payload
from fedshelf.storage.atomic_files import translating_os_errors
from fedshelf.storage.blob_cache import BlobCache
from fedshelf.storage.held_model import FileHeldModel
from fedshelf.storage.model_files import has_model, load_model_files
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.runs import resolve_run
from fedshelf.training.bound_model import BoundModel

_INITIAL = "new weights of the run's seed: no trained ones were found here"


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditSubject:
    """What is attacked.

    Attributes:
        store: the store's name.
        opened: the run's objects.
        photos: the store's photos, as features if the run trains on these.
        pixels: its training photos as pixels.
        shared: [S]: the model that the store is assumed to receive.
        origin: where that model comes from, in words.
        work: the store's work.
        products: the products of each store; None if they are not known.
    """

    store: str
    opened: OpenedSetup
    photos: StorePhotos
    pixels: PhotoSet
    shared: Tensor
    origin: str
    work: Work
    products: Mapping[str, tuple[str, ...]] | None = None


def subject_of_run(
    run: str, *, data_dir: Path | None, store: str | None, model_path: Path | None = None
) -> AuditSubject:  # fmt: skip
    """Open a simulated run.

    Args:
        run: the run's folder or id.
        data_dir: folder of the stores; by default the one of the run.
        store: the store to audit; by default the first by name.
        model_path: folder of the module of a model of the user's own.

    Returns:
        The subject.

    Raises:
        UsageError: there is no such run or store, or it is not known where the photos are.
        FedShelfError: photos or model cannot be read.
    """
    directory = resolve_run(run, places.RUNS)
    values = tomllib.loads(files.with_new_names(directory.config_toml))
    config = files.parse(RunConfig, values, where=f"'{directory.config}'")
    use_model_path(places.absolute(model_path) if model_path else config.model_path)
    root = data_dir or config.data_dir
    if root is None:
        raise UsageError(
            f"run {directory.run_id} does not say where photos are. Give the folder of the stores with --data-dir, or "
            "audit at a store, with --store"
        )
    folders = store_folders(places.absolute(root))
    if store is not None and store not in folders:
        near = did_you_mean(store, folders) or f". The stores are {some(sorted(folders))}"
        raise UsageError(f"--name {store}: there is no such store in '{root}'{near}")
    name = min(folders) if store is None else store
    catalogue = _as_trained(Catalogue.load(directory.catalogue), directory)
    named = config.model_copy(update={"pretrained": False, "device": "cpu", "teacher_digest": None})
    bound = bound_model_of(named, catalogue, device="cpu")
    origin = next(
        (f"the model in '{folder}'" for folder in (directory.model, directory.initial_model) if _loaded(bound, folder)),
        _INITIAL,
    )
    plan = plan_of(named, run_id=directory.run_id, start_clients=len(folders), catalogue=catalogue)
    setup = setup_of(plan, catalogue, bound.params.layout, bound.frozen_values())
    return _subject(
        name, folders[name], setup, shared=bound.params.shared.clone(), origin=origin,
        products={each: _products(folder, catalogue) for each, folder in folders.items()},
    )  # fmt: skip


def subject_of_store(folder: Path, *, model_path: Path | None = None) -> AuditSubject:
    """Open what a store's client keeps.

    Args:
        folder: the store's state directory or photo folder.
        model_path: folder of the module of a model of the user's own.

    Returns:
        The subject.

    Raises:
        UsageError: there is no client's state, or the client has not taken part in a run.
        FedShelfError: photos or model cannot be read.
    """
    use_model_path(places.absolute(model_path) if model_path else None)
    state_dir = state_dir_of(folder)
    place, setup_file = place_of(state_dir), state_dir / "setup.json"
    if not setup_file.exists():
        raise UsageError(f"the store of '{state_dir}' has not taken part in a run yet, so there is nothing to audit")
    with translating_os_errors("read", setup_file):
        text = setup_file.read_text(encoding="utf-8", errors="replace")
    digest = payload.Header.parse(text).blob
    blob = BlobCache(places.photo_cache() / "models").find(digest) if digest else None
    setup = payload.decode(text, blob or b"")
    if not isinstance(setup, Setup):
        raise UsageError(f"'{setup_file}' is not the setup of a run")
    bound, model = open_setup(setup, device="cpu").bound_model, places.client_model(state_dir)
    held = FileHeldModel(state_dir / "model.safetensors").load()
    if held is not None and len(held[1]) == len(bound.params.shared):
        bound.load(held[1])
        origin = "the model that was received last"
    else:
        origin = f"the model in '{model}'" if _loaded(bound, model) else _INITIAL
    return _subject(place.name, place.data_dir, setup, shared=bound.params.shared.clone(), origin=origin)


def _subject(
    name: str, folder: Path, setup: Setup, *, shared: Tensor, origin: str,
    products: Mapping[str, tuple[str, ...]] | None = None,
) -> AuditSubject:  # fmt: skip
    # Without the teacher: attacks are tried on updates that follow from the store's photos alone.
    opened = replace(open_setup(setup, device="cpu"), teacher=None)
    cache = PhotoCache(root=places.photo_cache())
    plain = replace(opened, bound_model=replace(opened.bound_model, head=None))
    pixels = store_photos(folder, plain, cache, store=name)
    photos = pixels if opened.bound_model.head is None else store_photos(folder, opened, cache, store=name)
    opened.bound_model.load(shared)
    work = work_for(
        name, opened, photos, batch_size=opened.config.batch_size, features_folder=cache.root / FEATURES
    )  # fmt: skip
    return AuditSubject(
        store=name, opened=opened, photos=photos, pixels=pixels.train, shared=shared, origin=origin, work=work,
        products=products,
    )  # fmt: skip


def _as_trained(catalogue: Catalogue, directory: RunDirectory) -> Catalogue:
    """The catalogue without the products that were added after the run's last round."""
    folder = next((path for path in (directory.model, directory.initial_model) if has_model(path)), None)
    if folder is None:
        return catalogue
    labels = load_model_files(folder)[1]
    return catalogue.first(len(labels)) if catalogue.names[: len(labels)] == tuple(labels) else catalogue


def _loaded(bound: BoundModel, folder: Path) -> bool:
    """Load a saved model; False if there is none, or it is of another form, such as one with merged adapters."""
    if not has_model(folder):
        return False
    tensors, _, _ = load_model_files(folder)
    if {name: tensor.shape for name, tensor in tensors.items()} != {
        name: tensor.shape for name, tensor in bound.module.state_dict().items()
    }:
        return False
    try:
        bound.module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"'{folder}': the weights do not fit the run's model: {error}") from None
    return True


def _products(folder: Path, catalogue: Catalogue) -> tuple[str, ...]:
    indices = [catalogue.index_of(found) for found in scan(folder, val_fraction=0.0, seed=0).classes]
    return tuple(catalogue.names[index] for index in indices if index is not None)
