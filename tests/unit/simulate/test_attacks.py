"""`--attack`: what simulated attackers do, whoever plays them, and what becomes of the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedshelf.app.photos import StorePhotos
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import AttackName, EngineName
from fedshelf.core.errors import UsageError
from fedshelf.core.events import RunStatus
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload, auxiliary_vectors
from fedshelf.data.photo_set import PhotoSet
from fedshelf.simulate.attacks import NO_ATTACK, Attack, attack_of
from fedshelf.simulate.client_runner import ClientRunner
from fedshelf.simulate.engine import simulate_in_memory
from fedshelf.simulate.stores import MemoryStores
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.tracking.queries import run_summary
from tests.unit.simulate.federations import CLASSES, Federation, photos

NAMES = tuple("abcdefgh")
SIZE = 8


def flip(photo_set: PhotoSet) -> PhotoSet:
    return PhotoSet(photo_set.images, len(CLASSES) - 1 - photo_set.labels)


def answers(tmp_path: Path, attack: Attack = NO_ATTACK, stores: Any = None, **values: Any) -> dict[str, Upload]:
    """What three stores upload in round 1."""
    federation = Federation.of(tmp_path, dict.fromkeys("abc", 9), algorithm="scaffold", **values)
    runner = ClientRunner(
        stores=federation.runner.stores if stores is None else stores, device="cpu", attack=attack, states=tmp_path
    )
    runner.prepare(federation.setup)
    layout = runner.open(federation.setup).bound_model.params.layout
    message = Broadcast(
        key=TaskKey(run_id="run", round=1, attempt=0),
        purpose=Purpose.TRAIN,
        vectors={
            "params": federation.start,
            **auxiliary_vectors({"control_variate": torch.zeros(layout.num_trainable)}),
        },
        client_lr=0.1,
    )
    uploads = {}
    for name in "abc":
        answered = runner.run(name, message)
        assert isinstance(answered, Upload), answered
        uploads[name] = answered
    return uploads


def test_attackers_multiply_whole_uploads_and_the_others_do_not(tmp_path: Path) -> None:
    honest = answers(tmp_path / "honest")
    found = answers(tmp_path / "attacked", Attack(attackers=frozenset("ac"), factor=-10.0))
    for name in "ac":
        assert torch.equal(found[name].delta, honest[name].delta * -10)
        assert torch.equal(found[name].auxiliary["control_variate"], honest[name].auxiliary["control_variate"] * -10)
        assert found[name].num_examples == honest[name].num_examples
    assert torch.equal(found["b"].delta, honest["b"].delta)
    assert honest["b"].delta.norm() > 0
    assert honest["b"].auxiliary["control_variate"].norm() > 0


def test_label_flippers_train_as_if_class_y_were_class_k_minus_1_minus_y(tmp_path: Path) -> None:
    counts = {name: photos(seed, 9, 16) for seed, name in enumerate("abc")}
    flipped = MemoryStores({**counts, "b": flip(counts["b"])}, None, CLASSES)
    expected = answers(tmp_path / "flipped", stores=flipped)
    found = answers(tmp_path / "attacked", Attack(attackers=frozenset("b"), flips_labels=True))
    honest = answers(tmp_path / "honest")
    assert all(torch.equal(found[name].delta, expected[name].delta) for name in "abc")
    assert not torch.equal(found["b"].delta, honest["b"].delta)


def test_attackers_validate_on_their_right_labels() -> None:

    own = StorePhotos(train=photos(0, 9, 16), validation=photos(1, 5, 16), num_left_out=2)
    found = Attack(attackers=frozenset("a"), flips_labels=True).photos("a", own, 3)
    assert found.train.labels.tolist() == [2 - label for label in own.train.labels]
    assert found.train.labels.dtype == np.int64
    assert (found.validation, found.num_left_out) == (own.validation, 2)


def config(attack: AttackName = "none", attackers: int = 0, **values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "image_size": SIZE, "rounds": 6, "batch_size": 8, "local_epochs": 2, "client_lr": 0.02,
        "lr_schedule": "constant", "warmup_rounds": 0, "val_fraction": 0.0, "augment": False, "device": "cpu",
    }  # fmt: skip
    return RunConfig(**{**given, "attack": attack, "attackers": attackers, **values})


@pytest.mark.parametrize(
    ("attack", "factor", "flips", "used"),
    [("label-flip", None, True, 1.0), ("sign-flip", None, False, -1.0), ("scale", None, False, -10.0),
     ("scale", 3.0, False, 3.0), ("sign-flip", -2.0, False, -2.0)],
)  # fmt: skip
def test_the_first_stores_in_the_order_of_names_attack(
    attack: AttackName, factor: float | None, flips: bool, used: float
) -> None:
    found = attack_of(config(attack, 2, attack_factor=factor), NAMES)
    assert found == Attack(attackers=frozenset("ab"), flips_labels=flips, factor=used)


def test_without_an_attack_nobody_attacks() -> None:
    assert attack_of(config(), NAMES) == NO_ATTACK


def test_more_attackers_than_stores_are_wrong_use() -> None:
    with pytest.raises(UsageError, match="--attackers 9: there are only 8 stores"):
        attack_of(config("scale", 9), NAMES)


@pytest.mark.parametrize(
    ("values", "why"),
    [({"attack": "scale"}, "go together"), ({"attackers": 2}, "go together"),
     ({"attack": "label-flip", "attackers": 1, "attack-factor": 2.0}, "attack-factor is for"),
     ({"attack-factor": 2.0}, "attack-factor is for"),
     ({"trim": 0.5}, "trim"), ({"norm-bound": 0.0}, "norm-bound")],
)  # fmt: skip
def test_attacks_that_mean_nothing_are_wrong_use(values: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        files.parse(RunConfig, values, where="the command line")


def test_clients_are_not_told_of_attacks_and_the_run_directory_is() -> None:
    attacked = config("scale", 2, aggregator="median", norm_bound=1.0)
    assert not any(word in files.for_clients(attacked) for word in ("attack", "aggregator", "norm-bound", "trim"))
    assert 'attack = "scale"\nattackers = 2\n' in files.effective(attacked)


STORES = {name: photos(seed, 24, SIZE) for seed, name in enumerate(NAMES)}
TEST = photos(99, 150, SIZE)


def linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, num_classes))


def accuracy(given: RunConfig, run_dir: str) -> float:
    """Central accuracy after the last round."""
    status, directory = simulate_in_memory(
        given.model_copy(update={"run_dir": Path(run_dir)}),
        stores=STORES,
        test=TEST,
        class_names=CLASSES,
        model=linear,
    )
    assert status is RunStatus.FINISHED
    found = run_summary(directory.path).rounds[-1].central_accuracy
    assert found is not None
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> float:
    return accuracy(config(), str(tmp_path_factory.mktemp("runs") / "clean"))


@pytest.mark.usefixtures("home")
def test_two_of_eight_that_scale_ruin_the_mean(clean: float) -> None:
    assert clean > 0.9
    assert accuracy(config("scale", 2), "mean") < 0.6


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("aggregator", ["median", "trimmed-mean", "multi-krum"])
@pytest.mark.parametrize("attack", ["scale", "label-flip"])
def test_a_robust_rule_with_a_norm_bound_stays_near_the_clean_run(
    clean: float, aggregator: str, attack: AttackName
) -> None:
    assert accuracy(config(attack, 2, aggregator=aggregator, norm_bound=1.0), "robust") > clean - 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("engine", "workers", "attack"),
    [("local", 2, "scale"), ("local", 2, "label-flip"), ("vmap", 0, "scale"), ("vmap", 0, "label-flip"),
     ("ray", 2, "scale")],
)  # fmt: skip
def test_attackers_do_the_same_whoever_plays_them(
    engine: EngineName, workers: int, attack: AttackName, request: pytest.FixtureRequest
) -> None:
    if engine == "ray":
        request.getfixturevalue("with_ray")
    models = []
    for number, (kind, processes) in enumerate((("local", 0), (engine, workers))):
        given = config(attack, 3, rounds=1, engine=kind, workers=processes, run_dir=Path(f"run-{number}"))
        _, directory = simulate_in_memory(given, stores=STORES, test=TEST, class_names=CLASSES, model=linear)
        state = FileCheckpoints(directory.checkpoints).load()
        assert state is not None
        models.append(state.model.published)
    if engine == "vmap":
        torch.testing.assert_close(*models, rtol=0, atol=1e-4)
    else:
        assert torch.equal(*models)
