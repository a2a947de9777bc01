"""What a run's product report says, with the names of products: for `fedshelf runs show` and the model card."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedshelf.core.class_folder import ProductCount
from fedshelf.core.events import ProductReport
from fedshelf.core.text import spreadsheet_cell
from fedshelf.data.catalogue import Catalogue

VALIDATION, TEST = "validation photos", "test photos"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductResult:
    """A model's score on one product.

    Attributes:
        product: the product's name.
        correct: photos classified correctly.
        total: photos.
    """

    product: str
    correct: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelResult:
    """A model's accuracy at one level of the product tree.

    Attributes:
        depth: the level; 1 is the coarsest.
        accuracy: share of the photos whose prediction lies in the correct folder.
    """

    depth: int
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """Photos of one product that are predicted to show another.

    Attributes:
        product: the product.
        taken_for: the predicted product.
        photos: number of photos.
    """

    product: str
    taken_for: str
    photos: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductResults:
    """How a model does on each product.

    Attributes:
        products: in the order of the catalogue; of the stores' validation photos, or of the test photos if no store
            has reported.
        products_on: the photos of `products`; empty if there are none.
        levels: coarsest first; of the test photos, or of the stores' validation photos if there is no test.
        levels_on: the photos of `levels`; empty if there are none.
        confusion: all wrong predictions on the test photos, the most frequent first.
        num_stores: stores that reported.
        num_withheld: stores whose policy withholds these counts.
    """

    products: tuple[ProductResult, ...] = ()
    products_on: str = ""
    levels: tuple[LevelResult, ...] = ()
    levels_on: str = ""
    confusion: tuple[Confusion, ...] = ()
    num_stores: int = 0
    num_withheld: int = 0

    def to_record(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        record = asdict(self)
        return {name: record[name] for name in ("products", "products_on", "levels", "levels_on", "confusion")}


NO_RESULTS = ProductResults()


def product_results(report: ProductReport | None, catalogue: Catalogue) -> ProductResults:
    """Name the products of a report.

    Args:
        report: the report; None if there is none yet.
        catalogue: the run's products.
    """
    if report is None:
        return NO_RESULTS
    names, tree = catalogue.names, catalogue.tree
    tested = {(label, prediction): count for label, prediction, count in report.confusion}
    levels, num_photos = report.levels, report.num_photos
    if tested:
        levels, num_photos = tree.correct(tested), sum(tested.values())
    products = report.products or _counts(report.confusion)
    wrong = (
        Confusion(product=names[label], taken_for=names[prediction], photos=count)
        for (label, prediction), count in tested.items()
        if label != prediction
    )
    return ProductResults(
        products=tuple(ProductResult(product=names[p.index], correct=p.correct, total=p.total) for p in products),
        products_on=VALIDATION if report.products else TEST if products else "",
        levels=tuple(LevelResult(depth=d, accuracy=right / num_photos) for d, right in enumerate(levels, start=1)),
        levels_on=TEST if tested else VALIDATION if levels else "",
        confusion=tuple(sorted(wrong, key=lambda found: (-found.photos, found.product, found.taken_for))),
        num_stores=report.num_stores,
        num_withheld=report.num_withheld,
    )


def confusion_table(report: ProductReport, catalogue: Catalogue) -> Iterable[Sequence[str | int]]:
    """Yield the rows of the confusion matrix that are not zero, below a heading, as cells of a CSV file."""
    yield "product", "predicted", "photos"
    for label, prediction, count in report.confusion:
        yield spreadsheet_cell(catalogue.names[label]), spreadsheet_cell(catalogue.names[prediction]), count


def _counts(confusion: Sequence[tuple[int, int, int]]) -> tuple[ProductCount, ...]:
    totals: Counter[int] = Counter()
    correct: Counter[int] = Counter()
    for label, prediction, count in confusion:
        totals[label] += count
        correct[label] += count * (label == prediction)
    return tuple(ProductCount(index=index, correct=correct[index], total=totals[index]) for index in sorted(totals))
