"""The stores of a federation: folders of photos, Datasets, or some of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedshelf.api.datasets import AnyDataset, indexed, is_dataset, read_datasets
from fedshelf.app.photos import StorePhotos
from fedshelf.app.setup import OpenedSetup
from fedshelf.app.store_sales import StoreSales
from fedshelf.config import places
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import ClassFolder
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.filesystem import folder_problem
from fedshelf.data.layout import store_folders
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.stores import FolderStores, MemoryStores, Stores

PathOrDataset = Path | str | AnyDataset
StoresArgument = Path | str | Mapping[str, PathOrDataset] | Sequence[PathOrDataset]


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedStores:
    """Stores from several sources.

    Attributes:
        sources: the source of each store, by name.
        test_source: the source of the photos for central evaluation.
    """

    sources: Mapping[str, Stores]
    test_source: Stores

    @property
    def has_test(self) -> bool:
        """See `Stores`."""
        return self.test_source.has_test

    @property
    def features_folder(self) -> None:
        """See `Stores`. Nothing of a Dataset is kept on disk."""
        return None

    def names(self) -> tuple[str, ...]:
        """See `Stores`."""
        return tuple(sorted(self.sources))

    def classes(self, name: str) -> tuple[ClassFolder, ...]:
        """See `Stores`."""
        return self.sources[name].classes(name)

    def num_photos(self, name: str, catalogue: Catalogue) -> tuple[int, int] | None:
        """See `Stores`."""
        return self.sources[name].num_photos(name, catalogue)

    def photos(self, name: str, opened: OpenedSetup) -> StorePhotos:
        """See `Stores`."""
        return self.sources[name].photos(name, opened)

    def test(self, opened: OpenedSetup, store: str = "", sales: StoreSales | None = None) -> PhotoSet:
        """See `Stores`."""
        return self.test_source.test(opened, store, sales)


def by_name(stores: StoresArgument) -> dict[str, PathOrDataset]:
    """Name the stores.

    Args:
        stores: a folder with one folder per store, a mapping of names to folders or Datasets, or a list of these, in
            which a folder has its own name and a Dataset a number ('store-01').

    Raises:
        UsageError: it is something else, or two stores have the same name.
        DataError: the folder does not hold stores.
    """
    if isinstance(stores, Path | str):
        return dict(store_folders(places.absolute(Path(stores))))
    if isinstance(stores, Mapping):
        found = dict(stores)
    elif isinstance(stores, Sequence):
        digits = len(str(len(stores)))
        names = [
            places.absolute(Path(store)).name if isinstance(store, Path | str) else f"store-{number:0{digits}}"
            for number, store in enumerate(stores, start=1)
        ]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"several stores are called {', '.join(twice)}: give a mapping of names to folders")
        found = dict(zip(names, stores, strict=True))
    else:
        raise UsageError(
            f"stores is a {type(stores).__name__}: give a folder, a list, or a mapping of names to folders or Datasets"
        )
    for name, store in found.items():
        _check(f"the store '{name}'", store)
    return {str(name): store for name, store in found.items()}


def open_stores(stores: Mapping[str, PathOrDataset], test: PathOrDataset | None, config: RunConfig) -> Stores:
    """Create the source of a federation's photos; Datasets are read.

    Args:
        stores: folders and Datasets by name.
        test: photos for central evaluation.
        config: the run's configuration, with the test folder, if `test` is one.

    Raises:
        UsageError: a folder does not exist.
        DataError: a Dataset cannot be used.
    """
    folders = {name: places.absolute(Path(store)) for name, store in stores.items() if isinstance(store, Path | str)}
    for name, folder in folders.items():
        if problem := folder_problem(folder):
            raise UsageError(f"the store '{name}', {folder}: {problem}")
    on_disk = FolderStores(folders=folders, cache=places.photo_cache(), test_dir=config.test_dir)
    if test is not None:
        _check("test", test)
    if len(folders) == len(stores) and (test is None or isinstance(test, Path | str)):
        return on_disk
    datasets = {f"the store '{name}'": store for name, store in stores.items() if not isinstance(store, Path | str)}
    if test is not None and not isinstance(test, Path | str):
        datasets["the test photos"] = test
    read = read_datasets(datasets, config.image_size)
    tests: Stores = on_disk
    if config.test_dir is None and test is not None:
        (test_photos,), test_classes = indexed([read.pop()])
        tests = MemoryStores({}, test_photos, test_classes)
    photos, class_names = indexed(read)
    names = [name for name in stores if name not in folders]
    in_memory = MemoryStores(
        dict(zip(names, photos, strict=True)), None, class_names, val_fraction=config.val_fraction, seed=config.seed
    )
    return MixedStores(sources={name: on_disk if name in folders else in_memory for name in stores}, test_source=tests)


def _check(what: str, given: object) -> None:
    if not isinstance(given, Path | str) and not is_dataset(given):
        raise UsageError(f"{what} is a {type(given).__name__}: give a folder or a Dataset")
