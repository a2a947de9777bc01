"""The same seed and threads give the same bits, whether simulated in one process, in several, or deployed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedshelf.data.synthetic_sales import write_synthetic_sales
from tests.own_models import VIT, write_vit
from tests.processes import Site, bytes_without_times, figures, same_model, same_weights

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def three_ways(site: Site, *flags: str, client_flags: Sequence[str] = ()) -> tuple[Path, Path, Path]:
    """The same run deployed, simulated in one process and in several: equal models to the last bit, equal bytes, and
    what stores have chosen in the end, if they were asked."""
    deployed, alone, workers = (site.root / name for name in ("deployed", "alone", "workers"))
    server = site.server(*flags, "--run-dir", str(deployed))
    clients = site.clients(*client_flags)
    assert server.end() == 0, server.text()
    assert {name: client.end() for name, client in clients.items()} == dict.fromkeys(site.names, 0)
    simulated = site.simulate(*flags, run_dir=alone)
    site.simulate(*flags, "--workers", "2", run_dir=workers)
    assert same_model(alone, workers)
    assert same_model(alone, deployed)
    assert bytes_without_times(server) == bytes_without_times(simulated)
    in_the_end = ("stores", "products", "levels", "confusion")
    shown = [{key: site.show(run)[key] for key in in_the_end} for run in (alone, workers, deployed)]
    assert shown[0] == shown[1] == shown[2]
    assert sum(found["total"] for found in shown[0]["products"])
    return deployed, alone, workers


def test_simulation_equals_deployment_on_the_same_seed(site: Site, drawn_test_photos: Path) -> None:
    common = ("--rounds", "3", "--val-fraction", "0.1", "--test-dir", str(drawn_test_photos))
    deployed, alone, workers = three_ways(site, *common)
    shown = {run.name: site.show(run) for run in (deployed, alone, workers)}
    for summary in shown.values():
        assert summary["status"] == "finished"
        assert [round_["round"] for round_ in summary["rounds"]] == [1, 2, 3]
    exact = ("accuracy", "central_accuracy", "train_loss")
    assert None not in {value for row in figures(shown["alone"], *exact) for value in row}
    assert figures(shown["deployed"], *exact) == figures(shown["alone"], *exact) == figures(shown["workers"], *exact)


CODECS = ("--codec-up", "topk:0.2+int8+zstd", "--codec-down", "int4+zstd")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(CODECS, id="compressed, clients remember what was left out"),
        pytest.param(("--algorithm", "scaffold"), id="clients with control variates"),
        pytest.param(("--algorithm", "scaffold", "--scaffold-option", "1", *CODECS), id="the same, compressed"),
        pytest.param(("--algorithm", "fedyogi"), id="a server that remembers"),
        pytest.param(("--personalize", "fedbn", *CODECS), id="personal tensors, compressed"),
        pytest.param(
            ("--personalize", "ditto", "--loss", "fedlc", "--aggregator", "median", "--norm-bound", "1"),
            id="models of their own, another loss, a robust rule",
        ),
        pytest.param(
            ("--personalize", "fedrep", "--sampling", "size", "--fraction", "0.5"),
            id="training in phases, another draw of half the stores",
        ),
        pytest.param(("--train", "head", "--feature-views", "2"), id="features of a frozen backbone"),
        pytest.param(("--algorithm", "ridge"), id="an exact head, from sums"),
        pytest.param(
            ("--algorithm", "scaffold", "--warm-start", "ridge", "--refit-head", "--average-rounds", "2", *CODECS),
            id="an exact head before and after the rounds of an algorithm with a memory",
        ),
        pytest.param(("--train", "norm", "--freeze-norm", *CODECS), id="a frozen part, compressed"),
    ],
)
def test_whatever_is_remembered_simulation_equals_deployment(pair: Site, flags: tuple[str, ...]) -> None:
    pair.fresh = pair.fresh or flags == CODECS  # once with processes that share nothing, not even the seed of hashes
    three_ways(pair, "--rounds", "4", "--val-fraction", "0.1", *flags)


def test_adapters_of_an_own_transformer_and_the_models_that_stores_keep(pair: Site) -> None:
    path = str(write_vit(pair.root / "models"))
    own = (
        "--model",
        VIT,
        "--model-path",
        path,
        "--train",
        "adapter",
        "--adapter-rank",
        "2",
        "--personalize",
        "finetune",
    )
    deployed, alone, _ = three_ways(
        pair, *own, "--rounds", "3", "--val-fraction", "0.1", *CODECS,
        client_flags=("--model-path", path, "--allow-model", VIT),
    )  # fmt: skip
    assert pair.show(deployed)["stores"]
    for name in pair.names:
        assert same_weights(pair.root / "home" / "clients" / name / "model", alone / "stores" / name)


def test_stores_choose_and_keep_the_same_models_deployed_and_simulated(pair: Site, drawn_test_photos: Path) -> None:
    test = ("--test-dir", str(drawn_test_photos))
    recipe = ("--rounds", "3", "--val-fraction", "0.2", "--personalize", "finetune", "--finetune-lr", "0.02")
    deployed, alone, workers = three_ways(pair, *recipe, *test, client_flags=test)
    found = pair.show(deployed)["stores"]
    assert [store["client"] for store in found] == pair.names
    assert all(None not in store.values() for store in found)
    for name in pair.names:
        kept = pair.root / "home" / "clients" / name / "model"
        assert same_weights(kept, alone / "stores" / name)
        assert same_weights(kept, workers / "stores" / name)
        card = json.loads((kept / "model_card.json").read_text())
        (store,) = (store for store in found if store["client"] == name)
        assert (card["store"], card["candidate"], card["round"]) == (name, store["best"], 3)
        assert card["metrics"]["own_mix_accuracy"] == {c: store[c] for c in ("local", "global", "personalized")}
        assert card["metrics"]["measured_on"] == "test photos"


def test_sales_stay_in_their_stores_and_train_the_same_model_deployed_and_simulated(site: Site) -> None:
    """Two stores with sales and two without, by real clients."""
    site.stores = Path(shutil.copytree(site.stores, site.root / "dated"))
    with_sales = site.names[:2]
    write_synthetic_sales({name: site.stores / name for name in with_sales}, seed=0, gamma=1.0, listed=0.6)
    deployed, alone, _ = three_ways(site, "--rounds", "3", "--val-fraction", "0.2", "--sales")
    for name in site.names:
        kept = site.root / "home" / "clients" / name / "model"
        assert same_weights(kept, alone / "stores" / name)
        forecast = json.loads((kept / "model_card.json").read_text())["metrics"].get("forecast_wape")
        assert bool(forecast) == (name in with_sales)
    tables = [(site.stores / name / "sales.csv").read_bytes().splitlines()[1] for name in with_sales]
    for file in deployed.rglob("*"):
        assert not file.is_file() or not any(line in file.read_bytes() for line in tables)


def test_the_model_that_a_store_keeps_names_products_in_photos(pair: Site, drawn_test_photos: Path) -> None:
    run = pair.root / "run"
    pair.simulate("--rounds", "1", "--personalize", "fedper", "--test-dir", str(drawn_test_photos), run_dir=run)
    photo = next(drawn_test_photos.rglob("*.png"))
    named = pair.fedshelf("predict", str(photo), "--run", str(run / "stores" / pair.names[0]), "--json")
    assert named.end() == 0, named.text()
    (line,) = named.events
    assert len(json.loads(line["text"])["predictions"]) == 4


def test_stores_learn_from_the_models_that_they_have_chosen_deployed_as_simulated(pair: Site) -> None:
    recipe = ("--val-fraction", "0.2", "--personalize", "finetune", "--finetune-lr", "0.02", "--image-size", "20")
    deployed, alone, _ = three_ways(pair, "--rounds", "2", *recipe)

    def taught_by(teacher: Path) -> tuple[str, ...]:
        settings = pair.root / f"{teacher.name}-{teacher.parent.name}.toml"
        settings.write_text(f"teacher = {json.dumps(str(teacher))}\nrounds = 2\nval-fraction = 0.2\n", encoding="utf-8")
        return "--config", str(settings)

    student, simulated, by_the_global = (pair.root / name for name in ("student", "simulated", "by-the-global"))
    server = pair.server(*taught_by(deployed), "--run-dir", str(student))
    clients = pair.clients()
    assert server.end() == 0, server.text()
    assert {name: client.end() for name, client in clients.items()} == dict.fromkeys(pair.names, 0)
    pair.simulate(*taught_by(alone), run_dir=simulated)
    assert same_model(student, simulated)
    pair.simulate(*taught_by(alone / "model"), run_dir=by_the_global)
    assert not same_model(simulated, by_the_global)
