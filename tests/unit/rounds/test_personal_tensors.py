"""Personal tensors never leave their store, survive restarts, and forget rounds that were not counted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedshelf.core.errors import ModelError
from fedshelf.core.messages import Broadcast, Evaluation, Purpose, ServerMessage, TaskKey, Upload
from fedshelf.core.params import Segment
from fedshelf.core.state import ClientState
from fedshelf.models.resnet import resnet10
from fedshelf.personalization.base import PERSONAL
from fedshelf.storage.client_states import FileClientStates
from fedshelf.training.bound_model import BoundModel
from tests.fakes import Answer
from tests.worlds import Remembering, World, bound_model, linear, personalization, with_batch_norm

LAYERS: tuple[str, ...] = ("fedbn", "fedper", "fedrep")
METHODS: tuple[str, ...] = (*LAYERS, "ditto")


def test_fedbn_keeps_batch_norm_layers_by_their_type_whatever_they_are_called() -> None:
    module = nn.ModuleDict({"bn_lookalike": nn.Linear(2, 2), "middle": nn.BatchNorm1d(2), "end": nn.Linear(2, 2)})
    expected = {f"middle.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert names_of("fedbn", module) == expected


def test_fedbn_keeps_no_other_normalization_layers() -> None:
    module = nn.Sequential(nn.LayerNorm(2), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2, affine=True))
    assert {name.split(".")[0] for name in names_of("fedbn", module)} == {"1"}


def test_fedper_keeps_the_last_linear_layer() -> None:
    assert names_of("fedper", resnet10(5, width=8)) == {"head.weight", "head.bias"}
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.Softmax(1))
    assert names_of("fedper", module) == {"2.weight", "2.bias"}


def test_a_model_that_is_one_layer_is_named_as_it_names_itself() -> None:
    assert names_of("fedbn", nn.BatchNorm1d(2)) == {"weight", "bias", "running_mean", "running_var"}
    assert names_of("fedper", nn.Linear(2, 2)) == {"weight", "bias"}


def test_a_model_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="fedper and fedrep keep the last layer"):
        names_of("fedper", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def test_a_model_without_batch_norm_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="--norm batch"):
        names_of("fedbn", linear())


def names_of(method: str, module: nn.Module) -> frozenset[str]:
    return personalization(method).personal_names(module)


@pytest.mark.parametrize("method", LAYERS)
def test_what_travels_is_the_shared_part_alone(method: str) -> None:
    world = World(module=with_batch_norm, personalize=method, num_rounds=3)
    sent: list[int] = []

    def note(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(message, Broadcast):
            sent.append(len(message.params))
        if isinstance(answer, Upload):
            sent.append(len(answer.delta))
        return answer

    world.tampers = dict.fromkeys(world.names, note)
    world.run()
    layout = world.trainer("a").bound_model.params.layout
    assert set(sent) == {layout.num_shared}
    assert layout.num_shared < layout.size
    personal = {t.name for t in layout.tensors if t.segment is Segment.PERSONAL}
    assert personal == names_of(method, with_batch_norm())


@pytest.mark.parametrize("method", METHODS)
class TestInRounds:
    def test_each_store_trains_its_own_on_from_round_to_round(self, method: str) -> None:
        world = World(module=with_batch_norm, personalize=method, num_rounds=1)
        world.run()
        first = {name: own(world, name) for name in world.names}
        assert not torch.equal(first["a"], first["b"])
        start = world.trainer("a").bound_model.initial_personal
        assert all(not torch.equal(vector, start) for vector in first.values())
        world.num_rounds = 2
        begun: dict[str, Tensor] = {}

        def note(message: ServerMessage, answer: Answer) -> Answer:
            if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN and message.key.round == 2:
                begun["counted"] = world.states["a"].commit_or_rollback(message).personalization[PERSONAL]
            return answer

        world.tampers["a"] = note
        world.restart()
        world.server().run()
        assert torch.equal(begun["counted"], first["a"])
        assert not torch.equal(own(world, "a"), first["a"])

    def test_a_refused_upload_leaves_no_trace(self, method: str) -> None:
        trained: dict[int, Tensor] = {}
        begun: dict[int, Tensor] = {}
        world = World(module=with_batch_norm, personalize=method, num_rounds=3)

        def damage(message: ServerMessage, answer: Answer) -> Answer:
            if not (isinstance(message, Broadcast) and isinstance(answer, Upload)):
                return answer
            number = message.key.round
            begun[number] = world.states["b"].commit_or_rollback(message).personalization.get(PERSONAL, torch.zeros(0))
            trained[number] = own(world, "b", number)
            return (
                replace(answer, vectors={**answer.vectors, "delta": answer.delta * float("nan")})
                if number == 2
                else answer
            )

        world.tampers["b"] = damage
        world.run()
        assert [str(next(m.status for m in r.clients if m.client == "b")) for r in world.finished][1] == "refused"
        assert not torch.equal(trained[2], trained[1])
        assert torch.equal(begun[3], trained[1])

    def test_evaluation_is_of_the_model_that_the_store_would_use(self, method: str) -> None:
        """The shared part after the round, the store's own as its upload of that round left it."""
        world = World(module=with_batch_norm, personalize=method, num_rounds=1)
        answered: list[Evaluation] = []

        def note(message: ServerMessage, answer: Answer) -> Answer:
            answered.extend([answer] if isinstance(answer, Evaluation) else [])
            return answer

        world.tampers["a"] = note
        world.run()
        bench = world.trainer("a").bound_model
        make_own(bench, world.final, own(world, "a"))
        score = world.trainer("a").evaluate()
        assert [(found.num_correct, found.loss_sum) for found in answered] == [(score.num_correct, score.loss_sum)]
        bench.load(world.final)
        bench.params.personal.copy_(bench.initial_personal)
        assert world.trainer("a").evaluate().loss_sum != score.loss_sum, "or the test shows nothing"

    def test_training_begins_with_what_the_store_had_made_its_own(self, method: str) -> None:
        """By hand, from the second round's broadcast and what the first had left at the store."""
        world = World(module=with_batch_norm, personalize=method, num_rounds=1)
        world.run()
        before = own(world, "a")
        world.num_rounds = 2
        world.restart()
        world.server().run()
        broadcast = next(
            m for m in world.transport.broadcasts("line-to-a") if m.key.round == 2 and m.purpose is Purpose.TRAIN
        )
        at_work = world.trainer("a")
        make_own(at_work.bound_model, broadcast.params, before)
        if method == "ditto":  # held near the global model, in an order of photos of its own
            anchor = broadcast.params[: at_work.bound_model.params.layout.num_trainable]

            def pull(gradient: Tensor, values: Tensor) -> None:
                gradient.add_(values - anchor, alpha=0.5)

            at_work.fit(round=2, client_lr=0.1, part="-ditto", gradient_hook=pull)
        else:
            at_work.fit(round=2, client_lr=0.1)
        params = at_work.bound_model.params
        assert torch.equal(params.shared if method == "ditto" else params.personal, own(world, "a"))

    def test_what_the_algorithm_keeps_is_kept_beside_it(self, method: str) -> None:
        world = World(module=with_batch_norm, personalize=method, num_rounds=2, algorithm=Remembering())
        uploads: list[Upload] = []

        def note(message: ServerMessage, answer: Answer) -> Answer:
            uploads.extend([answer] if isinstance(answer, Upload) else [])
            return answer

        world.tampers["a"] = note
        world.run()
        kept = world.states["a"].peek(key_of(world))
        assert (set(kept.algorithm), set(kept.personalization)) == ({"memory"}, {PERSONAL})
        assert torch.equal(kept.algorithm["memory"], uploads[-1].delta)

    def test_personal_tensors_survive_the_clients_process(self, method: str, tmp_path: Path) -> None:
        whole = World(module=with_batch_norm, personalize=method, num_rounds=4)
        whole.run()
        broken = World(module=with_batch_norm, personalize=method, num_rounds=2)
        for name in broken.names:
            broken.states[name] = FileClientStates(tmp_path / name)  # type: ignore[assignment]
            broken.clients[name] = broken.client(name)
        broken.run()
        broken.num_rounds = 4
        for name in broken.names:
            broken.states[name] = FileClientStates(tmp_path / name)  # type: ignore[assignment]
            broken.clients[name] = broken.client(name)
        broken.restart()
        broken.server().run()
        assert torch.equal(broken.final, whole.final)
        for name in whole.names:
            assert torch.equal(own(broken, name), own(whole, name))


def test_a_store_without_a_state_begins_with_the_models_own_first_values() -> None:
    """Whoever was on the bench before: in a simulation stores share one."""
    layers = personalization("fedper")
    bench = bound_model(with_batch_norm(), personalization=layers)
    first = bench.params.personal.clone()
    bench.params.personal.add_(1.0)
    layers.apply(bench, ClientState())
    assert torch.equal(bench.params.personal, first)


def test_where_nothing_is_personal_nothing_is_kept() -> None:
    """A client has then nothing to write down and to sync to its disk."""
    world = World(module=with_batch_norm)
    world.run()
    assert all(not states.peek(key_of(world)).personalization for states in world.states.values())


def make_own(bench: BoundModel, shared: Tensor, personal: Tensor) -> None:
    """Put the store's own model on its bench: a whole one in place of the global one, or the part that it lacks."""
    bench.load(shared)
    (bench.params.personal if len(bench.params.personal) else bench.params.shared).copy_(personal)


def own(world: World, name: str, round: int | None = None) -> Tensor:
    """What the client had kept for itself after `round` (the newest)."""
    key = key_of(world) if round is None else TaskKey(run_id="run-1", round=round, attempt=0)
    return world.states[name].peek(key).personalization[PERSONAL]


def key_of(world: World) -> TaskKey:
    """The newest round's key."""
    return TaskKey(run_id="run-1", round=world.finished[-1].round, attempt=0)
