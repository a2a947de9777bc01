"""New products in mid-run: what the server and the clients keep of a model when its catalogue grows.

The catalogue in the run's folder says which products the model has. A state is saved with its number of classes, or
their digest, and is grown when it is used under a catalogue that has more. So there is no moment at which a crash could
mix the two: a state that was saved before the catalogue grew is grown again, to the same bits.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedshelf.algorithms.base import Algorithm
from fedshelf.core.errors import RunError
from fedshelf.core.growth import Growth
from fedshelf.core.state import ClientState, OpenRound, ServerState
from fedshelf.core.text import counted
from fedshelf.data.catalogue import Catalogue
from fedshelf.models.head import head_names
from fedshelf.personalization.base import Personalization
from fedshelf.rounds.plan import GlobalModel
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)


def grown_server(
    state: ServerState, catalogue: Catalogue, model: GlobalModel, algorithm: Algorithm, *, run_id: str,
    is_gathered: bool = False,
) -> ServerState:  # fmt: skip
    """The server's state under a catalogue that may have grown since it was saved.

    Which round is best starts anew: earlier ones were compared on the photos of fewer products.

    Args:
        state: the state as it was saved.
        catalogue: the run's catalogue.
        model: the model for it.
        algorithm: the run's algorithm, for that model.
        run_id: the run, for errors.
        is_gathered: whether the catalogue was made anew of what stores have, so that more products are no growth that
            somebody decided on.

    Returns:
        The state itself, if the catalogue has the same products.

    Raises:
        RunError: the catalogue has other products.
        ModelError: the model cannot grow.
    """
    if state.classes in ("", catalogue.names_digest):
        return state
    before = catalogue.num_first(state.classes)
    if before is None or is_gathered:
        raise RunError(
            f"the catalogue of run {run_id} has changed since round {state.round}: its model would take one "
            "product for another. Restore catalogue.json in the run's folder (labels.json in its model folder has "
            "the names in their order), or start a new run from that model with --init"
        )
    growth = Growth(layout=model.layout, rows=model.rows, before=before, after=len(catalogue))
    return replace(
        state, model=algorithm.grow_server(state.model, growth), classes=catalogue.names_digest, best=None
    )  # fmt: skip


def in_open_round(catalogue: Catalogue, opened: OpenRound | None, *, next_round: int) -> Catalogue:
    """The catalogue that a resumed server begins with: that of the round that is open, which ends as it began.

    Clients have replied to it with updates of that model, and train no other one in the same round.

    Args:
        catalogue: the run's catalogue, which may have grown since.
        opened: the round that a previous server process had opened.
        next_round: the number of the round after the newest saved state.
    """
    if opened is None or opened.key.round != next_round:
        return catalogue
    number = catalogue.num_first(opened.classes)
    return catalogue if number is None else catalogue.first(number)


def grown_client(
    state: ClientState, trainer: Trainer, algorithm: Algorithm, personalization: Personalization
) -> ClientState:  # fmt: skip
    """A client's state under a catalogue that may have grown since it was saved.

    Args:
        state: the state as it was saved.
        trainer: trains the model of the current catalogue.
        algorithm: the run's algorithm, for that model.
        personalization: what stays at the client.

    Returns:
        The state itself, if the catalogue has the same number of products.
    """
    bound, number = trainer.bound_model, trainer.num_classes
    if number is None or state.num_classes in (0, number):
        return state
    growth = Growth(
        layout=bound.params.layout, rows=head_names(bound.module), before=state.num_classes, after=number
    )  # fmt: skip
    logger.info(
        "the catalogue has grown by %s: what this store keeps for the model gets rows for them",
        counted(growth.after - growth.before, "product"),
    )
    return ClientState(
        algorithm=algorithm.grow_client(state.algorithm, growth),
        personalization=personalization.grow(state.personalization, growth),
        pipeline=_carried_over(state.pipeline, growth), num_classes=growth.after,
    )  # fmt: skip


def _carried_over(kept: Mapping[str, Tensor], growth: Growth) -> dict[str, Tensor]:
    """What stages carry over to the next upload: zeros for new values; nothing, where its shape is not the model's."""
    grown = {name: growth.of_size(vector) for name, vector in kept.items()}
    for name in (name for name, vector in grown.items() if vector is None):
        logger.warning("what the stage '%s' carried over from earlier uploads is dropped: the model has grown", name)
    return {name: vector for name, vector in grown.items() if vector is not None}
