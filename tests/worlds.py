"""A small federation for tests of the rounds: real client and server code, a linear model, photos of 4 px."""

import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedshelf.algorithms.base import Aggregate, Algorithm, Asynchronous
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.reduce import Aggregator
from fedshelf.app.components import aggregator_of, personalization_of
from fedshelf.compression.download import MemoryHeldModel
from fedshelf.config.schema import RunConfig
from fedshelf.core.events import RoundFinished, RunStatus
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Broadcast,
    ClassFolder,
    ClientMessage,
    Comparison,
    Join,
    Ready,
    ServerMessage,
    Setup,
    Upload,
)
from fedshelf.core.rng import Rng
from fedshelf.core.state import ClientState, ModelState
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_set import PhotoSet
from fedshelf.identity.keys import KeyPair
from fedshelf.personalization.base import NONE, Personalization
from fedshelf.personalization.model_selection import ModelSelection
from fedshelf.privacy.client_dp import ClippedAtClient
from fedshelf.privacy.distributed_dp import NoiseShares
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.privacy.secure_aggregation.keys import Identities
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum
from fedshelf.rounds.client import Client, Work
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.plan import GlobalModel, Plan, Ports, RoundSettings
from fedshelf.rounds.server import Server
from fedshelf.rounds.sums.encrypting_client import EncryptingClient, EncryptionTerms
from fedshelf.rounds.sums.masking_client import MaskingClient, MaskingTerms
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.storage.spool import MemorySpool
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.device import Compute
from fedshelf.training.trainer import Score, Trainer
from tests.fakes import Answer, FakeCheckpoints, FakeClock, FakePeer, FakeTransport, MemoryClientStates, RecordingSink

CLASSES = ("apple", "milk", "tea")
SIZE = 4
PLAIN = TrainingSettings(
    momentum=0.0, weight_decay=0.0, label_smoothing=0.0, gradient_clip=0.0, batch_size=4, local_epochs=1,
    augmentation=None,
)  # fmt: skip


def photos(seed: int, count: int, *, size: int = SIZE, classes: int = len(CLASSES)) -> PhotoSet:
    """Random photos; a class is a tint, so that there is something to learn."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, count)
    images = draw.integers(0, 160, (count, size, size, 3))
    images[np.arange(count), :, :, labels % 3] += 90
    return PhotoSet(images.astype(np.uint8), labels.astype(np.int64))


def linear(num_classes: int = len(CLASSES)) -> nn.Module:
    """The smallest model with something to learn; no batch statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, num_classes))


def with_batch_norm(num_classes: int = len(CLASSES)) -> nn.Module:
    """A convolution with batch normalization: weights to lay out channels_last, and statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * SIZE * SIZE, num_classes),
        )  # fmt: skip


def bound_model(
    module: nn.Module | None = None, settings: TrainingSettings = PLAIN, personalization: Personalization = NONE
) -> BoundModel:  # fmt: skip
    compute = Compute(device=torch.device("cpu"), autocast=False)
    made = module if module is not None else linear()
    return BoundModel.of(
        made, compute=compute, settings=settings, personal_names=personalization.personal_names(made)
    )  # fmt: skip


def trainer(
    name: str = "a", *, bench: BoundModel | None = None, train: PhotoSet | None = None, size: int = SIZE
) -> Trainer:  # fmt: skip
    number = int.from_bytes(name.encode(), "big") % 1000
    return Trainer(
        bound_model=bench or bound_model(), client=name, rng=Rng(0),
        train=train or photos(number, 6 + number % 5, size=size), validation=photos(number + 1, 4, size=size),
        num_classes=len(CLASSES),
    )  # fmt: skip


def personalization(name: str) -> Personalization:
    """The way of that name, with settings for small trainings."""
    settings: dict[str, Any] = {
        "fedrep_head_epochs": 1, "ditto_lambda": 0.5, "finetune_epochs": 2, "finetune_lr": 0.05,
    }  # fmt: skip
    return personalization_of(RunConfig(personalize=name, **settings))


def aggregator(name: str, *, trim: float = 0.25, norm_bound: float | None = None) -> Aggregator:
    """The rule of that name."""
    settings: dict[str, Any] = {"trim": trim, "norm_bound": norm_bound or "off"}
    return aggregator_of(RunConfig(aggregator=name, **settings))


@dataclass(frozen=True)
class Remembering(Algorithm):
    """An algorithm whose clients remember: each counted round adds to what the next one uploads."""

    auxiliary: tuple[str, ...] = ()

    def broadcast(self, state: ModelState, num_trainable: int) -> Mapping[str, Tensor]:
        return {}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        upload = trainer.upload(broadcast)
        memory = state.algorithm.get("memory", torch.zeros_like(upload.delta)) * 0.5 + upload.delta
        return replace(upload, vectors={**upload.vectors, "delta": memory}), ClientState(algorithm={"memory": memory})

    def weight(self, upload: Upload, staleness: int) -> float:
        return float(upload.weight)

    def server_update(self, state: ModelState, aggregate: Aggregate, population: int) -> ModelState:
        return replace(state, params=state.params + aggregate.delta)


class OpenedSums:
    """A client's record of the sums that it has opened, which outlives its process."""

    def __init__(self) -> None:
        self.found: list[OpenedSum] = []

    def known(self) -> list[OpenedSum]:
        return self.found

    def record(self, opened: OpenedSum) -> None:
        self.found.append(opened)


class Decryptors(dict[str, str]):
    """A client's record of which store decrypts, which outlives its process."""

    def known(self, run_id: str) -> str | None:
        return self.get(run_id)

    record = dict[str, str].__setitem__


Tamper = Callable[[ServerMessage, Answer], Answer]
"""Changes what an honest client would answer."""


@dataclass
class World:
    """Everything that outlives a server process: what it saved, and its clients, who stay up.

    Attributes:
        tampers: by client, what becomes of its honest answers.
        delays: by client, seconds until an answer arrives.
        paces: by client, seconds more for each step of a training; may change while a run goes on.
        order: draws the order of simultaneous arrivals.
        test_photos: what clients compare models on in the end; None: on their validation photos.
        withholding: clients that do not count by product.
        data: by client, its training and validation photos, if not random ones.
        withdrawing: clients that join to withdraw.
        score: tests models on the server's photos, if it has some.
        identities: by client, its identity keys; with them, messages of secure aggregation are signed.
        clip: scales uploads down at the clients.
        shares: of the clients' noise, under masks.
        kept: by client, what it chose in the end, and the values [P] of that model.
    """

    names: tuple[str, ...] = ("a", "b", "c")
    num_rounds: int = 2
    algorithm: Algorithm = field(default_factory=FedAvg)
    module: Callable[[], nn.Module] = linear
    training: TrainingSettings = PLAIN
    personalize: str = "none"
    plan: Mapping[str, Any] = field(default_factory=dict)
    rounds: Mapping[str, Any] = field(default_factory=dict)
    tampers: dict[str, Tamper] = field(default_factory=dict)
    delays: dict[str, float] = field(default_factory=dict)
    paces: dict[str, float] = field(default_factory=dict)
    order: random.Random | None = None
    photo_size: int = SIZE
    test_photos: PhotoSet | None = None
    withholding: tuple[str, ...] = ()
    data: dict[str, tuple[PhotoSet, PhotoSet]] = field(default_factory=dict)
    withdrawing: set[str] = field(default_factory=set)
    score: Callable[[Tensor], Score] | None = None
    identities: Mapping[str, KeyPair] = field(default_factory=dict)
    clip: ClippedAtClient | None = None
    shares: NoiseShares | None = None

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.sink = RecordingSink()
        self.checkpoints = FakeCheckpoints()
        self.spool = MemorySpool()
        self.stop = threading.Event()
        self.catalogue: Catalogue | None = None
        self.published: list[tuple[int, bool]] = []
        self.transport = FakeTransport(self.clock, self.order)
        self._trainers: dict[str, Trainer] = {}
        self.kept: dict[str, tuple[Comparison, Tensor]] = {}
        self.states = {name: MemoryClientStates() for name in self.names}
        self.held = {name: MemoryHeldModel() for name in self.names}
        self.clients = {name: self.client(name) for name in self.names}
        self.opened_sums = {name: OpenedSums() for name in self.names}
        self.decryptors = {name: Decryptors() for name in self.names}
        self.masking = {name: self.hiding_client(name) for name in self.names} if self.is_masked else {}

    @property
    def is_masked(self) -> bool:
        return self.plan_uploads.is_masked

    @property
    def plan_uploads(self) -> UploadPipeline:
        found: UploadPipeline = self.plan.get("uploads", UploadPipeline())
        return found

    def uploads_of(self, bench: BoundModel) -> UploadPipeline:
        layout = bench.params.layout
        return self.plan_uploads.of(self.algorithm.for_model(layout, bench.output_layer), layout)

    @property
    def personalization(self) -> Personalization:
        return personalization(self.personalize)

    def client(self, name: str) -> Client:
        """A client process of that name, on the state that it keeps."""
        bench = bound_model(self.module(), self.training, self.personalization)
        closed_form: Algorithm | None = self.plan.get("closed_form")

        def keep(bench: BoundModel, comparison: Comparison) -> None:
            self.kept[name] = comparison, bench.params.vector.clone()

        def prepare(setup: Setup) -> Work:
            uploads = self.uploads_of(bench)
            ready = Ready(
                run_id=setup.run_id, layout_digest=bench.params.layout.digest,
                catalogue_digest=Catalogue.from_json(setup.catalogue).digest, config_digest="digest",
                num_train=len(at_work.train), num_left_out=0,
                num_validation=None if uploads.is_encrypted else len(at_work.validation),
            )  # fmt: skip
            return Work(
                algorithm=self.algorithm.for_model(bench.params.layout, bench.output_layer), trainer=at_work,
                ready=ready, clip=self.clip, uploads=uploads, is_masked=self.is_masked,
                personalization=self.personalization,
                catalogue=Catalogue.from_json(setup.catalogue) if name not in self.withholding else None,
                closed_form=closed_form.for_model(bench.params.layout, bench.output_layer) if closed_form else None,
                model_selection=ModelSelection(client_lr=self.client_lr, test=lambda: self.test_photos, save=keep),
            )  # fmt: skip

        at_work = self._trainers[name] = replace(
            trainer(name, bench=bench, size=self.photo_size), phases=self.personalization.phases,
            renews=isinstance(self.algorithm, Asynchronous),
        )  # fmt: skip
        if name in self.data:
            train, validation = self.data[name]
            at_work = self._trainers[name] = replace(at_work, train=train, validation=validation)
        return Client(prepare=prepare, states=self.states[name], held=self.held[name])

    def trainer(self, name: str) -> Trainer:
        """What that client trains with."""
        return self._trainers[name]

    def client_lr(self, round: int) -> float:
        """The learning rate, at the server as at the clients."""
        chosen: Callable[[int], float] = self.plan.get("client_lr", lambda number: 0.1)
        return chosen(round)

    def peer(self, name: str, *, address: str = "") -> FakePeer:
        """The client `name` at the other end of a line."""

        steps = 0

        def answer(message: ServerMessage) -> Answer:
            nonlocal steps
            honest: Answer = self._handle(name, message)
            steps = honest.num_steps or 0 if isinstance(honest, Upload) else 0
            tamper = self.tampers.get(name)
            return tamper(message, honest) if tamper else honest

        return FakePeer(
            join=join(name, withdraws=name in self.withdrawing), answer=answer,
            delay=self.delays.get(name, 0.0), address=address, work=lambda: self.paces.get(name, 0.0) * steps,
        )  # fmt: skip

    def _handle(self, name: str, message: ServerMessage) -> ClientMessage:
        masking = self.masking.get(name)
        if masking is None:
            return self.clients[name].handle(message)
        answer = masking.before(message)
        if answer is not None:
            return answer
        plain = replace(message, masking="") if isinstance(message, Broadcast) else message
        return masking.after(message, self.clients[name].handle(plain))

    def restart_client(self, name: str) -> None:
        """The client's process is gone, with what it had in memory only."""
        self.clients[name] = self.client(name)
        if name in self.masking:
            self.masking[name] = self.hiding_client(name)

    def hiding_client(self, name: str) -> MaskingClient | EncryptingClient:
        """What masks or encrypts the uploads of `plan["uploads"]`, in a new process of the client."""
        bench = bound_model(self.module(), self.training, self.personalization)
        layout, uploads, closed_form = bench.params.layout, self.uploads_of(bench), self.plan.get("closed_form")
        if uploads.summand is None:
            raise ValueError("masks need uploads that are summed")
        if uploads.is_encrypted:
            encryption = self.plan["encryption"]
            form = EncryptedForm.of(encryption, uploads.summand, layout, bench.output_layer)
            encrypted = EncryptionTerms(
                run_id="run-1", config="digest", encryption=encryption, form=form,
                is_buffered=isinstance(self.algorithm, Asynchronous),
            )  # fmt: skip
            return EncryptingClient(
                partial(str, name), terms=lambda: encrypted, opened_sums=self.opened_sums[name],
                decryptors=self.decryptors[name],
            )  # fmt: skip
        terms = MaskingTerms(
            run_id="run-1", config="digest", threshold=self.plan.get("threshold"), encode=uploads.summand,
            layout=layout, tree=Catalogue(CLASSES, tuple((name,) for name in CLASSES)).tree,
            sends_sums=self.algorithm.counts_photos, noise=self.shares,
            closed_form=closed_form
            and uploads.of(closed_form.for_model(layout, bench.output_layer), layout).summand,
        )  # fmt: skip
        return MaskingClient(
            partial(str, name), terms=lambda: terms, opened_sums=self.opened_sums[name],
            identity=lambda: self.identities.get(name), identities=self._public,
        )  # fmt: skip

    def _public(self) -> Identities | None:
        return {name: keys.public for name, keys in self.identities.items()} or None

    def connect_all(self) -> None:
        for name in self.names:
            self.transport.connect(self.peer(name))

    def server(self) -> Server:
        """A server process on what was saved."""
        bench = bound_model(self.module(), self.training, self.personalization)
        rounds = {"timeout": 100.0, "quorum": 1, "max_examples": 1000, "rejoin_grace": 20.0, **self.rounds}
        plan: dict[str, Any] = {
            "run_id": "run-1", "num_rounds": self.num_rounds, "start_clients": len(self.names),
            "fraction": 1.0, "rng": Rng(5), "client_lr": self.client_lr, "rounds": RoundSettings(**rounds),
            "early_stopping": EarlyStopping(), "config": "", "config_digest": "digest",
            "catalogue": self.catalogue, **self.plan,
        }  # fmt: skip

        def keep(catalogue: Catalogue) -> None:
            self.catalogue = catalogue

        def publish(params: Tensor, record: RoundFinished, best: bool) -> None:
            self.published.append((record.round, best))

        def build(catalogue: Catalogue) -> GlobalModel:
            return GlobalModel(
                layout=bench.params.layout, initial=bench.params.shared.clone(), evaluate_on_server=self.score,
                publish=publish, head=bench.output_layer,
            )  # fmt: skip

        ports = Ports(
            transport=self.transport, checkpoints=self.checkpoints, spool=self.spool, sink=self.sink,
            clock=self.clock, stop=self.stop, identities=self._public,
        )  # fmt: skip
        return Server(
            plan=Plan(**plan), ports=ports, algorithm=self.algorithm, build_model=build, keep_catalogue=keep
        )  # fmt: skip

    def run(self) -> RunStatus:
        """One server process, all clients there from the start, to its end."""
        self.connect_all()
        return self.server().run()

    def run_connected(self, **plan: Any) -> RunStatus:
        """The same with the clients that are there already."""
        self.plan = {**self.plan, **plan}
        return self.server().run()

    def restart(self) -> None:
        """The server's process is gone with its lines; its clients connect to the next one."""
        self.transport = FakeTransport(self.clock, self.order)
        self.connect_all()

    @property
    def final(self) -> Tensor:
        """The newest saved model [S]."""
        return self.checkpoints.states[-1].model.published

    @property
    def finished(self) -> list[RoundFinished]:
        return self.sink.of(RoundFinished)


def join(name: str, *, withdraws: bool = False) -> Join:
    classes = () if withdraws else tuple(ClassFolder(leaf=label, path=label) for label in CLASSES)
    return Join(
        protocol=PROTOCOL_VERSION, version="0", client=name, classes=classes, withdraws=withdraws,
    )  # fmt: skip
