"""Photos of unknown products wait in the inbox, are counted, and are filed once the catalogue has their product."""

import hashlib
import json
import logging
from pathlib import Path

import pytest

from fedshelf.data.catalogue import Catalogue
from fedshelf.edge.serving.correction_journal import Correction, Status
from fedshelf.edge.serving.corrections import JOURNAL, Corrections
from fedshelf.edge.serving.inbox import Inbox
from fedshelf.edge.serving.photo_copy import clean_copy
from tests.edge_models import photo
from tests.unit.cli.screen import run
from tests.unit.data.samples import write_pack

KNOWN = ("apple", "milk")
STORE = Path("lyon")
BEFORE = Catalogue(KNOWN, tuple((name,) for name in KNOWN))
AFTER = Catalogue(
    (*KNOWN, "Exotic/Kiwi", "fig"), (("apple",), ("milk",), ("Exotic/Kiwi", "chinese gooseberry"), ("fig",))
)


@pytest.fixture
def store(home: Path) -> Corrections:
    write_pack(STORE, dict.fromkeys(KNOWN, 3))
    return Corrections(STORE, labels=KNOWN, paths=KNOWN)


def correct(store: Corrections, shade: int, product: str) -> Correction:
    data = photo((shade, 20, 90))
    return store.file(clean_copy(data), product, source=hashlib.sha256(data).hexdigest())


def test_photos_are_filed_under_the_product_whatever_the_staff_called_it(store: Corrections) -> None:
    made = [correct(store, 10 * number, name) for number, name in enumerate(("KIWI", "chinese gooseberry", "mango"))]
    said: list[str] = []
    inbox = Inbox(STORE, say=said.append)
    inbox.look(BEFORE)
    inbox.look(BEFORE)
    waits = "does not train on 1 photo of 'KIWI', 1 photo of 'chinese gooseberry', 1 photo of 'mango' in the inbox"
    assert said == [f"{waits}: the catalogue does not have them"]
    inbox.look(AFTER)
    assert said[1] == "trains on 2 photos of 'Exotic/Kiwi' from the inbox, now that the catalogue has them"
    assert [correction.status for correction in store.all()] == [Status.TRAINING, Status.TRAINING, Status.INBOX]
    assert {path.name for path in (STORE / "Exotic/Kiwi").iterdir()} == {f"correction-{c.id}.jpg" for c in made[:2]}
    assert said[2:] == ["does not train on 1 photo of 'mango' in the inbox: the catalogue does not have them"]
    store.undo(made[0].id)
    assert [path.name for path in (STORE / "Exotic/Kiwi").iterdir()] == [f"correction-{made[1].id}.jpg"]


def test_the_folder_that_a_store_has_already_is_taken(store: Corrections) -> None:
    made = correct(store, 50, "fig")
    write_pack(STORE / "Fruit", {"fig": 2})
    Inbox(STORE, say=lambda line: None).look(AFTER)
    assert (STORE / f"Fruit/fig/correction-{made.id}.jpg").is_file()


def test_a_damaged_journal_costs_the_photos_in_the_inbox_only(
    store: Corrections, caplog: pytest.LogCaptureFixture
) -> None:
    correct(store, 50, "fig")
    correct(store, 60, "fig")
    journal = STORE / JOURNAL
    journal.write_bytes(journal.read_bytes().replace(b'"fig"', b'"gif"', 1))
    inbox = Inbox(STORE, say=lambda line: None)
    with caplog.at_level(logging.WARNING):
        inbox.look(AFTER)
        inbox.look(AFTER)
    assert caplog.text.count("the inbox of corrections cannot be used") == 1
    assert not (STORE / "fig").exists()


def test_data_check_counts_the_inbox(store: Corrections) -> None:
    correct(store, 50, "fig")
    correct(store, 60, "fig")
    code, text = run("data", "check", str(STORE), "--json")
    assert code == 0
    assert json.loads(text)["inbox"] == {"fig": 2}
    assert "2 photos of the unknown product 'fig' in the inbox, not trained on" in run("data", "check", str(STORE))[1]


def test_a_folder_without_corrections_is_left_as_it_is(home: Path) -> None:
    write_pack(STORE, {"apple": 2})
    Inbox(STORE, say=lambda line: None).look(AFTER)
    code, text = run("data", "check", str(STORE), "--json")
    assert code == 0
    assert json.loads(text)["inbox"] == {}
    assert sorted(path.name for path in STORE.iterdir()) == ["apple"]
