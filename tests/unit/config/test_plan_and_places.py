"""From configuration to objects."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedavgm import FedAvgM
from fedshelf.algorithms.fedopt import FedOpt, adagrad, adam, yogi
from fedshelf.algorithms.fedprox import FedProx
from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.algorithms.scaffold import Scaffold
from fedshelf.app.client import ClientPlace, StoreClient, from_node_config, join_of
from fedshelf.app.components import algorithm_of, bound_model_of, client_lr_of, personalization_of, plan_of
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import SamplingName
from fedshelf.core.errors import DataError, RunError, UsageError
from fedshelf.core.messages import ClassFolder, Failure, Ready, Setup
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.catalogue import Catalogue
from fedshelf.personalization import fedbn, fedper
from fedshelf.personalization.base import NONE, PersonalLayers
from fedshelf.personalization.ditto import Ditto
from fedshelf.personalization.finetune import FineTuning
from fedshelf.training.phases import Moves, Phase
from tests.unit.data.samples import write_pack


def config(**values: Any) -> RunConfig:
    return RunConfig(**{"image_size": 16, "width": 4, **values})


def test_the_plan_is_the_configurations() -> None:
    plan = plan_of(
        config(rounds=10, extend=5, min_clients=3, fraction=0.4, quorum=2, round_timeout=7.0, max_examples=11,
               patience=4, best_metric="train_loss", seed=9, client_lr=0.2, warmup_rounds=2, straggler_factor=1.5,
               over_selection=0.3, local_work="dynamic", least_work=0.5, most_work=3.0, work_norm="l1", batch_size=8,
               momentum=0.5),
        run_id="r", start_clients=6, catalogue=None,
    )  # fmt: skip
    assert (plan.num_rounds, plan.start_clients, plan.fraction) == (15, 6, 0.4)
    assert (plan.pacing.straggler_factor, plan.pacing.over_selection) == (1.5, 0.3)
    workload = plan.pacing.workload
    assert (workload.rule, workload.least, workload.most, workload.norm) == ("dynamic", 0.5, 3.0, "l1")
    assert (workload.training.batch_size, workload.training.momentum) == (8, 0.5)
    assert (plan.rounds.quorum, plan.rounds.timeout, plan.rounds.max_examples) == (2, 7.0, 11)
    assert (plan.early_stopping.patience, plan.early_stopping.metric, plan.rng.seed) == (4, "train_loss", 9)
    assert plan.client_lr(1) == pytest.approx(0.1)
    assert plan.client_lr(12) == plan.client_lr(10), "an extension changes no rate of the rounds before it"


def test_algorithms_are_built_by_name_with_their_settings() -> None:
    assert algorithm_of(config()) == FedAvg()
    assert algorithm_of(config(algorithm="fedprox", mu=0.7)) == FedProx(mu=0.7)
    server = {"server_lr": 0.3, "server_momentum": 0.4, "server_beta2": 0.5, "server_tau": 0.6}
    assert algorithm_of(config(algorithm="fedavgm", **server)) == FedAvgM(server_lr=0.3, beta=0.4)
    for name, second_moment in (("fedadagrad", adagrad), ("fedadam", adam), ("fedyogi", yogi)):
        beta2 = 0.0 if name == "fedadagrad" else 0.5  # FedAdagrad has none
        expected = FedOpt(second_moment=second_moment, server_lr=0.3, beta1=0.4, beta2=beta2, tau=0.6)
        assert algorithm_of(config(algorithm=name, **server)) == expected
    assert algorithm_of(config(algorithm="fedavgm")) == FedAvgM(server_lr=1.0, beta=0.5)
    assert algorithm_of(config(algorithm="fedavgm", server_momentum=0.0)) == FedAvgM(server_lr=1.0, beta=0.0)
    adaptive = FedOpt(second_moment=adam, server_lr=0.1, beta1=0.9, beta2=0.99, tau=0.01)
    assert algorithm_of(config(algorithm="fedadam")) == adaptive
    assert algorithm_of(config(algorithm="fedadam", server_momentum=0.0)) == replace(adaptive, beta1=0.0)
    assert algorithm_of(config(algorithm="scaffold", scaffold_option="1")) == Scaffold(server_lr=1.0, option="1")


@pytest.mark.parametrize(("sampling", "alike"), [("uniform", False), ("availability", False), ("size", True)])
def test_stores_that_are_drawn_by_size_count_alike_and_others_by_their_photos(
    sampling: SamplingName, alike: bool
) -> None:
    plan = plan_of(config(sampling=sampling), run_id="r", start_clients=1, catalogue=None)
    assert (plan.sampling, plan.rounds.equal_weights) == (sampling, alike)


def test_personalizations_are_built_by_name_with_their_settings() -> None:
    names = ("fedbn", "fedper", "fedrep", "ditto", "finetune")
    settings = {"fedrep_head_epochs": 3, "ditto_lambda": 0.7, "finetune_epochs": 5, "finetune_lr": 0.2}
    made = {name: personalization_of(config(personalize=name, **settings)) for name in names}
    assert personalization_of(config(**settings)) is NONE
    assert made["fedbn"] == PersonalLayers(names=fedbn.personal_names)
    assert made["fedper"] == PersonalLayers(names=fedper.personal_names)
    assert made["fedrep"] == PersonalLayers(
        names=fedper.personal_names, phases=(Phase(moves=Moves.PERSONAL, epochs=3), Phase(moves=Moves.SHARED))
    )
    assert made["ditto"] == Ditto(pull=0.7)
    assert made["finetune"] == FineTuning(epochs=5, client_lr=0.2)


def test_every_registered_algorithm_can_be_made_of_the_defaults() -> None:
    for name in ALGORITHMS:
        assert isinstance(algorithm_of(config(algorithm=name)).auxiliary, tuple)


def test_the_workbench_trains_as_configured_from_weights_of_the_seed() -> None:
    catalogue = Catalogue.resolve({"a": [ClassFolder(leaf=n, path=n) for n in "xyz"]})
    given = config(batch_size=3, local_epochs=5, momentum=0.1, weight_decay=0.2, label_smoothing=0.3, gradient_clip=0.4,
                   optimizer="adamw", augment=False)  # fmt: skip
    bench = bound_model_of(given, catalogue, device="cpu")
    s = bench.settings
    assert (s.batch_size, s.local_epochs, s.momentum, s.weight_decay) == (3, 5, 0.1, 0.2)
    assert (s.label_smoothing, s.gradient_clip, s.optimizer, s.augmentation) == (0.3, 0.4, "adamw", None)
    assert bound_model_of(config(), catalogue, device="cpu").settings.augmentation == Augmentation()
    vectors = [bound_model_of(config(seed=seed), catalogue, device="cpu").params.vector for seed in (1, 1, 2)]
    assert vectors[0].equal(vectors[1])
    assert not vectors[0].equal(vectors[2])
    assert dict(bench.module.named_parameters())["head.weight"].shape[0] == 3


def test_the_home_is_where_the_variable_says(home: Path) -> None:
    assert places.home_directory() == home
    assert {p.parent for p in (places.tls_directory(), places.photo_cache())} == {home}


@pytest.mark.parametrize("name", ["..", "../../etc", "a/b", "", ".hidden", "ünï çode", "a\x00b"])
def test_no_name_leads_out_of_the_states_folder(home: Path, name: str) -> None:
    folder = places.client_directory(name)
    assert folder.parent == home / "clients"
    assert folder.name not in ("", ".", "..")


def test_names_that_differ_have_folders_that_differ(home: Path) -> None:
    names = ["a b", "a_b", "a/b", "a%20b", "a%2fb", ".a", "a", ".", "..", "%2ea"]
    assert len({places.client_directory(name) for name in names}) == len(names)


def place(data: Path, **values: Any) -> ClientPlace:
    return ClientPlace.of(data, **{"name": None, "state_dir": None, "device": "cpu", **values})


def test_a_client_is_named_for_its_folder_and_keeps_its_state_elsewhere(home: Path) -> None:
    data = write_pack(Path("lyon-03"), {"apple": 2})
    made = place(data)
    assert made.name == "lyon-03"
    assert made.state_dir.is_relative_to(home.resolve())
    first, second = join_of(made), join_of(made)
    assert first == second, "the identity outlives the process"
    assert join_of(place(data, state_dir=Path("elsewhere"))).identity != first.identity
    assert first.classes == (ClassFolder(leaf="apple", path="apple"),)
    with made.lock(), pytest.raises(RunError):
        made.lock().__enter__()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"state_dir": Path("photos/state")}, "inside the photos"),
        ({"device": "tpu"}, "choose among"),
        ({"test_dir": Path("absent")}, "--test-dir absent: no such folder"),
    ],
)
def test_a_place_that_makes_no_sense_is_a_usage_error(home: Path, values: dict[str, Any], why: str) -> None:
    write_pack(Path("photos"), {"apple": 1})
    with pytest.raises(UsageError, match=why):
        place(Path("photos"), **values)


def test_a_folder_that_is_missing_or_empty_is_one_clear_error(home: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        place(Path("absent"))
    Path("empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        join_of(place(Path("empty")))


def test_a_stock_node_says_where_its_photos_are(home: Path) -> None:
    write_pack(Path("photos"), {"apple": 1})
    join, client = from_node_config({"data-dir": "photos", "name": "oslo", "device": "cpu", "test-dir": "photos"})
    assert join.client == "oslo"
    assert isinstance(client, StoreClient)
    with pytest.raises(UsageError, match="data-dir"):
        from_node_config({})


def test_test_photos_of_other_products_are_found_out_before_the_first_round(home: Path) -> None:
    write_pack(Path("photos"), {"apple": 3})
    write_pack(Path("zoo"), {"tiger": 2})
    catalogue = Catalogue.resolve({"a": [ClassFolder(leaf="apple", path="apple")]})
    given = config()
    digest = bound_model_of(given, catalogue, device="cpu").params.layout.digest
    setup = Setup(run_id="r", config=files.for_clients(given), catalogue=catalogue.to_json(), layout_digest=digest)
    for test_dir, expected in ((Path("zoo"), Failure), (Path("photos"), Ready), (None, Ready)):
        answer = StoreClient(place(Path("photos"), test_dir=test_dir)).handle(setup)
        assert isinstance(answer, expected), answer
        if isinstance(answer, Failure):
            assert "none of its photos is of a class" in answer.reason


def test_models_are_compared_where_there_is_personalization_or_where_it_is_asked_for() -> None:
    def compares(**values: Any) -> bool:
        return plan_of(config(**values), run_id="r", start_clients=1, catalogue=None).compares

    assert not compares()
    assert compares(compare=True)
    assert compares(personalize="finetune")
    assert not compares(personalize="finetune", compare=False)


def test_clients_train_alone_at_the_rates_of_the_run() -> None:
    given = config(rounds=10, client_lr=0.2, warmup_rounds=2)
    plan = plan_of(given, run_id="r", start_clients=1, catalogue=None)
    received = files.parse(RunConfig, tomllib.loads(files.for_clients(given)), where="the server's configuration")
    assert [client_lr_of(received)(n) for n in range(1, 15)] == [plan.client_lr(n) for n in range(1, 15)]
    assert plan.client_lr(1) != plan.client_lr(2) != plan.client_lr(9)
