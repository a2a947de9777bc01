"""`--sales` from tables next to photos: what is trained, what stays at the stores, and what it changes."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedshelf.app.client import StoreClient
from fedshelf.app.client_place import ClientPlace
from fedshelf.app.predictor import Predictor
from fedshelf.cli.app import main
from fedshelf.compression.download import name_of
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.events import RunStatus
from fedshelf.core.messages import FROZEN, PARAMS, Broadcast, ClientMessage, Purpose, Ready, Setup, TaskKey, Upload
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.synthetic_sales import FIRST_DAY, write_synthetic_sales
from fedshelf.privacy.policy import OPEN
from fedshelf.simulate.client_runner import ClientRunner
from fedshelf.simulate.engine import simulate
from fedshelf.simulate.stores import FolderStores
from fedshelf.storage.run_directory import RunDirectory
from tests.unit.data.samples import write_pack

GATE = "head.tower.gate"
NAMES = ("lyon", "oslo", "rome")  # rome has no sales
CLASSES = {"apple": 7, "milk": 6, "tea": 5}


@pytest.fixture
def stores(home: Path) -> Path:
    for name in NAMES:
        write_pack(Path("stores") / name, CLASSES)
    write_pack(Path("test"), dict.fromkeys(CLASSES, 4))
    folders = {name: Path("stores") / name for name in NAMES if name != "rome"}
    write_synthetic_sales(folders, seed=0, gamma=1.0, listed=0.6, test=Path("test"))
    return Path("stores")


def config(**values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "data_dir": Path("stores"), "test_dir": Path("test"), "image_size": 16, "width": 8, "rounds": 2, "sales": True,
        "batch_size": 4, "device": "cpu", "val_fraction": 0.2,
    }  # fmt: skip
    return files.load(RunConfig, None, {**given, **values})


def run(name: str, **values: Any) -> RunDirectory:
    status, directory = simulate(config(run_dir=Path(name), **values))
    assert status is RunStatus.FINISHED
    return directory


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model_card.json").read_text())
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if torch.equal(one[name], other[name])}


def of_store(directory: RunDirectory, name: str) -> Path:
    return directory.stores / places.folder_name(name)


def test_the_tower_is_shared_and_each_store_keeps_its_gate(stores: Path) -> None:
    directory = run("r")
    shared = weights(directory.model)
    assert shared["head.tower.w_2"].abs().sum() > 0
    assert torch.equal(shared[GATE], torch.ones(2))
    assert card(directory.model)["personal"] == [GATE]
    gates = {name: weights(of_store(directory, name))[GATE] for name in NAMES}
    assert not torch.equal(gates["lyon"], gates["oslo"])
    assert gates["rome"][0] == gates["rome"][1]  # no gradient: only weight decay
    for name, gate in gates.items():
        assert (card(of_store(directory, name))["candidate"] == "global") == (not gate.any())


def test_the_forecast_is_measured_at_stores_that_have_sales_and_stays_there(stores: Path) -> None:
    directory = run("r")
    for name in NAMES:
        found = card(of_store(directory, name))["metrics"].get("forecast_wape")
        assert (found is None) == (name == "rome")
        if found:
            assert found.keys() == {"last_week", "four_week_mean", "year_ago", "model"}
            assert 0 < found["last_week"] < 3
    assert "forecast" not in (directory.model / "model_card.json").read_text()


def test_two_processes_train_what_one_trains(stores: Path) -> None:
    one, two = (weights(run(f"r{count}", workers=count, compare=False).model) for count in (0, 2))
    assert same(one, two) == one.keys()


def test_clients_in_one_computation_train_what_they_train_alone(stores: Path) -> None:
    alone, together = (weights(run(engine, engine=engine, compare=False).model) for engine in ("local", "vmap"))
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=1e-3, atol=1e-5)


def altered(table: Path, days: range) -> None:
    """Multiply the units of some days by ten."""
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in lines]
    for row in rows:
        if (date.fromisoformat(row[0]) - FIRST_DAY).days in days:
            row[2] = str(10 * int(row[2]) + 7)
    table.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")


def test_sales_after_the_forecasts_of_all_photos_change_nothing_and_those_before_do(stores: Path) -> None:
    """Photos to train on are taken before day 609; the weeks from day 672 on measure the forecast alone."""
    before = weights(run("before", compare=False).model)
    for name in ("lyon", "oslo"):
        altered(stores / name / "sales.csv", range(672, 728))
    assert same(before, weights(run("later", compare=False).model)) == before.keys()
    altered(stores / "lyon" / "sales.csv", range(340, 600))
    assert same(before, weights(run("earlier", compare=False).model)) != before.keys()


def image_model() -> Path:
    return run("image", sales=False, rounds=1, compare=False).model


def test_sales_join_a_finished_image_model_that_stays_as_it_is_bit_for_bit(stores: Path) -> None:
    image = image_model()
    directory = run("post", train="sales", init=image / "model.safetensors")
    before, after = weights(image), weights(directory.model)
    assert same(before, {name: after[name] for name in before}) == before.keys()
    assert after.keys() - before.keys() == {
        f"head.tower.{name}" for name in ("w_1", "b_1", "w_2", "w_3", "b_2", "gate")
    }
    photo = next(iter(sorted(Path("test").rglob("*.png"))))
    plain, model = (Predictor.load(folder) for folder in (image, of_store(directory, "lyon")))
    for tried in (model, model.with_sales(Path("stores/lyon"))):  # the table of the test dates photos for stores alone
        assert tried.predict(photo, top=3) == plain.predict(photo, top=3)


def test_a_dated_photo_is_named_with_the_sales_before_its_day(stores: Path) -> None:
    image = image_model()
    directory = run("post", train="sales", init=image / "model.safetensors", compare=False)
    photo = next(iter(sorted(Path("test").rglob("*.png"))))
    model = Predictor.load(directory.model).with_sales(Path("stores/lyon"))
    plain = Predictor.load(image).predict(photo, top=3)
    day = date.fromordinal(FIRST_DAY.toordinal() + 650)
    dated = model.predict_levels(photo, top=3, day=day)[-1]
    assert [guess.probability for guess in dated] != [guess.probability for guess in plain]
    too_late = model.predict_levels(photo, top=3, day=date(2030, 1, 1))[-1]
    assert too_late == plain
    report = model.evaluate(Path("test"))
    assert report.num_photos == 12
    assert report.loss != Predictor.load(image).evaluate(Path("test")).loss


def test_predict_and_evaluate_take_the_store_and_the_day(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = image_model()
    directory = run("post", train="sales", init=image / "model.safetensors", compare=False)
    photo = str(next(iter(sorted(Path("test").rglob("*.png")))))
    day = date.fromordinal(FIRST_DAY.toordinal() + 650).isoformat()
    capsys.readouterr()

    def printed(*arguments: str) -> dict[str, Any]:
        main([*arguments, "--run", str(directory.model), "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    plain, dated = printed("predict", photo), printed("predict", photo, "--sales", "stores/lyon", "--date", day)
    assert plain["predictions"] == printed("predict", photo, "--sales", "stores/lyon")["predictions"]  # no date
    assert plain["predictions"] != dated["predictions"]
    assert printed("evaluate", "test")["loss"] != printed("evaluate", "test", "--sales", "stores/lyon")["loss"]
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["predict", photo, "--run", str(directory.model), "--date", day])
    assert "--date has no effect without --sales" in capsys.readouterr().err


def test_a_model_without_sales_or_a_store_without_any_is_refused(stores: Path) -> None:
    image = image_model()
    with pytest.raises(UsageError, match="was trained without sales"):
        Predictor.load(image).with_sales(Path("stores/lyon"))
    model = run("post", train="sales", init=image / "model.safetensors").model
    with pytest.raises(UsageError, match=r"it has no sales\.csv with sales of the model's products"):
        Predictor.load(model).with_sales(Path("stores/rome"))


def test_a_store_whose_table_is_invalid_does_not_take_part_and_says_which_lines(stores: Path) -> None:
    table = stores / "lyon" / "sales.csv"
    table.write_text("date,product,units,price\nyesterday,apple,secret,1\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        FolderStores(folders={"lyon": stores / "lyon"}, cache=places.photo_cache(), test_dir=None).photos(
            "lyon", _runner().open(_setup())
        )
    assert "line 2: the date is not of the form 2026-11-30" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "yesterday" not in str(caught.value)


def _runner() -> ClientRunner:
    folders = {name: Path("stores") / name for name in NAMES}
    stores = FolderStores(folders=folders, cache=places.photo_cache(), test_dir=None)
    return ClientRunner(stores=stores, device="cpu", states=Path("states"))


def _setup() -> Setup:
    from fedshelf.app.model import bound_model_of

    given = config(data_dir=None, test_dir=None)
    catalogue = Catalogue(tuple(CLASSES), tuple((name,) for name in CLASSES))
    bound = bound_model_of(given, catalogue, device="cpu")
    frozen = bound.frozen_values()
    assert frozen is not None
    return Setup(
        run_id="run", config=files.for_clients(given), catalogue=catalogue.to_json(),
        layout_digest=bound.params.layout.digest, frozen=name_of(frozen), vectors={FROZEN: frozen},
    )  # fmt: skip


def test_a_client_trains_on_its_sales_as_a_simulated_one_does(stores: Path) -> None:
    setup, runner = _setup(), _runner()
    start = runner.open(setup).bound_model.params.shared.clone()
    task = Broadcast(
        key=TaskKey(run_id="run", round=1, attempt=0), purpose=Purpose.TRAIN, client_lr=0.05, vectors={PARAMS: start}
    )
    place = ClientPlace.of(stores / "lyon", name="lyon", state_dir=Path("state"), device="cpu")
    place.make_state_dir()
    client = StoreClient(place, policy=OPEN)

    def answers(handle: Any) -> ClientMessage:
        assert isinstance(handle(setup), Ready)
        found: ClientMessage = handle(task)
        return found

    simulated, real = answers(lambda message: runner.run("lyon", message)), answers(client.handle)
    assert isinstance(simulated, Upload)
    assert isinstance(real, Upload)
    assert torch.equal(simulated.delta, real.delta)
    assert simulated.delta.abs().sum() > 0
    num_shared = runner.open(setup).bound_model.params.layout.num_shared
    assert len(real.delta) == num_shared == (8 * 8 + 1) * 3 + (13 * 16 + 16) + 2 * 16 + 2 * 13 + 2  # no gate


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"train": "all"}, "--train all with --sales: photos enter as features"),
        ({"algorithm": "ridge"}, "--algorithm ridge with --sales: it trains nothing in steps"),
        ({"refit_head": True}, "--refit-head with --sales"),
        ({"personalize": "finetune"}, "--personalize finetune with --sales: both add the store's mix"),
        ({"dp": "sample", "noise_multiplier": 1.0}, "--dp sample with --sales: its noise protects photos"),
        ({"train": "sales"}, "--train sales needs an image model that is trained already: add --init FILE"),
        ({"train": "sales", "sales": False}, "--train sales needs sales: add --sales"),
        ({"personalize": "gate", "sales": False}, "--personalize gate needs sales: add --sales"),
    ],
)
def test_what_does_not_go_with_sales_is_refused_before_the_run(
    stores: Path, values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run("r", **values)
    assert problem in str(caught.value)
