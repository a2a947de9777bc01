"""The catalogue changes while a server runs: clients set up again between two rounds, and none is lost on the way."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedshelf.app.run_catalogue import RunCatalogue, add_aliases, add_products
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.events import CatalogueChanged, ClientRefused, RunStatus
from fedshelf.core.messages import Ready, ServerMessage, Setup, TaskKey
from fedshelf.core.ports import Reply
from fedshelf.core.state import OpenRound
from fedshelf.data.catalogue import Catalogue
from fedshelf.rounds.growth import in_open_round
from fedshelf.rounds.server import Server
from fedshelf.storage.run_directory import RunDirectory
from tests.fakes import Answer
from tests.worlds import CLASSES, World

NAMES = (*CLASSES, "kiwi")
ALIASED = Catalogue(CLASSES, (("apple", "pomme"), ("milk",), ("tea",)))


class Growing(World):
    """A world whose server finds `changes` after the rounds of these numbers."""

    changes: dict[int, Catalogue]

    def server(self) -> Server:
        server = super().server()
        server._changed_catalogue = lambda: self.changes.pop(len(self.finished), None)
        return server


def test_other_names_of_products_are_used_from_the_next_round_on() -> None:
    world = Growing(num_rounds=3)
    world.changes = {2: ALIASED}
    setups: list[str] = []

    def seen(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Setup):
            setups.append(Catalogue.from_json(message.catalogue).digest)
        return honest

    world.tampers["a"] = seen
    assert world.run() is RunStatus.FINISHED
    (event,) = world.sink.of(CatalogueChanged)
    assert (event.round, event.added, event.catalogue_digest) == (2, (), ALIASED.digest)
    assert setups == [Catalogue(CLASSES, tuple((name,) for name in CLASSES)).digest, ALIASED.digest]
    assert [len(record.clients) for record in world.finished] == [3, 3, 3]
    unchanged = World(num_rounds=3)
    unchanged.run()
    assert torch.equal(world.final, unchanged.final)  # new names for folders that nobody has


def test_a_client_that_still_answers_the_setup_before_is_not_sent_away() -> None:
    world = Growing(num_rounds=2)
    world.changes = {1: ALIASED}
    former: list[Ready] = []

    def twice(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Ready):
            if former:  # the answer to the setup before arrives after the new one was sent
                world.transport.arrive(Reply(address="line-to-a", message=former[0], num_bytes=0))
            former.append(honest)
        return honest

    world.tampers["a"] = twice
    assert world.run() is RunStatus.FINISHED
    assert len(former) == 2
    assert world.sink.of(ClientRefused) == []
    assert [len(record.clients) for record in world.finished] == [3, 3]


@pytest.mark.parametrize(
    ("round", "classes", "number"),
    [(4, ALIASED.names_digest, 3), (3, ALIASED.names_digest, 4), (4, "", 4), (4, "of other products", 4)],
    ids=["open", "of an earlier round", "of an earlier version", "of another catalogue"],
)
def test_an_open_round_ends_with_the_products_that_it_began_with(round: int, classes: str, number: int) -> None:
    grown = Catalogue(NAMES, tuple((name,) for name in NAMES))
    opened = OpenRound(key=TaskKey(run_id="r", round=round, attempt=0), cohort=("a",), classes=classes)
    assert len(in_open_round(grown, opened, next_round=4)) == number
    assert in_open_round(grown, None, next_round=4) == grown


@pytest.fixture
def directory(home: Path) -> RunDirectory:
    found = RunDirectory.create(Path("run"), run_id="r", config_toml="", config_digest="d")
    Catalogue(CLASSES, tuple((name,) for name in CLASSES)).save(found.catalogue)
    return found


def test_a_server_notices_a_change_of_the_file_once(directory: RunDirectory) -> None:
    saved = RunCatalogue(directory, RunConfig())
    assert saved.changed() is None
    add_products(directory, ["kiwi"])
    add_aliases(directory, {"pomme": "apple"})
    found = saved.changed()
    assert found is not None
    assert found.names == NAMES
    assert found.members[0] == ("apple", "pomme")
    assert saved.changed() is None
    add_products(directory, ["kiwi"])  # is there already
    assert saved.changed() is None


BAD: dict[str, tuple[Callable[[Path], object], RunConfig, str]] = {
    "cut": (lambda path: path.write_text('{"format":'), RunConfig(), "cannot be used"),
    "shorter": (
        lambda path: Catalogue(CLASSES[:2], (("apple",), ("milk",))).save(path), RunConfig(), "were removed",
    ),
    "without an alias": (
        lambda path: Catalogue(CLASSES, (("apfel",), ("milk",), ("tea",))).save(path), RunConfig(), "names of products",
    ),
    "with noise": (
        lambda path: Catalogue(NAMES, tuple((name,) for name in NAMES)).save(path),
        files.load(RunConfig, None, {"dp": "client", "clip_norm": 1.0, "noise_multiplier": 1.0}), "--dp client",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("write", "config", "said"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_growth_of_the_catalogue_is_not_used(
    directory: RunDirectory, write: Callable[[Path], object], config: RunConfig, said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    saved = RunCatalogue(directory, config)
    write(directory.catalogue)
    with caplog.at_level(logging.WARNING):
        assert saved.changed() is None
        assert saved.changed() is None
    assert said in caplog.text
    assert caplog.text.count("is not used") == 1


def test_a_run_whose_catalogue_is_not_made_yet_has_nothing_to_add_to(home: Path) -> None:
    directory = RunDirectory.create(Path("run"), run_id="r", config_toml="", config_digest="d")
    with pytest.raises(UsageError, match="no catalogue yet"):
        add_products(directory, ["kiwi"])


def test_a_catalogue_given_at_the_start_is_saved_once(home: Path) -> None:
    directory = RunDirectory.create(Path("run"), run_id="r", config_toml="", config_digest="d")
    RunCatalogue(directory, RunConfig()).use(ALIASED)
    resumed = RunCatalogue(directory, RunConfig())
    add_products(directory, ["kiwi"])  # between a resumed server's reading and its start
    resumed.use(ALIASED)
    assert Catalogue.load(directory.catalogue).names == NAMES
    found = resumed.changed()
    assert found is not None
    assert found.names == NAMES
