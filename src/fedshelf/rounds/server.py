"""A run from its first client to its last round, on ports only."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedshelf.algorithms.base import Algorithm, Asynchronous
from fedshelf.algorithms.reduce import MEAN, Aggregator
from fedshelf.core.choices import SamplingName
from fedshelf.core.errors import FedShelfError, RunError
from fedshelf.core.events import RoundFinished, RoundVoid, RunEnded, RunStarted, RunStatus
from fedshelf.core.messages import Setup, TaskKey
from fedshelf.core.params import Layout
from fedshelf.core.ports import Checkpoints, Clock, MetricSink, Spool, Timeline, Transport
from fedshelf.core.rng import Rng
from fedshelf.core.state import OpenRound, ServerState
from fedshelf.data.catalogue import Catalogue
from fedshelf.rounds import cohort as cohorts
from fedshelf.rounds.asking import Asker
from fedshelf.rounds.buffered import BufferedRounds, BufferedSettings
from fedshelf.rounds.central import CentralTest
from fedshelf.rounds.coding import Coding
from fedshelf.rounds.comparison import Comparing
from fedshelf.rounds.download import Downloads
from fedshelf.rounds.membership import Membership
from fedshelf.rounds.orders import UNPACED, Pacing
from fedshelf.rounds.pace import predicted
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.reception import POLL_SECONDS, Reception, StopRequested
from fedshelf.rounds.selection import Selection
from fedshelf.rounds.synchronous import RoundSettings, SynchronousRound
from fedshelf.training.trainer import Score

log = logging.getLogger(__name__)

MAX_VOID_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GlobalModel:
    """The model that a catalogue leads to: its layout, its first values [S], how it is tested and written out."""

    layout: Layout
    initial: Tensor
    evaluate_centrally: Callable[[Tensor], Score] | None
    publish: Callable[[Tensor, RoundFinished, bool], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """What a run is to do.

    It starts with `start_clients`; a round has at least `min_clients`. `client_lr` maps a round to its learning rate;
    `config` is what clients are sent; `uploads` and `downloads` say how vectors travel, `aggregator` how uploads become
    one, `pacing` what is made of machines that differ; where it `compares`, stores tell in the end which model serves them
    best.
    """

    run_id: str
    num_rounds: int
    start_clients: int
    min_clients: int
    fraction: float
    rng: Rng
    client_lr: Callable[[int], float]
    rounds: RoundSettings
    selection: Selection
    config: str
    config_digest: str
    catalogue: Catalogue | None
    uploads: UploadPipeline = field(default_factory=UploadPipeline)
    downloads: Coding = field(default_factory=Coding)
    sampling: SamplingName = "uniform"
    aggregator: Aggregator = MEAN
    max_staleness: int | None = None
    test_every: int = 1
    pacing: Pacing = UNPACED
    compares: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ports:
    """The world, as this run sees it. Deadlines go by `virtual`, the clock of a simulation, where there is one; what
    took how long, by `clock`."""

    transport: Transport
    checkpoints: Checkpoints
    spool: Spool
    sink: MetricSink
    clock: Clock
    stop: threading.Event
    virtual: Timeline | None = None


def setup_of(plan: Plan, catalogue: Catalogue, layout: Layout) -> Setup:
    """What clients are told before their first round."""
    return Setup(run_id=plan.run_id, config=plan.config, catalogue=catalogue.to_json(), layout_digest=layout.digest)


class Server:
    """Gathers clients, freezes the catalogue, runs rounds until the last, and survives its own death in between.

    Args:
        build_model: makes the global model once the catalogue is known.
        keep_catalogue: writes the frozen catalogue down, before anybody trains on it.
    """

    def __init__(
        self, *, plan: Plan, ports: Ports, algorithm: Algorithm, build_model: Callable[[Catalogue], GlobalModel],
        keep_catalogue: Callable[[Catalogue], None],
    ) -> None:  # fmt: skip
        self._plan = plan
        self._ports = ports
        self._algorithm = algorithm
        self._build_model = build_model
        self._keep_catalogue = keep_catalogue
        self._membership = Membership(transport=ports.transport, sink=ports.sink, clock=ports.clock)
        self._reception = Reception(
            transport=ports.transport, membership=self._membership, sink=ports.sink, stop=ports.stop
        )

    def run(self) -> RunStatus:
        """Run to the end (or a request to stop) and return how it ended.

        Raises:
            FedShelfError: the run failed; everything up to the last finished round is kept.
        """
        sink, transport = self._ports.sink, self._ports.transport
        try:
            reason = self._run()
        except StopRequested as stopped:
            sink.emit(RunEnded(status=RunStatus.STOPPED, reason=str(stopped)))
            return RunStatus.STOPPED  # clients are not told: they wait for the server to come back
        except FedShelfError as error:
            sink.emit(RunEnded(status=RunStatus.FAILED, reason=str(error)))
            transport.close(f"the run failed: {error}")
            raise
        sink.emit(RunEnded(status=RunStatus.FINISHED, reason=reason))
        transport.close("the run is finished")
        return RunStatus.FINISHED

    def _run(self) -> str:
        plan, ports = self._plan, self._ports
        state = ports.checkpoints.load()
        if state is not None and state.round >= plan.num_rounds and not self._is_to_compare(state):
            return f"{state.round} rounds were done before"
        if state is not None and ports.virtual is not None:
            ports.virtual.resume(state)
        catalogue = plan.catalogue or self._gather_catalogue()
        self._keep_catalogue(catalogue)  # one that was given, too: its file may be edited while the run goes on
        model = self._build_model(catalogue)
        if state is None:
            state = ServerState(round=0, params=model.initial)
        elif state.params.numel() != model.layout.num_shared:
            raise RunError(
                f"the checkpoint holds {state.params.numel():,} values, the model {model.layout.num_shared:,}: the run "
                "directory belongs to another configuration or version of FedShelf"
            )
        ports.sink.emit(
            RunStarted(
                run_id=plan.run_id, num_rounds=plan.num_rounds, first_round=state.round + 1,
                num_parameters=model.layout.num_parameters, num_classes=len(catalogue), min_clients=plan.start_clients,
            )
        )  # fmt: skip
        setup = setup_of(plan, catalogue, model.layout)
        self._membership.open(setup, catalogue_digest=catalogue.digest, config_digest=plan.config_digest)
        downloads = Downloads(plan.downloads, model.layout)
        run = self._run_buffered if isinstance(self._algorithm, Asynchronous) else self._run_rounds
        state, ended = run(downloads.start(state), model, downloads)
        self._compare(state, model, downloads)
        return ended

    def _gather_catalogue(self) -> Catalogue:
        """Wait for enough clients to join, and settle which products there are."""
        log.info("waiting for %d clients to join", self._plan.start_clients)
        while self._membership.num_joined() < self._plan.start_clients:
            self._reception.poll(POLL_SECONDS)
        return Catalogue.resolve(self._membership.classes())

    def _run_rounds(self, state: ServerState, model: GlobalModel, downloads: Downloads) -> tuple[ServerState, str]:
        """The state after the last round, and why it was the last."""
        plan, ports = self._plan, self._ports
        opened = self._load_open_round()
        self._membership.expect(opened.live if opened else (), plan.rounds.rejoin_grace)
        single = SynchronousRound(
            algorithm=self._algorithm, layout=model.layout, settings=plan.rounds, transport=ports.transport,
            membership=self._membership, reception=self._reception, spool=ports.spool, sink=ports.sink,
            clock=ports.clock, uploads=plan.uploads, downloads=downloads, test=self._central_test(model),
            aggregator=plan.aggregator, virtual=ports.virtual, pacing=plan.pacing,
        )  # fmt: skip
        attempt = void_in_a_row = 0
        while state.round < plan.num_rounds:
            if plan.selection.exhausted(state.round, state.best):
                return state, plan.selection.why_stopped(state.best)
            if opened is None or opened.key.round != state.round + 1 or opened.key.attempt < attempt:
                opened = self._open_round(state, attempt)
            attempt = opened.key.attempt
            state, outcome = single.run(state, opened, plan.client_lr(opened.key.round))
            if isinstance(outcome, RoundVoid):
                state, attempt, void_in_a_row = self._void(state, outcome, void_in_a_row)
                continue
            attempt = void_in_a_row = 0
            state = self._finish_round(_seen(state, opened.live), outcome, model)
        return state, f"all {plan.num_rounds} rounds are done"

    def _run_buffered(self, state: ServerState, model: GlobalModel, downloads: Downloads) -> tuple[ServerState, str]:
        """The same in asynchronous rounds."""
        plan, ports = self._plan, self._ports
        opened = self._load_open_round()
        self._membership.expect(opened.live if opened else (), plan.rounds.rejoin_grace)
        buffered = BufferedRounds(
            algorithm=self._algorithm, layout=model.layout, rng=plan.rng, transport=ports.transport,
            membership=self._membership, reception=self._reception, spool=ports.spool, checkpoints=ports.checkpoints,
            sink=ports.sink, clock=ports.clock, uploads=plan.uploads, downloads=downloads,
            test=self._central_test(model), aggregator=plan.aggregator, virtual=ports.virtual,
            settings=BufferedSettings(
                run_id=plan.run_id, start_clients=plan.start_clients, min_clients=plan.min_clients,
                fraction=plan.fraction, sampling=plan.sampling, timeout=plan.rounds.timeout,
                max_examples=plan.rounds.max_examples, max_staleness=plan.max_staleness,
            ),
        )  # fmt: skip
        buffered.resume(state)
        while state.round < plan.num_rounds:
            if plan.selection.exhausted(state.round, state.best):
                return state, plan.selection.why_stopped(state.best)
            updated, record = buffered.run(state, plan.client_lr)
            live = self._membership.live()
            state = self._finish_round(_seen(updated, live), record, model)
            key = TaskKey(run_id=plan.run_id, round=state.round + 1, attempt=0)
            ports.checkpoints.save_open_round(OpenRound(key=key, cohort=(), live=live))
        return state, f"all {plan.num_rounds} rounds are done"

    def _is_to_compare(self, state: ServerState) -> bool:
        return self._plan.compares and state.compared != state.round

    def _compare(self, state: ServerState, model: GlobalModel, downloads: Downloads) -> None:
        """Let the stores compare what they can choose among, unless they have done so after this very round."""
        if not self._is_to_compare(state):
            return
        plan, ports = self._plan, self._ports
        asker = Asker(
            transport=ports.transport, membership=self._membership, reception=self._reception, downloads=downloads,
            sink=ports.sink, timer=ports.virtual or ports.clock,
        )  # fmt: skip
        comparing = Comparing(
            run_id=plan.run_id, asker=asker, round_timeout=plan.rounds.timeout, rejoin_grace=plan.rounds.rejoin_grace
        )  # fmt: skip
        ports.sink.emit(comparing.run(state, model.initial))
        ports.checkpoints.save(replace(state, compared=state.round), is_best=False)

    def _central_test(self, model: GlobalModel) -> CentralTest:
        return CentralTest(
            evaluate=model.evaluate_centrally, every=self._plan.test_every, last=self._plan.num_rounds
        )  # fmt: skip

    def _open_round(self, state: ServerState, attempt: int) -> OpenRound:
        """Wait until enough clients are live, draw the cohort, and write it down before anybody is asked."""
        plan, number = self._plan, state.round + 1
        needed = plan.start_clients if number == 1 else plan.min_clients
        if self._membership.num_live() < needed:
            log.info("round %d waits until %d clients are live", number, needed)
        while self._membership.num_live() < needed or self._membership.returning() or self._is_unsettled():
            self._reception.poll(POLL_SECONDS)
        live = self._membership.live()
        count = cohorts.size(len(live), fraction=plan.fraction, min_clients=plan.min_clients)
        rng = plan.rng.fork(round=number, purpose=f"cohort-{attempt}")
        key = TaskKey(run_id=plan.run_id, round=number, attempt=attempt)
        num_train = {name: min(self._membership.num_train(name), plan.rounds.max_examples) for name in live}
        weights = cohorts.sampling_weights(
            plan.sampling, live, num_train=num_train, times_live=state.times_live, round=number
        )
        asked = cohorts.over_selected(count, len(live), plan.pacing.over_selection)
        cohort = cohorts.draw(live, asked, rng, weights)
        num_steps = plan.pacing.configured({name: num_train[name] for name in cohort})
        opened = OpenRound(
            key=key, cohort=cohort, live=live, wanted=count, num_steps=num_steps, pace=predicted(state.pace, num_steps)
        )
        self._ports.spool.clear()
        self._ports.checkpoints.save_open_round(opened)
        return opened

    def _load_open_round(self) -> OpenRound | None:
        """The round that a server before this one was in. A simulated one begins again, and so comes to the same end at
        the same virtual time."""
        return self._ports.checkpoints.load_open_round() if self._ports.virtual is None else None

    def _is_unsettled(self) -> bool:
        """Whether, in a simulation, somebody comes or goes at this very moment: the cohort is drawn after that."""
        return self._ports.virtual is not None and not self._ports.virtual.is_settled()

    def _void(self, state: ServerState, outcome: RoundVoid, in_a_row: int) -> tuple[ServerState, int, int]:
        """Record a void attempt and return the state, the next attempt and how many were void in a row."""
        self._ports.sink.emit(outcome)
        if in_a_row + 1 >= MAX_VOID_IN_A_ROW:
            raise RunError(
                f"round {outcome.round} was void {in_a_row + 1} times in a row, last because {outcome.reason}; "
                "give clients more time (--round-timeout), ask for fewer (--quorum), and start the server again"
            )
        return replace(state, void_rounds=state.void_rounds + 1), outcome.attempt + 1, in_a_row + 1

    def _finish_round(self, state: ServerState, record: RoundFinished, model: GlobalModel) -> ServerState:
        best = self._plan.selection.better(record, state.best)
        is_best = best is not None and best.round == record.round
        state = replace(state, best=best)
        record = replace(record, best_round=best.round if best else None)
        if self._ports.virtual is not None:  # attempts that were void took time, too
            record = replace(record, virtual_seconds=self._ports.virtual.now() - state.virtual_seconds)
            state = self._ports.virtual.note(state)
        if is_best:
            model.publish(state.model, record, True)
        last = record.round == self._plan.num_rounds or self._plan.selection.exhausted(record.round, best)
        if last:
            model.publish(state.model, record, False)
        # The record comes before the checkpoint: a crash in between repeats the round, and the same record replaces
        # this one; the other order could leave a finished round without its record.
        self._ports.sink.emit(record)
        self._ports.checkpoints.save(state, is_best=is_best)
        self._ports.spool.clear()  # single stores' updates are kept no longer than they are needed
        return state


def _seen(state: ServerState, live: Sequence[str]) -> ServerState:
    """`state` after a round for which `live` were there."""
    return replace(state, times_live={**state.times_live, **{n: state.times_live.get(n, 0) + 1 for n in live}})
