"""From configuration to objects."""

import os
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
from fedshelf.app.client import StoreClient, from_node_config
from fedshelf.app.client_place import ClientPlace, join_of
from fedshelf.app.components import algorithm_of, client_lr_of, personalization_of, plan_of
from fedshelf.app.model import bound_model_of
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import SamplingName
from fedshelf.core.errors import DataError, RunError, UsageError
from fedshelf.core.messages import ClassFolder, Failure, Ready, Setup
from fedshelf.core.text import to_filesystem
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.catalogue import Catalogue
from fedshelf.personalization import fedbn, fedper
from fedshelf.personalization.base import NONE, PersonalLayers
from fedshelf.personalization.ditto import Ditto
from fedshelf.personalization.finetune import FineTuning
from fedshelf.privacy.policy import Policy
from fedshelf.privacy.policy_tables import Metrics
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


@pytest.mark.parametrize("name", ["..", "../../etc", "a/b", "", ".hidden", "ünï çode", "a\x00b", "柠檬 " * 99])
def test_no_name_leads_out_of_the_states_folder(home: Path, name: str) -> None:
    folder = places.client_directory(name)
    assert folder.parent == home / "clients"
    assert folder.name not in ("", ".", "..")
    assert len(os.fsencode(folder.name)) <= 255


def test_names_that_differ_have_folders_that_differ(home: Path) -> None:
    names = ["a b", "a_b", "a/b", "a%20b", "a%2fb", ".a", "a", ".", "..", "%2ea", "柠檬" * 99, "柠檬" * 99 + "!"]
    assert len({places.client_directory(name) for name in names}) == len(names)


def setup_for(*products: str) -> Setup:
    """What a server of the smallest recipe sends to clients that hold `products`."""
    catalogue = Catalogue.resolve({"a": [ClassFolder(leaf=name, path=name) for name in products]})
    digest = bound_model_of(config(), catalogue, device="cpu").params.layout.digest
    return Setup(
        run_id="r", config=files.for_clients(config()), catalogue=catalogue.to_json(), layout_digest=digest
    )  # fmt: skip


def place(data: Path, **values: Any) -> ClientPlace:
    return ClientPlace.of(data, **{"name": None, "state_dir": None, "device": "cpu", **values})


def test_a_client_is_named_for_its_folder_and_keeps_its_state_elsewhere(home: Path) -> None:
    data = write_pack(Path("lyon-03"), {"apple": 2})
    made = place(data)
    assert made.name == "lyon-03"
    assert made.state_dir.is_relative_to(home.resolve())
    assert join_of(made).classes == (ClassFolder(leaf="apple", path="apple"),)
    with made.lock(), pytest.raises(RunError):
        made.lock().__enter__()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"state_dir": Path("photos/state")}, "inside the photos"),
        ({"device": "tpu"}, "choose among"),
        ({"test_dir": Path("absent")}, "--test-dir .*absent: no such folder"),
        ({"test_dir": Path("photos")}, "--test-dir photos is the --data-dir"),
        ({"name": "caf\udce9"}, r"--name caf\\xe9 is not UTF-8 text"),
    ],
)
def test_a_place_that_makes_no_sense_is_a_usage_error(home: Path, values: dict[str, Any], why: str) -> None:
    write_pack(Path("photos"), {"apple": 1})
    with pytest.raises(UsageError, match=why):
        place(Path("photos"), **values)


def test_a_folder_whose_name_is_not_utf8_gives_a_name_that_is_and_leads_back_to_it(home: Path) -> None:
    folder = Path(os.fsdecode(b"magasin-caf\xe9"))
    made = place(write_pack(folder, {"apple": 1}))
    assert made.name == r"magasin-caf\xe9"
    assert to_filesystem(made.name) == folder.name
    assert join_of(made).client == made.name


def test_what_was_left_out_of_the_photos_is_said_when_the_client_joins(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pack(Path("photos"), {"apple": 1, "apple/@eaDir/p00.jpg": 1})
    join = join_of(place(Path("photos")))
    assert [folder.path for folder in join.classes] == ["apple"]
    assert "folders that a NAS or an operating system keeps for itself (1): 'apple/@eaDir'" in caplog.text


def test_a_client_without_a_photo_to_train_on_says_why(home: Path) -> None:
    for name in ("damaged", "other"):
        write_pack(Path(name), {"apple" if name == "damaged" else "apples": 3})
    for photo in Path("damaged").rglob("*.png"):
        photo.write_bytes(b"\x89PNG\r\n\x1a\n no photo")
    setup = setup_for("apple")
    answers = {name: StoreClient(place(Path(name))).handle(setup) for name in ("damaged", "other")}
    reasons = {name: answer.reason for name, answer in answers.items() if isinstance(answer, Failure)}
    assert reasons["damaged"].startswith("none of its photos can be used: the file is not a JPEG")
    assert "(3 photos)" in reasons["damaged"]
    assert reasons["other"].startswith("it holds no training photo of a class in the run's catalogue")
    assert "'apples'" in reasons["other"]


def test_an_error_names_no_product_that_the_policy_withholds(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(metrics=Metrics(class_names=False))
    write_pack(Path("secret"), {"apples": 3})
    write_pack(Path("photos"), {"apple": 3})
    assert join_of(place(Path("secret")), names_classes=False).classes == ()
    for photos, test_dir in ((Path("secret"), None), (Path("photos"), Path("secret"))):
        answer = StoreClient(place(photos, test_dir=test_dir), policy=policy).handle(setup_for("apple"))
        assert isinstance(answer, Failure)
        assert answer.reason == "its photos do not suit this run; its own log says why"
    assert "'apples'" in caplog.text


def test_a_configuration_that_is_no_toml_is_a_failure_and_no_crash(home: Path) -> None:
    write_pack(Path("photos"), {"apple": 1})
    for text in ("rounds = ", "a = " + "[" * 60_000):
        answer = StoreClient(place(Path("photos"))).handle(replace(setup_for("apple"), config=text))
        assert isinstance(answer, Failure)
        assert "the server's configuration is not TOML" in answer.reason


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("pretrained = false", "sets pretrained, which a server may not set"),
        ('init = "/etc/passwd"\nmin_clients = 1', "sets init, min-clients, which"),
        ('data-dir = "/"', "sets data-dir, which"),
        ('speeds = "1,5"', "sets slowdowns, which"),
        ("client-lrr = 1", "unknown key 'client-lrr' in the server's configuration: did you mean 'client-lr'?"),
        ("x = " + "1" * (1 << 16), "65,536 is the most"),
    ],
)
def test_a_server_sets_what_all_clients_share_and_nothing_else(home: Path, line: str, problem: str) -> None:
    write_pack(Path("photos"), {"apple": 1})
    setup = setup_for("apple")
    client = StoreClient(place(Path("photos")))
    answer = client.handle(replace(setup, config=f"{line}\n{setup.config}"))
    assert isinstance(answer, Failure)
    assert problem in answer.reason
    assert isinstance(client.handle(setup), Ready)


def test_a_folder_that_is_missing_or_empty_is_one_clear_error(home: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        place(Path("absent"))
    Path("empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        join_of(place(Path("empty")))


def test_a_stock_node_says_where_its_photos_are(home: Path) -> None:
    write_pack(Path("photos"), {"apple": 1})
    write_pack(Path("others"), {"apple": 1})
    join, client = from_node_config({"data-dir": "photos", "name": "oslo", "device": "cpu", "test-dir": "others"})
    assert join.client == "oslo"
    assert isinstance(client, StoreClient)
    with pytest.raises(UsageError, match="data-dir"):
        from_node_config({})


def test_test_photos_of_other_products_are_found_out_before_the_first_round(home: Path) -> None:
    write_pack(Path("photos"), {"apple": 3})
    write_pack(Path("zoo"), {"tiger": 2})
    write_pack(Path("others"), {"apple": 1})
    setup = setup_for("apple")
    for test_dir, expected in ((Path("zoo"), Failure), (Path("others"), Ready), (None, Ready)):
        answer = StoreClient(place(Path("photos"), name=f"store of {test_dir}", test_dir=test_dir)).handle(setup)
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
