"""A simulation that is extended after products were added: every way of training keeps what it has, and grows it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.app.run_catalogue import add_aliases, add_products, problems_with_changes
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError, RunError, UsageError
from fedshelf.core.events import RoundFinished
from fedshelf.core.state import ServerState
from fedshelf.data.catalogue import Catalogue
from fedshelf.simulate.engine import simulate
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from tests.fakes import RecordingSink
from tests.unit.data.samples import write_pack

pytestmark = pytest.mark.usefixtures("home")
KNOWN, NEW, STORES = ("apple", "bread", "cocoa"), "elder", ("lyon", "metz", "nice")
RIDGE: dict[str, Any] = {"algorithm": "ridge", "val_fraction": 0.25}


def run(folder: str = "run", *, rounds: int, extend: int = 0, **values: Any) -> RecordingSink:
    sink = RecordingSink()
    given = {
        "data_dir": Path("stores"), "image_size": 16, "width": 4, "batch_size": 4, "device": "cpu", "seed": 3,
        "catalogue": Path("products.txt"), "val_fraction": 0.2, "warmup_rounds": 0, "local_epochs": 1,
        "run_dir": Path(folder), "rounds": rounds, "extend": extend, "threads": 1, **values,
    }  # fmt: skip
    simulate(files.load(RunConfig, None, given), watchers=(sink,))
    return sink


def draw(products: tuple[str, ...] = KNOWN, *, new_in: tuple[str, ...] = (), known: tuple[str, ...] = KNOWN) -> None:
    for store in STORES:
        write_pack(Path("stores") / store, dict.fromkeys(products, 5))
    for store in new_in:
        write_pack(Path("stores") / store, {NEW: 5})
    Path("products.txt").write_text("\n".join(known))


def state(folder: str = "run") -> ServerState:
    found = FileCheckpoints(Path(folder) / "checkpoints").load()
    assert found is not None
    return found


def labels(folder: str = "run") -> list[str]:
    found: list[str] = json.loads((Path(folder) / "model/labels.json").read_text())
    return found


def counted(sink: RecordingSink) -> list[set[str]]:
    return [{c.client for c in record.clients if c.status.value == "counted"} for record in sink.of(RoundFinished)]


WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "server momentum": {"algorithm": "fedadam"},
    "control variates": {"algorithm": "scaffold"},
    "error feedback both ways": {"codec_up": "topk:0.3+int8", "codec_down": "int8"},
    "averaged": {"average_rounds": 3},
    "personal heads": {"personalize": "fedper"},
    "a model at each store": {"personalize": "ditto"},
    "masks": {"secagg": True, "clip_norm": 5.0},
    "a frozen backbone": {"train": "head"},
    "trained in one computation": {"engine": "vmap"},
    "closed form first and last": {"warm_start": "ridge", "refit_head": True, "train": "head"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_run_goes_on_with_a_new_product(way: Mapping[str, Any]) -> None:
    draw(new_in=("lyon",))
    before = run(rounds=2, **way)
    add_products(RunDirectory.open(Path("run")), [NEW])
    after = run(rounds=2, extend=2, **way)
    assert labels() == [*KNOWN, NEW]
    assert counted(before)[-1] == counted(after)[-1] == set(STORES)
    photos = {c.client: c.num_examples for c in after.of(RoundFinished)[0].clients}
    if not way.get("secagg"):
        assert photos["lyon"] == (photos["metz"] or 0) + 4  # of five, one is held out


@pytest.mark.parametrize("later", [(), ("lyon", "nice")], ids=["nobody has it", "two stores get photos of it"])
def test_the_exact_head_is_that_of_a_run_with_the_product_from_the_start(later: tuple[str, ...]) -> None:
    draw()
    run("grown", rounds=1, **RIDGE)
    Path("products.txt").write_text("\n".join((*KNOWN, NEW)))
    run("whole", rounds=1, **RIDGE)
    draw(new_in=later, known=(*KNOWN, NEW))
    add_products(RunDirectory.open(Path("grown")), [NEW])
    for folder in ("grown", "whole"):
        run(folder, rounds=1, extend=1, **RIDGE)
    grown, whole = state("grown").model, state("whole").model
    assert grown.optimizer.keys() == whole.optimizer.keys()
    for name, vector in whole.optimizer.items():
        assert torch.equal(grown.optimizer[name], vector), name
    assert torch.equal(grown.params, whole.params)


def test_growing_what_was_saved_gives_the_same_bits_however_often() -> None:
    """What a server that is killed before its next commit does again."""
    draw(new_in=("lyon",))
    for folder in ("once", "twice"):
        run(folder, rounds=2, algorithm="fedavgm")
        add_products(RunDirectory.open(Path(folder)), [NEW])
    add_products(RunDirectory.open(Path("twice")), [NEW])  # which changes nothing
    for folder in ("once", "twice"):
        run(folder, rounds=2, extend=2, algorithm="fedavgm")
    assert torch.equal(state("once").model.params, state("twice").model.params)


def test_two_growths_are_one_of_both_products() -> None:
    draw()
    run(rounds=2)
    saved, directory = state(), RunDirectory.open(Path("run"))
    add_products(directory, [NEW])
    add_products(directory, ["fig"])
    run(rounds=2, extend=1)
    assert labels() == [*KNOWN, NEW, "fig"]
    assert state().classes == Catalogue((*KNOWN, NEW, "fig"), tuple((n,) for n in (*KNOWN, NEW, "fig"))).names_digest
    assert len(state().model.params) > len(saved.model.params)


def test_aliases_bring_in_photos_of_folders_with_other_names() -> None:
    draw()
    write_pack(Path("stores/lyon"), {"pomme": 5})
    before = run(rounds=1)
    add_aliases(RunDirectory.open(Path("run")), {"pomme": "apple"})
    after = run(rounds=1, extend=1)
    photos = [
        next(c.num_examples or 0 for c in sink.of(RoundFinished)[0].clients if c.client == "lyon")
        for sink in (before, after)
    ]
    assert photos[1] == photos[0] + 4
    assert labels() == list(KNOWN)


REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "noise": ({"dp": "client", "clip_norm": 1.0, "noise_multiplier": 1.0}, "--dp client: the noise of this run"),
    "encryption": ({"he": True, "clip_norm": 5.0}, "--he: the stores' keys"),
    "a teacher": ({"teacher_digest": "0" * 64}, "--teacher: the teacher does not know"),
    "no rounds": ({"algorithm": "fedbuff"}, "--algorithm fedbuff: there is no moment"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_grow_says_why(given: Mapping[str, Any], said: str) -> None:
    (problem,) = problems_with_changes(files.load(RunConfig, None, dict(given)))
    assert problem.startswith(said)


def test_the_command_refuses_a_run_that_cannot_grow() -> None:
    draw()
    run(rounds=1, algorithm="fedasync")
    text = Path("run/catalogue.json").read_text()
    with pytest.raises(UsageError, match="cannot change: --algorithm fedasync"):
        add_products(RunDirectory.open(Path("run")), [NEW])
    assert Path("run/catalogue.json").read_text() == text


def test_a_catalogue_that_lost_a_product_is_no_growth() -> None:
    draw()
    run(rounds=1)
    Catalogue((*KNOWN[1:], NEW), tuple((name,) for name in (*KNOWN[1:], NEW))).save(Path("run/catalogue.json"))
    with pytest.raises(RunError, match="has changed since round 1"):
        run(rounds=1, extend=1)


def test_a_name_that_is_taken_already_is_refused_with_all_others() -> None:
    draw()
    run(rounds=1)
    add_aliases(RunDirectory.open(Path("run")), {"pomme": "apple"})
    with pytest.raises(DataError) as caught:
        add_products(RunDirectory.open(Path("run")), ["pomme", "", "Apples", "Red/bread"])
    said = str(caught.value)
    for part in ("another name of the product 'apple'", "name is empty", "'Apples' and 'apple'", "'bread' is the end"):
        assert part in said


def test_what_a_client_keeps_says_of_how_many_products_it_is() -> None:
    draw()
    run(rounds=1, algorithm="scaffold")
    from fedshelf.storage.client_states import state_of, state_tensors
    from fedshelf.storage.tensor_files import read_tensors

    (path,) = Path("run/clients").glob("lyon*/*.safetensors")
    kept = state_of(read_tensors(path)[0])
    assert kept.num_classes == 3
    again: dict[str, Tensor] = state_tensors(replace(kept, num_classes=0))
    assert state_of(again).num_classes == 0  # written before the number was
