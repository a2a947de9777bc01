"""The ledger: what left is in it before it leaves, and what is in it cannot be changed unnoticed."""

import csv
import hashlib
import json
import math
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedshelf.app.client_place import ClientPlace
from fedshelf.cli.app import app
from fedshelf.core.errors import RunError
from fedshelf.core.messages import ClientMessage, Failure, Join, TaskKey, Upload
from fedshelf.core.ports import ReleaseTerms
from fedshelf.deploy.records import to_parcel
from fedshelf.identity.audit_log import AuditLog
from fedshelf.identity.countersignatures import Countersignature, LedgerHeads
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.ledger import Ledger
from fedshelf.privacy.ledger_content import FILE, HEAD_FILE, OtherLedgers, Recipient, Release, read
from fedshelf.storage.hash_chain import START, DamagedLogError, HashChain, Head

STORE = KeyPair.generate()
FIRST, SECOND = Recipient(server="a.example:9092", chain="A" * 43), Recipient(server="b.example:9092", chain="B" * 43)
JOIN = Join(protocol=1, version="0.1.0", client="lyon", classes=())


def upload(round: int, value: float = 1.0) -> Upload:
    key = TaskKey(run_id="r", round=round, attempt=0)
    return Upload(
        key=key, vectors={"delta": torch.full((50,), value)}, num_examples=1, num_steps=1, train_loss=0.5, seconds=0.1
    )


def intended(ledger: Ledger, message: ClientMessage, to: Recipient = FIRST) -> Release:
    parcel = to_parcel(message)
    return ledger.intend(message, parcel.payload(), blob=parcel.blob_digest, to=to)


class Server:
    """The server's half, in a folder: what it does with each answer of one store."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.keys, self.audit = KeyPair.generate(), AuditLog(folder)
        self.heads = LedgerHeads(folder / "ledgers", self.keys, self.audit)

    def receive(self, ledger: Ledger, message: Upload, key: KeyPair = STORE) -> Countersignature:
        release = intended(ledger, message)
        shown = {"number": ledger.head.number, "hash": ledger.head.hash}
        found = self.heads.countersign("lyon", key.public, shown)
        assert found is not None
        ledger.confirm(release, found)
        return found

    def events(self) -> list[str]:
        return [str(event["event"]) for event in self.audit.events()]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "server")


@pytest.fixture
def store(tmp_path: Path, server: Server) -> Path:
    """A state directory whose ledger has five releases in ten entries, all countersigned but for the last entry."""
    folder = tmp_path / "store"
    folder.mkdir()
    ledger = Ledger(folder)
    for number in range(1, 6):
        server.receive(ledger, upload(number))
    return folder


def lines(folder: Path) -> list[str]:
    return (folder / FILE).read_text().splitlines(keepends=True)


def write(folder: Path, content: list[str]) -> None:
    (folder / FILE).write_text("".join(content))


def rewrite(folder: Path, first: int) -> None:
    """Forge the ledger from line `first` on: a smaller upload, and a chain that is right again."""
    old = [json.loads(line) for line in lines(folder)]
    write(folder, lines(folder)[: first - 1])
    for fields in old[first - 1 :]:
        kept = {name: value for name, value in fields.items() if name not in ("number", "time", "before")}
        HashChain(folder / FILE).append(kept | ({"num_bytes": 1} if "num_bytes" in kept else {}))


def test_a_release_is_on_the_disk_before_its_bytes_leave_and_confirmed_when_they_have_arrived(tmp_path: Path) -> None:
    ledger, message = Ledger(tmp_path), upload(3)
    ledger.declare(
        message, ReleaseTerms(purpose="train", protections=("clip-norm 1",), mechanism={"a": 1}, epsilon=0.5)
    )
    release = intended(ledger, message)
    parcel = to_parcel(message)
    payload = json.dumps(
        json.loads(parcel.records["header"]["json"]), ensure_ascii=False, separators=(",", ":")
    ).encode()
    payload += parcel.blob.join()
    (found,) = read(tmp_path).releases
    assert found == replace(release, time=found.time)
    assert (found.num_bytes, found.digest) == (len(payload), hashlib.sha256(payload).hexdigest())
    assert (found.kind, found.purpose, found.run_id, found.round, found.attempt) == ("upload", "train", "r", 3, 0)
    assert (found.protections, found.mechanism, found.epsilon) == (("clip-norm 1",), {"a": 1}, 0.5)
    assert found.blob == parcel.blob.digest
    assert not found.is_sent
    assert ledger.has_left(TaskKey(run_id="r", round=3, attempt=0))
    assert not ledger.has_left(TaskKey(run_id="r", round=3, attempt=1))
    ledger.confirm(release)
    assert [found.is_sent for found in read(tmp_path).releases] == [True]


def test_what_was_declared_of_one_reply_is_not_said_of_another(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.declare(upload(1), ReleaseTerms(purpose="train", protections=("clip-norm 1",)))
    others: list[ClientMessage] = [
        JOIN,
        upload(2),
        Failure(reason="no memory", key=TaskKey(run_id="r", round=1, attempt=0)),
    ]
    assert [intended(ledger, other).protections for other in others] == [()] * 3


def test_the_same_bytes_sent_again_are_one_release_also_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        ledger = Ledger(tmp_path)
        for _ in range(2):
            release = intended(ledger, upload(1))
    ledger.confirm(release)
    for opened in (ledger, Ledger(tmp_path)):
        again = intended(opened, upload(1))
        opened.confirm(again)
        assert opened.head.number == 2
    intended(ledger, upload(1, value=2.0))
    assert [release.is_sent for release in read(tmp_path).releases] == [True, False]


@pytest.mark.parametrize("entry", range(1, 11))
def test_one_flipped_byte_is_found_and_its_entry_named(store: Path, entry: int) -> None:
    whole = (store / FILE).read_bytes()
    start = sum(len(line.encode()) for line in lines(store)[: entry - 1])
    length = len(lines(store)[entry - 1].encode())
    for at in [*random.Random(entry).sample(range(length), 30), length - 1]:
        flipped = bytearray(whole)
        flipped[start + at] ^= 1
        (store / FILE).write_bytes(flipped)
        with pytest.raises(DamagedLogError, match=rf"entry {entry} "):
            read(store)
    (store / FILE).write_bytes(whole)
    assert len(read(store).releases) == 5


def test_a_flipped_byte_of_the_file_with_the_head_is_found(store: Path) -> None:
    path = store / HEAD_FILE
    whole = path.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 60):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        if json_or_none(flipped) == json.loads(whole):
            continue  # nothing but how the JSON is written
        with pytest.raises(DamagedLogError, match=HEAD_FILE.replace(".", r"\.") + "|entry"):
            read(store)


def json_or_none(content: bytes | bytearray) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a removed entry": (lambda folder: write(folder, lines(folder)[:3] + lines(folder)[4:]), "entry 4 "),
    "a swapped pair": (
        lambda folder: write(folder, [*lines(folder)[:3], lines(folder)[4], lines(folder)[3], *lines(folder)[5:]]),
        "entry 4 ",
    ),
    "a cut tail": (lambda folder: write(folder, lines(folder)[:8]), "entry 9 is missing"),
    "a tail cut within a line": (lambda folder: write(folder, [*lines(folder)[:8], lines(folder)[8][:20]]), "entry 9 "),
    "a removed ledger": (lambda folder: (folder / FILE).unlink(), "entry 1 is missing"),
    "a rewritten chain": (lambda folder: rewrite(folder, 3), "entry 3 is not the one that the server has count"),
    "a rewritten tail": (lambda folder: rewrite(folder, 9), "entry 9 is not the one that the server has countersigned"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_first_bad_entry_named(store: Path, damage: str) -> None:
    harm, said = DAMAGES[damage]
    harm(store)
    with pytest.raises(DamagedLogError, match=said):
        read(store)
    with pytest.raises(DamagedLogError):
        Ledger(store)


@pytest.mark.parametrize("harm", [lambda folder: write(folder, lines(folder)[:8]), lambda folder: rewrite(folder, 3)])
def test_a_cut_tail_and_a_rewritten_chain_show_without_the_head_that_this_store_kept(
    store: Path, harm: Callable[[Path], None]
) -> None:
    path = store / HEAD_FILE
    fields = json.loads(path.read_text())
    harm(store)
    head = HashChain(store / FILE).head()
    path.write_text(json.dumps({**fields, "number": head.number, "hash": head.hash}))  # as the forger would
    with pytest.raises(DamagedLogError, match=r"countersigned"):
        read(store)


def test_a_countersignature_cannot_be_forged(store: Path) -> None:
    entry = json.loads(lines(store)[9])["countersignature"]
    rewrite(store, 3)
    head = HashChain(store / FILE).head()
    forged = {**entry, "head": {"number": head.number, "hash": head.hash}}
    HashChain(store / FILE).append({"event": "sent", "entry": 9, "digest": "", "countersignature": forged})
    with pytest.raises(DamagedLogError, match="entry 11 is not one that FedShelf writes"):
        read(store)


def test_an_old_copy_of_the_whole_directory_shows_at_the_next_release(
    tmp_path: Path, store: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(store, tmp_path / "backup")
    server.receive(Ledger(store), upload(6))
    shutil.rmtree(store)
    (tmp_path / "backup").rename(store)
    assert len(read(store).releases) == 5  # nobody here knows better
    with pytest.raises(DamagedLogError, match="entry 11 is not the one that the server had seen before"):
        server.receive(Ledger(store), upload(7, value=3.0))
    assert "the ledger of 'lyon' forked: it ended at entry 11 before, and now at 11" in caplog.text
    assert server.events().count("ledger forked") == 1
    for opened in (read, Ledger):  # nor does it start again
        with pytest.raises(DamagedLogError, match="entry 11 is not the one that the server had seen before"):
            opened(store)


def test_an_old_copy_shows_also_if_nothing_new_is_sent(tmp_path: Path, store: Path, server: Server) -> None:
    shutil.copytree(store, tmp_path / "backup")
    server.receive(Ledger(store), upload(6))
    shutil.rmtree(store)
    (tmp_path / "backup").rename(store)
    with pytest.raises(DamagedLogError, match="entry 11 is missing"):
        server.receive(Ledger(store), upload(5))  # as a join, which has the same bytes each time
    with pytest.raises(DamagedLogError, match="entry 11 is missing"):
        Ledger(store)


def test_a_ledger_that_begins_anew_is_reported_by_the_server_and_a_new_key_accepts_that(
    tmp_path: Path, store: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    fresh, key = tmp_path / "fresh", KeyPair.generate()
    fresh.mkdir()
    server.receive(Ledger(fresh), upload(1), key)
    assert "the ledger of 'lyon' went back: it ended at entry 9 before, and now at 1" in caplog.text
    assert server.events()[-1] == "ledger went back"
    assert len(read(fresh).releases) == 1
    shutil.rmtree(fresh)
    fresh.mkdir()
    with pytest.raises(DamagedLogError, match="entry 1 is not the one"):
        server.receive(Ledger(fresh), upload(1), key)  # with the key that the server knows
    with pytest.raises(DamagedLogError, match="entry 1 is not the one"):
        read(fresh)


@pytest.mark.parametrize("cut", [False, True])
def test_a_missing_file_with_the_head_is_damage_and_countersignatures_in_entries_are_used(
    store: Path, cut: bool
) -> None:
    (store / HEAD_FILE).unlink()
    if cut:
        write(store, lines(store)[:-4])
    said = "6 entries, countersigned up to entry 5" if cut else "10 entries, countersigned up to entry 9"
    with pytest.raises(DamagedLogError, match=rf"ledger-head\.json' is missing, .* it has {said}\."):
        read(store)
    code, text = shown(str(store), "--verify")
    assert code == 1
    assert "is missing" in text
    rewrite(store, 3)
    with pytest.raises(DamagedLogError, match="entry 3 is not the one that the server has countersigned"):
        read(store)


@pytest.mark.parametrize("trace", ["accepted-tasks.jsonl", "setup.json", "model.safetensors", "model/m", "rounds/r/x"])
def test_a_missing_ledger_in_a_used_state_directory_is_damage(tmp_path: Path, trace: str) -> None:
    (tmp_path / "rounds").mkdir()  # each client makes this one when it starts
    (tmp_path / "client.json").write_text("{}")
    Ledger(tmp_path)
    assert shown(str(tmp_path), "--verify")[0] == 0
    (tmp_path / trace).parent.mkdir(exist_ok=True)
    (tmp_path / trace).touch()
    with pytest.raises(DamagedLogError, match=r"ledger\.jsonl' is missing, although something has left this store"):
        Ledger(tmp_path)
    code, text = shown(str(tmp_path), "--verify")
    assert code == 1
    assert "is missing, although something has left this store" in text


def test_the_file_with_the_head_is_there_before_the_first_entry(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    intended(ledger, JOIN)  # and the power fails
    assert len(read(tmp_path).releases) == 1
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(DamagedLogError, match="countersigned up to entry 0"):
        read(tmp_path)


def test_the_same_bytes_to_another_server_are_another_release_and_both_name_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for who in (FIRST, SECOND, FIRST):
        ledger.confirm(intended(ledger, JOIN, who))
    ledger.intend_crash_report(b"died", SECOND)
    ledger = Ledger(tmp_path)
    assert intended(ledger, JOIN, SECOND).is_sent
    found = read(tmp_path)
    assert [(one.server, one.chain) for one in found.releases] == [
        (who.server, who.chain) for who in (FIRST, SECOND, SECOND)
    ]
    code, text = shown(str(tmp_path), columns=200)
    assert code == 0
    assert [text.count(who.server) for who in (FIRST, SECOND)] == [2, 3]
    assert text.splitlines()[-1].split() == [SECOND.server, "2", text.splitlines()[-1].split()[2], "B", SECOND.chain]
    assert SECOND.chain in shown(str(tmp_path))[1]
    told = json.loads(shown(str(tmp_path), "--json")[1])["releases"]
    rows = list(csv.DictReader(shown(str(tmp_path), "--csv")[1].splitlines()))
    for listed in (told, rows):
        assert [(one["server"], one["chain"]) for one in listed] == [(one.server, one.chain) for one in found.releases]


def test_an_epsilon_has_its_delta_and_is_infinite_without_noise(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    intended(ledger, JOIN)
    intended(ledger, upload(1))
    for number, (epsilon, delta) in enumerate([(math.inf, 1e-5), (0.5, 1e-6)], start=2):
        ledger.declare(upload(number), ReleaseTerms(purpose="train", mechanism={"a": 1}, epsilon=epsilon), delta=delta)
        intended(ledger, upload(number))
    assert "Infinity" not in (tmp_path / FILE).read_text()
    expected = [(None, None), (math.inf, None), (math.inf, 1e-5), (0.5, 1e-6)]
    assert [(one.epsilon, one.delta) for one in Ledger(tmp_path).releases] == expected
    told = json.loads(shown(str(tmp_path), "--json")[1])["releases"]
    assert [(one["epsilon"], one["delta"]) for one in told] == [
        (None, None), ("inf", None), ("inf", 1e-5), (0.5, 1e-6),
    ]  # fmt: skip
    rows = list(csv.DictReader(shown(str(tmp_path), "--csv")[1].splitlines()))
    assert [(row["epsilon"], row["delta"]) for row in rows] == [
        ("", ""), ("inf", ""), ("inf", "1e-05"), ("0.5", "1e-06"),
    ]  # fmt: skip
    table = shown(str(tmp_path), columns=200)[1].splitlines()
    assert [name for name in table[0].split() if name in "εδ"] == ["ε", "δ"]
    assert [line.split()[8:10] for line in table[2:5]] == [["inf", "–"], ["inf", "1e-05"], ["0.500", "1e-06"]]


def test_the_delta_of_all_entries_is_below_the_table(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.declare(upload(1), ReleaseTerms(purpose="train", mechanism={"a": 1}, epsilon=0.5), delta=1e-5)
    intended(ledger, upload(1))
    assert "ε is that of the photos so far, with δ = 1e-05." in shown(str(tmp_path))[1]


def test_a_ledger_of_an_older_version_can_be_read(tmp_path: Path) -> None:
    old: dict[str, object] = {
        "event": "intended", "kind": "upload", "purpose": "train", "run_id": "r", "round": 1, "attempt": 0,
        "num_bytes": 3, "digest": "d", "blob": "", "protections": [], "mechanism": None, "epsilon": None,
    }  # fmt: skip
    HashChain(tmp_path / FILE).append(old)
    head = HashChain(tmp_path / FILE).append(old | {"mechanism": {"a": 1}, "epsilon": math.inf, "digest": "e"})
    fields = {"number": head.number, "hash": head.hash, "countersignatures": []}
    (tmp_path / HEAD_FILE).write_text(json.dumps(fields))
    found = Ledger(tmp_path).releases
    assert [(one.server, one.chain, one.epsilon, one.delta) for one in found] == [("", "", math.inf, None)] * 2
    code, text = shown(str(tmp_path))
    assert code == 0
    assert "not recorded" in text


def test_what_the_policy_refused_is_not_said_to_have_failed(tmp_path: Path) -> None:
    ledger, key = Ledger(tmp_path), TaskKey(run_id="r", round=1, attempt=0)
    for refused in (True, False):
        failure = Failure(reason="no", key=key, refused=refused)
        ledger.declare(failure, ReleaseTerms(purpose="train"))
        intended(ledger, failure)
    assert [one.kind for one in read(tmp_path).releases] == ["refusal", "failure"]
    text = shown(str(tmp_path))[1]
    assert text.index("train (refused)") < text.index("train (failed)")


def test_other_state_directories_of_the_same_photos_are_named_with_their_totals(home: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for folder in (photos, tmp_path / "others"):
        folder.mkdir()
    places = [
        ClientPlace.of(data, name=name, state_dir=state, device="cpu")
        for data, name, state in (
            (photos, "a", None), (photos, "b", None), (photos, "c", tmp_path / "elsewhere"),
            (tmp_path / "others", "d", None),
        )
    ]  # fmt: skip
    for place in places:
        place.make_state_dir()
        ledger = Ledger(place.state_dir)
        ledger.declare(upload(1), ReleaseTerms(purpose="train", mechanism={"a": 1}, epsilon=0.5), delta=1e-5)
        intended(ledger, upload(1))
    replace(places[1], data_dir=tmp_path / "others").make_state_dir()  # what it was used with before counts, too
    first, second, third, _ = (place.state_dir for place in places)
    assert places[0].other_state_dirs() == sorted([second, third])
    others = OtherLedgers(places[0].other_state_dirs)
    assert {folder: len(found) for folder, found in others.releases().items()} == {second: 1, third: 1}
    ledger = Ledger(second)
    intended(ledger, JOIN)
    assert len(others.releases()[second]) == 2

    told = json.loads(shown(str(first), "--json")[1])["other_state_dirs"]
    assert [(one["state_dir"], one["releases"], one["epsilon"], one["delta"]) for one in told] == [
        (str(folder), count, 0.5, 1e-5) for folder, count in sorted([(second, 2), (third, 1)])
    ]
    text = shown(str(first), columns=300)[1]
    assert "Other state directories of the same photos" in text
    assert str(second) in text
    (third / HEAD_FILE).unlink()
    assert "is missing" in shown(str(first), columns=300)[1]
    with pytest.raises(DamagedLogError):
        OtherLedgers(places[0].other_state_dirs).releases()


def test_the_audit_log_and_the_ledger_are_anchored_in_each_other(tmp_path: Path, server: Server) -> None:
    ledger = Ledger(tmp_path)
    found = server.receive(ledger, upload(1))
    event = list(server.audit.events())[-1]
    assert (event["store"], event["entry"], event["hash"]) == ("lyon", 1, found.head.hash)
    assert found.audit == server.audit.head().hash
    assert read(tmp_path).countersigned == {server.keys.public.text: found}
    assert found.is_signed
    assert not replace(found, audit=START).is_signed


@pytest.mark.parametrize(
    "shown", [None, 3, "x", [], {}, {"number": 1}, {"number": -1, "hash": START}, {"number": 2**60, "hash": START},
              {"number": 1, "hash": "0" * 63 + "\n"}, {"number": 1, "hash": "0" * 65}]
)  # fmt: skip
def test_what_is_no_head_is_not_signed_and_leaves_no_trace(server: Server, shown: object) -> None:
    assert server.heads.countersign("lyon", STORE.public, shown) is None
    assert server.events() == []


def test_a_store_that_shows_the_same_head_again_adds_nothing_to_the_audit_log(server: Server) -> None:
    shown = {"number": 1, "hash": "a" * 64}
    for _ in range(3):
        assert server.heads.countersign("lyon", STORE.public, shown) is not None
    assert server.events() == ["ledger"]


def test_nothing_is_sent_without_its_line_and_a_full_disk_leaves_the_ledger_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    intended(ledger, upload(1))
    size, (soft, hard) = (tmp_path / FILE).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))  # as a full disk: a part of the line is written
    try:
        with pytest.raises(RunError, match=r"nothing is sent, because it cannot be written .* lift it"):
            intended(ledger, upload(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / FILE).stat().st_size == size
    assert intended(ledger, upload(2)).number == 2
    assert len(read(tmp_path).releases) == 2


def test_a_line_that_a_power_cut_left_incomplete_is_removed_and_noted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.confirm(intended(ledger, upload(1)))
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"number": 3, "ti')
    ledger = Ledger(tmp_path)
    assert intended(ledger, upload(2)).number == 4
    found = read(tmp_path)
    assert (len(found.releases), found.num_removed) == (2, 1)


def test_a_ledger_that_was_altered_while_it_is_open_stops_the_next_release(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    intended(ledger, upload(1))
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedLogError, match="nothing is sent"):
        intended(ledger, upload(2))


def test_an_empty_ledger_is_whole(tmp_path: Path) -> None:
    assert read(tmp_path).head == Head(number=0, hash=START)
    assert not list(tmp_path.iterdir())


def shown(*arguments: str, columns: int = 80) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["privacy", "ledger", *arguments], env={"COLUMNS": str(columns)})
    return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"


def test_the_command_shows_each_release_and_totals_in_80_columns(store: Path) -> None:
    ledger = Ledger(store)
    message = upload(6)
    terms = ReleaseTerms(purpose="train", protections=("clip-norm 1",), mechanism={"a": 1}, epsilon=1.25)
    ledger.declare(message, terms, delta=1e-5)
    intended(ledger, message)
    code, text = shown(str(store))
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    (row,) = (line for line in text.splitlines() if "clip-norm 1" in line)
    assert row.split()[0] == "11"
    assert row.split()[3:] == ["train", "6", *row.split()[5:7], "maybe", "clip-norm", "1", "1.250", "1e-05"]
    assert "train 6" in " ".join(text.split())


def test_the_command_prints_json_and_csv(store: Path) -> None:
    ledger = Ledger(store)
    message = upload(1, value=5.0)
    ledger.declare(
        message, ReleaseTerms(purpose="compare", protections=("clip-norm 1", "noise 1"), mechanism={"a": [1]})
    )
    intended(ledger, message)
    code, text = shown(str(store), "--json")
    told = json.loads(text)
    assert code == 0
    assert [release["number"] for release in told["releases"]] == [1, 3, 5, 7, 9, 11]
    sizes = [release["num_bytes"] for release in told["releases"]]
    assert told["totals"]["train"] == {"releases": 5, "bytes": sum(sizes[:5])}
    assert told["totals"]["compare"] == {"releases": 1, "bytes": sizes[5]}
    assert told["head"]["number"] == 11
    assert [found["number"] for found in told["countersigned"]] == [9]
    code, text = shown(str(store), "--csv")
    assert code == 0
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["digest"] for row in rows] == [release["digest"] for release in told["releases"]]
    assert (rows[5]["protections"], json.loads(rows[5]["mechanism"])) == ("clip-norm 1; noise 1", {"a": [1]})
    assert text.startswith("number,time,kind,purpose,run_id,round,attempt,num_bytes,digest,")


def test_the_command_verifies_and_names_the_first_bad_entry(store: Path) -> None:
    code, text = shown(str(store), "--verify")
    assert code == 0
    assert "was altered, moved or removed: 10 entries, 5 releases." in text
    assert "Countersigned up to entry 9" in text
    rewrite(store, 3)
    code, text = shown(str(store), "--verify")
    assert code == 1
    assert "entry 3 is not the one that the server has countersigned" in text


def test_the_command_takes_a_copy_and_refuses_other_folders(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    assert shown(str(tmp_path / "copy"), "--verify")[0] == 0
    (tmp_path / "other").mkdir()
    code, text = shown(str(tmp_path / "other"))
    assert code == 1
    assert "neither a store's state directory nor a photo folder" in text
