"""The figures of an evaluation as integers, of which the server needs the sum alone.

    n integers of 64 bits, m = the most summands of the run's codec:
     1  photos, right answers
     2  photos with a loss, sum of losses / STEP
     3  to choose among candidates: photos with scores; by candidate, right answers and each sum of losses / STEP
     4  by product: stores that count, stores that do not; right answers and photos of each product; by level, right
        answers

A store that withholds a figure, or has no validation photos, adds zeros. Losses are rounded to the nearest integer, so
that the sum is the same in every bit, under masks or not. One of more than L · STEP, L = 2^(62 - ceil(log2 m)), counts
as that: 7·10^10 nats with 64 stores, which only a destroyed model has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.class_folder import ProductCount
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import CandidateScore, Evaluation
from fedshelf.core.text import counted
from fedshelf.data.product_tree import ProductTree

BITS, STEP = 64, 2.0**-20
_COUNTS, _SCORED, _REPORTING = 4, 1, 2  # integers before the scores, and before the products


@dataclass(frozen=True, kw_only=True, slots=True)
class SummedEvaluation:
    """The figures of some stores together.

    Attributes:
        num_examples: photos evaluated.
        num_correct: photos classified correctly.
        loss: mean loss of the photos that have one, in nats; None if none has.
        num_scored: photos on which candidates were scored.
        candidates: the scores, if candidates were asked for.
        num_reporting: stores with photos that count by product.
        num_withholding: stores with photos that do not, though they were asked to.
        products: the products with photos.
        levels: right answers by level.
    """

    num_examples: int
    num_correct: int
    loss: float | None
    num_scored: int = 0
    candidates: tuple[CandidateScore, ...] = ()
    num_reporting: int = 0
    num_withholding: int = 0
    products: tuple[ProductCount, ...] = ()
    levels: tuple[int, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The accuracy on all photos; None without any."""
        return self.num_correct / self.num_examples if self.num_examples else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationCodes:
    """What the integers of one evaluation mean.

    Attributes:
        summands: m.
        num_scores: integers of all candidates together (line 3); 0 if none are asked for.
        num_products: products of the catalogue, if they are counted, else 0.
        depth: levels of their tree.
    """

    summands: int
    num_scores: int = 0
    num_products: int = 0
    depth: int = 0

    @classmethod
    def of(cls, summands: int, *, num_scores: int = 0, tree: ProductTree | None = None) -> "EvaluationCodes":
        """The integers of an evaluation.

        Args:
            summands: m.
            num_scores: integers of all candidates together; 0 if none are asked for.
            tree: the product tree, if products are counted.
        """
        num_products, depth = (0, 0) if tree is None else (len(tree.paths), tree.depth)
        return cls(summands=summands, num_scores=num_scores, num_products=num_products, depth=depth)

    @classmethod
    def scoring(cls, summands: int, size: int) -> "EvaluationCodes":
        """Those of `size` integers, most of which score candidates.

        Raises:
            RefusedError: the size has no room for scores.
        """
        if size <= _COUNTS + _SCORED:
            raise RefusedError(f"{counted(size, 'integer')} have no room for scores of candidates")
        return cls(summands=summands, num_scores=size - _COUNTS - _SCORED)

    @property
    def size(self) -> int:
        """n."""
        by_product = _REPORTING + 2 * self.num_products + self.depth if self.num_products else 0
        return _COUNTS + (_SCORED + self.num_scores if self.num_scores else 0) + by_product

    @property
    def most(self) -> int:
        """L."""
        return 1 << (62 - (self.summands - 1).bit_length())

    def encode(self, evaluation: Evaluation) -> NDArray[np.uint64]:
        """The integers [n] of one store.

        Raises:
            RefusedError: it has other scores or products than were asked for.
        """
        examples, has_loss = evaluation.num_examples, evaluation.loss_sum is not None
        found = [examples, evaluation.num_correct, examples * has_loss, self._fixed(evaluation.loss_sum or 0.0)]
        if self.num_scores:
            scores = [
                number
                for score in evaluation.candidates
                for number in (score.num_correct, *map(self._fixed, score.losses))
            ]
            found += [examples * bool(scores), *(scores or [0] * self.num_scores)]
        if self.num_products:
            counts = np.zeros((self.num_products, 2), np.int64)
            for product in evaluation.products:
                if product.index >= self.num_products:
                    raise RefusedError(f"it counts product {product.index} of {self.num_products:,}")
                counts[product.index] = product.correct, product.total
            reports = bool(evaluation.products)
            levels = list(evaluation.levels) or [0] * self.depth
            found += [int(reports), int(bool(examples) and not reports), *counts.ravel().tolist(), *levels]
        if len(found) != self.size:
            raise RefusedError(f"the evaluation has {counted(len(found), 'figure')}, and {self.size:,} are asked for")
        return np.array([min(number, self.most) for number in found], np.int64).view("<u8")

    def decode(self, total: NDArray[np.uint64], *, num_losses: int = 0) -> SummedEvaluation:
        """The figures of a sum.

        Args:
            total: the sum of the stores' integers [n].
            num_losses: sums of losses of each candidate.

        Raises:
            RefusedError: they contradict each other.
        """
        numbers: list[int] = total.view("<i8").tolist()
        examples, correct, with_loss, loss = numbers[:_COUNTS]
        rest, scored, rows = numbers[_COUNTS:], 0, list[Sequence[int]]()
        if self.num_scores:
            scored, scores, rest = rest[0], rest[1 : 1 + self.num_scores], rest[1 + self.num_scores :]
            rows = [scores[start : start + 1 + num_losses] for start in range(0, self.num_scores, 1 + num_losses)]
        reporting, withholding = rest[:_REPORTING] or (0, 0)
        counts, levels = rest[_REPORTING : len(rest) - self.depth], rest[len(rest) - self.depth :]
        products = list(zip(counts[::2], counts[1::2], strict=True))
        if (
            min(numbers) < 0
            or max(correct, with_loss, scored) > examples
            or any(row[0] > scored for row in rows)
            or any(right > of for right, of in products)
            or sum(of for _, of in products) > examples
            or any(level > examples for level in levels)
        ):
            raise RefusedError("the sum of the stores' figures contradicts itself: at least one of them is wrong")
        return SummedEvaluation(
            num_examples=examples, num_correct=correct, loss=loss * STEP / with_loss if with_loss else None,
            num_scored=scored, num_reporting=reporting, num_withholding=withholding, levels=tuple(levels),
            candidates=tuple(
                CandidateScore(num_correct=row[0], losses=tuple(number * STEP for number in row[1:])) for row in rows
            ),
            products=tuple(
                ProductCount(index=index, correct=right, total=of) for index, (right, of) in enumerate(products) if of
            ),
        )  # fmt: skip

    def summed(self, evaluations: Iterable[Evaluation], *, num_losses: int = 0) -> SummedEvaluation:
        """The figures of evaluations that have arrived in the clear: the same as those of a sum under masks.

        Raises:
            RefusedError: they contradict each other.
        """
        total = np.zeros(self.size, "<u8")
        for evaluation in evaluations:
            total += self.encode(evaluation)
        return self.decode(total, num_losses=num_losses)

    def _fixed(self, loss: float) -> int:
        return round(min(max(loss, 0.0) / STEP, float(self.most)))
