"""Corrected photos are filed among the training photos, in the inbox, or for review."""

import hashlib
import io
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from fedshelf.core.errors import DataError, RunError, UsageError
from fedshelf.core.guess import Guess
from fedshelf.data.folder import scan
from fedshelf.edge.serving import corrections as module
from fedshelf.edge.serving.correction_journal import Correction, Status
from fedshelf.edge.serving.corrections import (
    DAILY_CAP,
    Corrections,
    TooManyWaitingError,
    UnknownCorrectionError,
    unknown_products,
)
from fedshelf.edge.serving.photo_copy import MAX_SIDE, clean_copy
from tests.edge_models import photo

LABELS = ("Gala", "Pear", "Milk")
PATHS = ("Fruit/Apple/Gala", "Fruit/Pear", "Dairy/Milk")
RED = photo((200, 10, 10))


def open_store(root: Path, daily_cap: int = DAILY_CAP) -> Corrections:
    return Corrections(root, labels=LABELS, paths=PATHS, daily_cap=daily_cap)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for path in ("Apples/Gala", "Fruit/Pear", "Own brand"):
        folder = tmp_path / "store" / path
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(photo((1, 2, 3)))
    return tmp_path / "store"


def file(corrections: Corrections, product: str, data: bytes = RED, guess: Guess | None = None) -> Correction:
    return corrections.file(clean_copy(data), product, source=hashlib.sha256(data).hexdigest(), guess=guess)


def scanned(store: Path) -> set[str]:
    found = scan(store, val_fraction=0.0, seed=0)
    assert not found.findings  # what is private is left out in silence
    return {str(found.path.relative_to(store)) for found in found.train}


BEFORE = {"Apples/Gala/a.jpg", "Fruit/Pear/a.jpg", "Own brand/a.jpg"}


def test_a_corrected_photo_lies_in_the_stores_folder_for_the_product_and_is_scanned(store: Path) -> None:
    made = file(open_store(store), "Gala")
    assert made.status is Status.TRAINING
    assert made.path == f"Apples/Gala/correction-{made.id}.jpg"  # the store's own folder, not the model's path
    assert scanned(store) == BEFORE | {made.path}
    assert hashlib.sha256((store / made.path).read_bytes()).hexdigest() == made.photo
    assert stat.S_IMODE((store / made.path).stat().st_mode) & 0o600 == 0o600


def test_a_product_of_the_model_without_a_folder_gets_the_models_path(store: Path) -> None:
    assert file(open_store(store), "Milk").path.startswith("Dairy/Milk/correction-")


def test_a_product_that_only_the_store_has_lies_in_its_folder(store: Path) -> None:
    assert file(open_store(store), "Own brand").path.startswith("Own brand/correction-")


def test_a_name_in_another_case_is_the_same_product(store: Path) -> None:
    assert file(open_store(store), "gALA").product == "Gala"


def test_training_photos_in_a_train_folder_get_corrections_there(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "Gala").mkdir(parents=True)
        (tmp_path / part / "Gala" / "a.jpg").write_bytes(photo((1, 2, 3)))
    corrections = open_store(tmp_path)
    made = file(corrections, "Gala")
    assert made.path == f"train/Gala/correction-{made.id}.jpg"
    new = corrections.accept(file(corrections, "Kiwi", photo((9, 9, 9))).id)
    assert new.path == f"train/Kiwi/correction-{new.id}.jpg"


def test_an_unknown_product_waits_in_the_inbox_which_no_scan_sees(store: Path) -> None:
    corrections = open_store(store)
    first = file(corrections, "Dragon fruit")
    file(corrections, "Dragon fruit", photo((3, 3, 3)))
    assert first.status is Status.INBOX
    assert (store / first.path).is_file()
    assert scanned(store) == BEFORE
    assert unknown_products(corrections.all()) == {"Dragon fruit": 2}


def test_a_correction_against_a_very_sure_model_is_held_until_it_is_accepted(store: Path) -> None:
    corrections = open_store(store)
    held = file(corrections, "Gala", guess=Guess(label="Pear", probability=0.985))
    assert held.status is Status.REVIEW
    assert held.reason == "the model is 98.5 % sure that it is Pear"
    assert scanned(store) == BEFORE
    accepted = corrections.accept(held.id)
    assert accepted.status is Status.TRAINING
    assert scanned(store) == BEFORE | {f"Apples/Gala/correction-{held.id}.jpg"}
    assert not (store / held.path).exists()


@pytest.mark.parametrize("guess", [Guess(label="Pear", probability=0.97), Guess(label="Gala", probability=1.0)])
def test_an_unsure_or_agreeing_model_holds_nothing(store: Path, guess: Guess) -> None:
    assert file(open_store(store), "Gala", guess=guess).status is Status.TRAINING


def test_a_rejected_photo_is_deleted(store: Path) -> None:
    corrections = open_store(store)
    held = file(corrections, "Gala", guess=Guess(label="Pear", probability=0.99))
    assert corrections.reject(held.id).status is Status.REJECTED
    assert not (store / held.path).exists()
    with pytest.raises(UnknownCorrectionError, match="it is rejected"):
        corrections.accept(held.id)


def test_corrections_above_the_daily_cap_are_held(store: Path) -> None:
    corrections = open_store(store, daily_cap=2)
    statuses = [file(corrections, "Gala", photo((n, 0, 0))).status for n in (50, 100, 150)]
    assert statuses == [Status.TRAINING, Status.TRAINING, Status.REVIEW]


def test_an_accepted_new_product_gets_a_folder_of_its_name(store: Path) -> None:
    corrections = open_store(store)
    accepted = corrections.accept(file(corrections, "火龙果").id)
    assert accepted.path.startswith("火龙果/correction-")
    assert accepted.path in scanned(store)


def test_an_undone_correction_is_deleted_and_may_be_made_again(store: Path) -> None:
    corrections = open_store(store)
    made = file(corrections, "Gala")
    assert corrections.undo(made.id).status is Status.UNDONE
    assert scanned(store) == BEFORE
    with pytest.raises(UnknownCorrectionError, match="it is undone"):
        corrections.undo(made.id)
    assert file(corrections, "Gala").id != made.id


def test_an_unknown_id_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="has no correction 'abc'"):
        open_store(store).undo("abc")


def test_the_same_photo_for_the_same_product_is_filed_once(store: Path) -> None:
    assert file(open_store(store), "Gala").id == file(open_store(store), "Gala").id
    assert len(scanned(store)) == len(BEFORE) + 1


def test_the_same_photo_for_another_product_replaces_the_earlier_correction(store: Path) -> None:
    corrections = open_store(store)
    first, second = file(corrections, "Gala"), file(corrections, "Pear")
    assert scanned(store) == BEFORE | {second.path}
    assert [c.status for c in open_store(store).all()] == [Status.REPLACED, Status.TRAINING]
    assert not (store / first.path).exists()


def test_what_one_process_files_another_one_knows(store: Path) -> None:
    one, other = open_store(store), open_store(store)
    made = file(one, "Gala")
    assert other.undo(made.id).status is Status.UNDONE
    assert one.all()[0].status is Status.UNDONE


def test_many_at_once_are_all_filed(store: Path) -> None:
    several = [open_store(store) for _ in range(4)]

    def work(n: int) -> Correction:
        return file(several[n % 4], "Gala", photo((n * 5, 255 - n * 5, n)))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(work, range(40)))
    assert scanned(store) == BEFORE | {correction.path for correction in made}
    assert len(open_store(store).all()) == 40


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "a\0b", "a\nb", "\u202egnp", "\ud800"])
def test_a_name_that_nobody_can_type_is_refused(store: Path, name: str) -> None:
    with pytest.raises(DataError, match="product"):
        file(open_store(store), name)
    assert scanned(store) == BEFORE


@pytest.mark.parametrize(
    "name",
    ["../../etc", "/etc/passwd", "..", ".", ".hidden", "a/../../b", "x.jpg", "@eaDir", "..\\..\\x", "~", "train"],
)
def test_a_hostile_name_stays_in_the_inbox(store: Path, name: str) -> None:
    corrections = open_store(store)
    made = file(corrections, name)
    assert (store / made.path).resolve().is_relative_to((store / ".fedshelf/inbox").resolve())
    assert made.status is Status.INBOX
    assert scanned(store) == BEFORE
    with_folders = {path for path in store.parent.rglob("*") if path.is_dir()}
    assert with_folders - {store, *store.rglob("*")} == set()


@pytest.mark.parametrize("name", ["..", "a/../../b", ".hidden", "x.jpg", "@eaDir", "/etc"])
def test_a_hostile_name_cannot_be_accepted(store: Path, name: str) -> None:
    corrections = open_store(store)
    made = file(corrections, name)
    with pytest.raises(DataError, match="cannot be a product's folder"):
        corrections.accept(made.id)
    assert corrections.all()[0].status is Status.INBOX


@pytest.mark.parametrize("path", ["../../Milk", "/Milk", ".x/Milk", "Dairy/../../Milk"])
def test_a_hostile_models_path_is_refused(store: Path, path: str) -> None:
    corrections = Corrections(store, labels=LABELS, paths=(*PATHS[:2], path))
    with pytest.raises(DataError, match="cannot be a product's folder"):
        file(corrections, "Milk")


def test_a_private_folder_that_is_a_link_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (store / ".fedshelf").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="link"):
        open_store(store)


def test_too_many_waiting_photos_are_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    corrections = open_store(store)
    file(corrections, "New")
    with pytest.raises(TooManyWaitingError, match="1 correction wait"):
        file(corrections, "Newer", photo((9, 9, 9)))


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("fails_at", ["photo", "journal"])
def test_a_full_disk_is_an_error_and_nothing_is_filed(store: Path, fails_at: str) -> None:
    corrections = open_store(store)
    for n in (50, 100, 150):  # so that the journal is longer than a photo
        file(corrections, "Pear", photo((n, 9, 9)))
    copy, journal = clean_copy(RED), store / module.JOURNAL
    journal_before, before = journal.read_bytes(), scanned(store)
    assert 100 < len(copy) < len(journal_before)
    with (
        full_disk(100 if fails_at == "photo" else len(journal_before) + 50),
        pytest.raises(RunError, match="no file of this"),
    ):
        corrections.file(copy, "Gala", source="a" * 64)
    assert journal.read_bytes() == journal_before
    assert scanned(store) == before
    assert not list((store / ".fedshelf/staging").iterdir())
    assert file(corrections, "Gala").status is Status.TRAINING


def test_a_copy_has_no_metadata_and_is_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 60, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x013B] = "Jane Doe"
    exif.get_ifd(0x8825)[1] = "N"
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95, comment=b"SECRET")
    assert b"Jane" in out.getvalue()
    copy = clean_copy(out.getvalue())
    assert not [word for word in (b"Exif", b"Jane", b"SECRET", b"http") if word in copy]
    turned = Image.open(io.BytesIO(copy))
    assert turned.size == (40, 60)
    assert turned.getpixel((35, 30))[2] > 200  # type: ignore[index]  # the blue band is on the right
    assert not turned.getexif()


def test_a_large_photo_is_made_smaller(tmp_path: Path) -> None:
    assert Image.open(io.BytesIO(clean_copy(photo((1, 2, 3), (4000, 1000))))).size == (MAX_SIDE, 400)


def test_what_is_not_a_photo_cannot_be_copied() -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        clean_copy(b"GIF89a nonsense")


KILLED = r'''
import os, signal, sys
from pathlib import Path
from fedshelf.edge.serving.corrections import Corrections

root, action = Path(sys.argv[1]), sys.argv[2]
copy = b"\xff\xd8" + bytes(5000)
CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "ftruncate")

def run(store, stop_at):
    """Do the action, and kill this process before its n-th call of the system, or in the middle of a write."""
    corrections = Corrections(store, labels=("Gala", "Pear"), paths=("A/Gala", "A/Pear"))
    made = {c.product: c.id for c in corrections.all()}
    calls = 0
    def guard(call, name):
        def guarded(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                if name == "write":
                    call(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return guarded
    for name in CALLS:
        setattr(os, name, guard(getattr(os, name), name))
    if action == "file":
        corrections.file(copy, "Gala", source="new")
    elif action == "replace":
        corrections.file(copy, "Pear", source="old")
    elif action == "undo":
        corrections.undo(made["Gala"])
    elif action == "accept":
        corrections.accept(made["Kiwi"])
    os._exit(0)

def prepare(store):
    (store / "A/Pear").mkdir(parents=True)
    (store / "A/Pear/x.jpg").write_bytes(b"x")
    corrections = Corrections(store, labels=("Gala", "Pear"), paths=("A/Gala", "A/Pear"))
    if action in ("replace", "undo"):
        corrections.file(copy, "Gala", source="old")
    if action == "accept":
        corrections.file(copy, "Kiwi", source="old")

def photos(store):
    return sorted(str(p.relative_to(store)) for p in store.rglob("correction-*.jpg") if not p.name.startswith("."))

outcomes, n, done = set(), 0, False
while not done:
    n += 1
    store = root / str(n)
    prepare(store)
    before = photos(store)
    pid = os.fork()
    if not pid:
        run(store, n)
    status = os.waitpid(pid, 0)[1]
    done = not os.WIFSIGNALED(status)
    assert done == (status == 0), status
    in_training = [p for p in store.glob("A/*/correction-*.jpg")] + list(store.glob("Kiwi/correction-*.jpg"))
    assert all(p.read_bytes() == copy for p in in_training), f"half a photo after {n}"
    corrections = Corrections(store, labels=("Gala", "Pear"), paths=("A/Gala", "A/Pear"))  # another process
    known = [c for c in corrections.all() if c.status in ("training", "inbox", "review")]
    assert photos(store) == sorted(c.path for c in known), (n, photos(store), known)
    assert all((store / c.path).read_bytes() == copy for c in known)
    leftovers = [p for p in store.rglob("*") if p.suffix == ".tmp"]
    assert not leftovers, leftovers
    outcomes.add(photos(store) == before)
print(n, sorted(outcomes))
'''


@pytest.mark.parametrize("action", ["file", "replace", "undo", "accept"])
def test_a_process_killed_at_any_system_call_leaves_a_change_whole_or_absent(tmp_path: Path, action: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), action], check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points, outcomes = done.stdout.split(maxsplit=1)
    assert int(points) > {"file": 20, "replace": 20, "undo": 8, "accept": 12}[action]
    assert outcomes.strip() == "[False, True]"  # some were killed before the change, some after
