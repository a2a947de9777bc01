"""A run from its first client to its last round. Depends on ports only."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from fedshelf.algorithms.base import Algorithm, Asynchronous
from fedshelf.compression.download import Downloads, name_of
from fedshelf.core.errors import FedShelfError, RunError, WorkerLostError
from fedshelf.core.events import (
    CatalogueChanged,
    ClientStatus,
    Participation,
    RoundFinished,
    RunEnded,
    RunStarted,
    RunStatus,
)
from fedshelf.core.messages import RUN_FINISHED, ClassFolder, Evaluation
from fedshelf.core.state import ModelState, OpenRound, ServerState
from fedshelf.core.text import counted, printable
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.class_names import federation_doubts
from fedshelf.rounds.asynchronous.buffered import BufferedRounds
from fedshelf.rounds.dispatch import Inbox, StopRequested
from fedshelf.rounds.growth import grown_server, in_open_round
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.model_selection import ModelComparison
from fedshelf.rounds.plan import Context, GlobalModel, Plan, Ports, setup_of
from fedshelf.rounds.product_report import product_report
from fedshelf.rounds.sums.evaluations import SummedEvaluation
from fedshelf.rounds.synchronous import SynchronousRounds

logger = logging.getLogger(__name__)


class Rounds(Protocol):
    """A strategy that makes one version after another."""

    def resume(self, state: ServerState, opened: OpenRound | None) -> None:
        """Resume after `state`, with the round that a previous server process had opened."""

    def next(self, state: ServerState) -> tuple[ServerState, RoundFinished, Sequence[str]]:
        """Make the next version; return its state, its record, and the live clients."""

    def evaluations(self) -> Mapping[str, Evaluation | None]:
        """By client, its evaluation of the newest version; None for one that is not to be asked for it."""

    def held_out(self) -> Tensor | None:
        """The values [S] that clients evaluate instead of a version that has seen their validation photos."""

    def summed(self) -> SummedEvaluation | None:
        """The figures of the clients' evaluations together, if uploads are decoded as a sum only."""


class Server:
    """Gathers clients, freezes the catalogue and runs all rounds. A restarted server resumes the run.

    Args:
        plan: the configuration of the run.
        ports: the outside world.
        algorithm: the federated algorithm.
        build_model: builds the global model for the catalogue.
        keep_catalogue: saves the frozen catalogue before training starts.
        changed_catalogue: returns the saved catalogue if it has changed since it was read or saved, otherwise None.
    """

    def __init__(
        self, *, plan: Plan, ports: Ports, algorithm: Algorithm, build_model: Callable[[Catalogue], GlobalModel],
        keep_catalogue: Callable[[Catalogue], None],
        changed_catalogue: Callable[[], Catalogue | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._ports = ports
        self._algorithm = algorithm
        self._build_model = build_model
        self._keep_catalogue = keep_catalogue
        self._changed_catalogue = changed_catalogue
        self._membership = Membership(
            transport=ports.transport, sink=ports.sink, clock=ports.clock, sums=algorithm.sums,
            needs_counts=plan.needs_counts(algorithm), has_catalogue=plan.catalogue is not None,
        )  # fmt: skip
        self._inbox = Inbox(
            transport=ports.transport,
            membership=self._membership,
            sink=ports.sink,
            stop=ports.stop,
            clock=None if ports.virtual else ports.clock,
        )

    def run(self) -> RunStatus:
        """Run until the last round or a stop request, and return the final status.

        Raises:
            FedShelfError: the run failed; everything up to the last finished round is kept.
        """
        sink, transport = self._ports.sink, self._ports.transport
        try:
            reason = self._run()
        except StopRequested:
            return self._stopped("stopped on request")
        except KeyboardInterrupt:
            self._stopped("stopped at once on request")
            raise
        except Exception as error:
            if isinstance(error, WorkerLostError) and self._ports.stop.is_set():
                return self._stopped("stopped on request")  # the worker was asked to stop, too
            is_expected = isinstance(error, FedShelfError)
            reason = str(error) if is_expected else f"{type(error).__name__}: {error}"
            sink.emit(RunEnded(status=RunStatus.FAILED, reason=reason))
            transport.close(f"the run failed: {error if is_expected else 'an error inside the server'}")
            raise
        sink.emit(RunEnded(status=RunStatus.FINISHED, reason=reason))
        transport.close(RUN_FINISHED)
        return RunStatus.FINISHED

    def _stopped(self, reason: str) -> RunStatus:
        """End without notifying clients: they wait for the server to return."""
        self._ports.sink.emit(RunEnded(status=RunStatus.STOPPED, reason=reason))
        return RunStatus.STOPPED

    def _run(self) -> str:
        ports, state = self._ports, self._ports.checkpoints.load()
        if state is not None and state.refits:  # the run was extended since
            self._plan = self._plan.after(state.refits)
        plan = self._plan
        # A simulated round restarts from its beginning, and ends the same at the same virtual time.
        opened = ports.checkpoints.load_open_round() if ports.virtual is None else None
        is_new = state is None and opened is None
        if state is not None and state.round >= plan.num_rounds and not self._is_to_close(state):
            return f"{counted(state.round - len(state.refits), 'round')} already done"
        if state is not None and ports.virtual is not None:
            ports.virtual.resume(state)
        catalogue = plan.catalogue or self._gather_catalogue()
        next_round = plan.first_round if state is None else state.round + 1
        catalogue = in_open_round(catalogue, opened, next_round=next_round)
        self._keep_catalogue(catalogue)  # also a given one: its file may be edited during the run
        model = self._build_model(catalogue)
        algorithm = self._algorithm.for_model(model.layout, model.head)
        if state is None:
            if model.loaded is not None:
                ports.sink.emit(model.loaded)
            state = ServerState(
                round=plan.first_round - 1, model=ModelState(params=model.initial), classes=catalogue.names_digest
            )
        else:
            state = grown_server(
                state, catalogue, model, algorithm, run_id=plan.run_id, is_gathered=plan.catalogue is None
            )  # fmt: skip
        if state.model.params.numel() != model.layout.num_shared:
            raise RunError(
                f"the checkpoint holds {state.model.params.numel():,} values, the model {model.layout.num_shared:,}: "
                "the run directory belongs to another configuration or version of FedShelf"
            )
        ports.sink.emit(
            RunStarted(
                run_id=plan.run_id, num_rounds=plan.num_rounds, first_round=state.round + 1,
                num_parameters=model.layout.num_parameters, num_classes=len(catalogue),
                min_clients=plan.start_clients if is_new else 0,
                num_test=model.num_test, num_test_left_out=model.num_test_left_out,
                catalogue_digest=catalogue.digest, config_digest=plan.config_digest, note=model.note,
            )
        )  # fmt: skip
        self._membership.resume(state)
        setup = setup_of(plan, catalogue, model.layout, model.frozen)
        self._membership.open(setup, catalogue_digest=catalogue.digest, config_digest=plan.config_digest)
        context = Context(
            plan=plan, ports=ports, algorithm=algorithm, model=model, catalogue=catalogue,
            membership=self._membership, inbox=self._inbox, downloads=Downloads(plan.downloads, model.layout),
        )  # fmt: skip
        state = replace(state, model=context.downloads.start(state.model))
        state, context, ended = self._run_rounds(state, opened, context)
        if self._is_to_compare(state):
            ports.sink.emit(ModelComparison(context).run(state))
            ports.checkpoints.save(replace(state, compared=state.round), is_best=False)
        return ended

    def _gather_catalogue(self) -> Catalogue:
        """Wait for enough clients to join, and resolve the products.

        An unusual catalogue waits for its confirmation, for another start of the server or for other clients: a wrong
        or hostile client can hold the run up here, but not shape or end it.
        """
        needed, members = self._plan.start_clients, self._membership
        while True:
            self._inbox.wait(lambda: members.num_joined() >= needed, f"{counted(needed, 'client')} to start")
            joins = members.classes()
            catalogue = Catalogue.resolve(joins, self._plan.aliases)
            unusual = "" if self._plan.confirmed or self._ports.virtual else catalogue.unusual(joins)
            if not unusual:
                break
            logger.warning(
                "the catalogue is not frozen, because %s. If that is right, start the server again with "
                "--confirm-catalogue; otherwise stop that store, or give the products with --catalogue FILE",
                printable(unusual),
            )
            self._inbox.wait(partial(self._have_classes_changed, joins), "--confirm-catalogue, or other clients")
        for doubt in federation_doubts(joins, catalogue):
            logger.warning(doubt)
        return catalogue

    def _have_classes_changed(self, since: Mapping[str, Sequence[ClassFolder]]) -> bool:
        return self._membership.classes() != since

    def _run_rounds(
        self, state: ServerState, opened: OpenRound | None, context: Context
    ) -> tuple[ServerState, Context, str]:  # fmt: skip
        """Run all rounds after `state`, first the one that is `opened`.

        Returns:
            The last state, its context, and why the run ended.
        """
        if state.round < 0:
            state, opened = self._closed_form_round(state, opened, context), None
        before = state.round
        state, context, ended = self._training_rounds(state, opened, context)
        if self._plan.refit_head and not state.is_refitted:
            opened = opened if state.round == before else None  # whose clients are still expected to return
            state = self._closed_form_round(state, opened, replace(context, closes=True))
            ended += ", and the output layer computed anew"
        return state, context, ended

    def _training_rounds(
        self, state: ServerState, opened: OpenRound | None, context: Context
    ) -> tuple[ServerState, Context, str]:  # fmt: skip
        """Run the rounds of the run's algorithm."""
        plan, rounds = self._plan, self._rounds(context)
        rounds.resume(state, opened)
        while state.round < plan.num_rounds:
            if plan.early_stopping.exhausted(state.round, state.best):
                return state, context, plan.early_stopping.why_stopped(state.best)
            if plan.early_stopping.patience and state.is_refitted:
                return state, context, "stopped early, and the output layer computed anew, before this start"
            state, record, live = rounds.next(state)
            state = self._finish_round(_seen(state, live), record, rounds, context)
            changed = self._changed_catalogue() if state.round < plan.num_rounds else None
            if changed is not None:
                state, context = self._under(changed, state, context)
                rounds = self._rounds(context)
                rounds.resume(state, None)
                self._reopen(context)
        return state, context, f"{counted(plan.num_rounds - len(state.refits), 'round')} done"

    def _rounds(self, context: Context) -> Rounds:
        algorithm = self._algorithm
        return BufferedRounds(context, algorithm) if isinstance(algorithm, Asynchronous) else SynchronousRounds(context)

    def _under(self, catalogue: Catalogue, state: ServerState, context: Context) -> tuple[ServerState, Context]:
        """The state and the context for a catalogue that has changed between two rounds."""
        plan, ports, added = self._plan, self._ports, catalogue.names[len(context.catalogue) :]
        if added:
            model = self._build_model(catalogue)
            algorithm = self._algorithm.for_model(model.layout, model.head)
            state = grown_server(state, catalogue, model, algorithm, run_id=plan.run_id)
            downloads = Downloads(plan.downloads, model.layout)
        else:
            model, algorithm, downloads = context.model, context.algorithm, context.downloads
        ports.sink.emit(
            CatalogueChanged(
                round=state.round,
                num_classes=len(catalogue),
                num_parameters=model.layout.num_parameters,
                catalogue_digest=catalogue.digest,
                added=added,
            )
        )
        context = Context(
            plan=plan, ports=ports, algorithm=algorithm, model=model, catalogue=catalogue,
            membership=self._membership, inbox=self._inbox, downloads=downloads,
        )  # fmt: skip
        return state, context

    def _reopen(self, context: Context) -> None:
        """Set the clients up again."""
        setup = setup_of(self._plan, context.catalogue, context.model.layout, context.model.frozen)
        self._membership.reopen(
            setup, catalogue_digest=context.catalogue.digest, seconds=self._plan.rounds.rejoin_grace
        )  # fmt: skip

    def _closed_form_round(self, state: ServerState, opened: OpenRound | None, context: Context) -> ServerState:
        """Run a round that computes the output layer in closed form; the run's algorithm keeps its own state."""
        if self._plan.closed_form is None:
            raise ValueError("a round in closed form needs an algorithm")
        algorithm = self._plan.closed_form.for_model(context.model.layout, context.model.head)
        context, optimizer = replace(context, algorithm=algorithm, closed_form=True), state.model.optimizer
        rounds = SynchronousRounds(context)
        rounds.resume(state, opened)
        state, record, live = rounds.next(replace(state, model=replace(state.model, optimizer={})))
        state = _seen(replace(state, model=replace(state.model, optimizer=optimizer)), live)
        if context.closes:
            state = replace(state, refits=(*state.refits, state.round))
        return self._finish_round(state, record, rounds, context)

    def _is_to_close(self, state: ServerState) -> bool:
        """Whether something remains to be done after the last round."""
        return self._is_to_compare(state) or (self._plan.refit_head and not state.is_refitted)

    def _is_to_compare(self, state: ServerState) -> bool:
        """Whether stores have yet to compare models after the current round."""
        return self._plan.compares and state.compared != state.round

    def _finish_round(
        self, state: ServerState, record: RoundFinished, rounds: Rounds, context: Context
    ) -> ServerState:  # fmt: skip
        model = context.model
        best = self._plan.early_stopping.better(record, state.best)
        is_best = best is not None and best.round == record.round
        state = replace(state, best=best, suspended=self._membership.suspended())
        digest = name_of(state.model.published)
        names = (member.client for member in record.clients if member.status is ClientStatus.COUNTED)
        withdrawn = [name for name in names if state.photos.get(name) == 0]
        record = replace(record, clients=tuple(map(partial(_or_withdrawn, withdrawn), record.clients)))
        record = replace(record, best_round=best.round if best else None, model_digest=digest)
        if self._ports.virtual is not None:  # includes the time of void attempts
            record = replace(record, virtual_seconds=self._ports.virtual.now() - state.virtual_seconds)
            state = self._ports.virtual.snapshot(state)
        last = context.is_last(record.round, best)
        if last:
            report = product_report(context, state, rounds.evaluations(), rounds.held_out(), rounds.summed())
            record = replace(record, report=report)
        if is_best:
            model.publish(state.model.published, record, True)
        if last:
            model.publish(state.model.published, record, False)
        # Write the record before the checkpoint: a crash in between repeats the round and replaces the record. The
        # other order could leave a finished round without its record.
        self._ports.sink.emit(record)
        self._ports.checkpoints.save(state, is_best=is_best, alone=bool(withdrawn))
        self._membership.note_photos(state.photos)
        if self._plan.noisy_mean is not None:
            self._ports.checkpoints.forget_noise_key()
        self._ports.spool.clear()  # keep updates of single stores no longer than needed
        for name in withdrawn:
            self._membership.release(name, record.round)
        return state


def _or_withdrawn(withdrawn: Collection[str], member: Participation) -> Participation:
    """A member's part in a round, which may have been to take its photos out of the model."""
    if member.client not in withdrawn:
        return member
    return replace(member, status=ClientStatus.WITHDRAWN, reason="its photos are no longer in the model")


def _seen(state: ServerState, live: Sequence[str]) -> ServerState:
    """Count the round in `times_live` of the `live` clients."""
    return replace(state, times_live={**state.times_live, **{n: state.times_live.get(n, 0) + 1 for n in live}})
