"""How the last round's model does on each product: the stores' counts and the server's test photos."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from fedshelf.algorithms.aggregation import capped
from fedshelf.core.events import ProductReport
from fedshelf.core.messages import PARAMS, Broadcast, Evaluation, ProductCount, Purpose, TaskKey
from fedshelf.core.ports import Reply
from fedshelf.core.state import ServerState
from fedshelf.data.product_tree import ProductTree
from fedshelf.rounds.dispatch import Patience, TrafficCounter
from fedshelf.rounds.plan import Context
from fedshelf.rounds.round_steps import EVALUATION_FACTOR, MIN_EVALUATION_SECONDS
from fedshelf.rounds.sums.evaluations import SummedEvaluation
from fedshelf.rounds.validation import problem_with_evaluation


def counts_of(
    confusion: Mapping[tuple[int, int], int], tree: ProductTree
) -> tuple[tuple[ProductCount, ...], tuple[int, ...]]:  # fmt: skip
    """Count the correct photos of each product, and at each level of the tree.

    Args:
        confusion: photos by class and predicted class.
        tree: the product tree.

    Returns:
        `Evaluation.products` and `Evaluation.levels`.
    """
    totals: Counter[int] = Counter()
    for (label, _), count in confusion.items():
        totals[label] += count
    products = (
        ProductCount(index=index, correct=confusion.get((index, index), 0), total=total)
        for index, total in sorted(totals.items())
    )
    return tuple(products), tree.correct(confusion)


def product_report(
    context: Context, state: ServerState, evaluations: Mapping[str, Evaluation | None],
    held_out: Tensor | None = None, total: SummedEvaluation | None = None,
) -> ProductReport:  # fmt: skip
    """Report on the model of the last round.

    Live stores that did not take part in the round evaluate it now, unless the server decodes sums only: theirs would
    be of too few.

    Args:
        context: the run's shared objects.
        state: the state after the last round.
        evaluations: by store, its evaluation of the model; None for one that is not to be asked for it.
        held_out: values [S] that the stores evaluated instead of the model, which has seen their validation photos.
        total: the figures of these evaluations together, if the server decodes sums only.

    Raises:
        StopRequested: the server was asked to stop.
    """
    score = context.evaluate(state, is_last=True)
    if context.uploads.summand is not None:
        return _of_sum(total, score.confusion if score else {})
    known = [evaluation for evaluation in evaluations.values() if evaluation is not None]
    values = state.model.published if held_out is None else held_out
    asked = _ask(context, state, values, besides=evaluations)
    return summed(
        [*known, *asked.values()], score.confusion if score else {}, max_examples=context.plan.rounds.max_examples
    )  # fmt: skip


def _of_sum(total: SummedEvaluation | None, confusion: Mapping[tuple[int, int], int]) -> ProductReport:
    """The report of figures that are known as a sum alone."""
    report = ProductReport(confusion=_rows(confusion))
    if total is None:
        return report
    return replace(
        report, products=total.products, levels=total.levels if total.products else (),
        num_photos=sum(product.total for product in total.products), num_stores=total.num_reporting,
        num_withheld=total.num_withholding,
    )  # fmt: skip


def _rows(confusion: Mapping[tuple[int, int], int]) -> tuple[tuple[int, int, int], ...]:
    return tuple((label, prediction, count) for (label, prediction), count in sorted(confusion.items()))


def _ask(context: Context, state: ServerState, values: Tensor, *, besides: Collection[str]) -> dict[str, Evaluation]:
    """Return the evaluations of all live stores besides those given, as far as they arrive in time."""
    plan, membership, found = context.plan, context.membership, dict[str, Evaluation]()
    names = [name for name in membership.live() if name not in besides and membership.num_validation(name)]
    key = TaskKey(run_id=plan.run_id, round=state.round, attempt=state.unused_attempt)
    patience = Patience(
        len(names), factor=EVALUATION_FACTOR, at_least=MIN_EVALUATION_SECONDS, timer=context.timer
    )  # fmt: skip

    def broadcast(name: str) -> Broadcast:
        return Broadcast(
            key=key, purpose=Purpose.EVALUATE, client_lr=0.0, vectors={PARAMS: values},
            counted=state.counted.get(name), per_product=True,
        )  # fmt: skip

    def on_reply(reply: Reply) -> None:
        patience.on_reply()
        problem = problem_with_evaluation(reply, key, membership.num_validation(reply.client), context.catalogue.tree)
        if problem:
            membership.on_refused(
                reply.client, f"its evaluation is not used: {problem}", doing=Purpose.EVALUATE
            )  # fmt: skip
        elif isinstance(reply.message, Evaluation):
            found[reply.client] = reply.message

    context.dispatcher.dispatch(
        names, key, broadcast, on_reply, seconds=plan.rounds.timeout, traffic=TrafficCounter(),
        enough=patience.is_over, expects_others=True,
    )  # fmt: skip
    return found


def summed(
    evaluations: Iterable[Evaluation], confusion: Mapping[tuple[int, int], int], *, max_examples: int
) -> ProductReport:  # fmt: skip
    """Sum the counts of all stores.

    A store counts for as many photos as in the round's accuracy: the counts of one that claims more are scaled down,
    and rounded down.

    Args:
        evaluations: one for each store.
        confusion: test photos by class and predicted class.
        max_examples: upper bound on the photos of one store.
    """
    evaluations = [evaluation for evaluation in evaluations if evaluation.num_examples]
    reported = [evaluation for evaluation in evaluations if evaluation.products]
    correct: Counter[int] = Counter()
    total: Counter[int] = Counter()
    levels: Counter[int] = Counter()
    weights = capped([min(evaluation.num_examples, max_examples) for evaluation in reported])
    for evaluation, most in zip(reported, weights, strict=True):
        count = evaluation.num_examples
        for product in evaluation.products:
            correct[product.index] += product.correct * most // count
            total[product.index] += product.total * most // count
        levels.update({level: right * most // count for level, right in enumerate(evaluation.levels)})
    return ProductReport(
        products=tuple(
            ProductCount(index=index, correct=correct[index], total=total[index]) for index in sorted(+total)
        ),
        levels=tuple(levels[level] for level in sorted(levels)),
        num_photos=sum(weights),
        num_stores=len(reported),
        num_withheld=len(evaluations) - len(reported),
        confusion=_rows(confusion),
    )
