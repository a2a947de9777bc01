"""Mistakes that people make with two commands: each is told in one clear line, and disturbs nobody."""

import os
import sys

import pytest

from fedshelf.deploy.tls import ensure_server_tls
from tests.processes import ROOT, Process, Site, draw_photos, draw_stores, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def assert_fails(process: Process, *texts: str, code: int = 1) -> None:
    """It ends with `code` and an error that says all of `texts`, without a traceback."""
    assert process.end() == code, process.text()
    for text in ("error: ", *texts):
        assert text in process.text(), process.text()
    assert "Traceback" not in process.text()


def assert_waits(process: Process, *texts: str) -> None:
    """It says all of `texts` and tries again, until it is stopped."""
    for text in (*texts, "trying again"):
        process.wait_for_text(text)
    process.interrupt()
    assert process.end() == 0, process.text()


def test_a_second_server_is_told_what_is_in_its_way(pair: Site) -> None:
    run = pair.root / "run"
    first = pair.server("--rounds", "1", "--run-dir", str(run))
    first.wait_for_text("listening on")
    same_run = pair.server("--rounds", "1", "--run-dir", str(run))
    same_port = pair.server("--rounds", "1", "--run-dir", str(pair.root / "other"))
    assert_fails(same_run, "is in use by process", str(first.pid))
    assert_fails(same_port, pair.address, "another program", "--address")
    clients = pair.clients()
    assert first.end() == 0, first.text()
    assert [client.end() for client in clients.values()] == [0, 0]


def test_a_client_started_wrongly_is_told_why_and_the_server_stays(pair: Site) -> None:
    ensure_server_tls(pair.root / "foreign")
    (pair.root / "empty" / "apple").mkdir(parents=True)
    server = pair.server("--rounds", "1", "--val-fraction", "0", "--run-dir", str(pair.root / "run"))
    server.wait_for_text("listening on")
    first = pair.client("store-1")
    first.wait_for_text("connected to")
    empty = ("client", "--data-dir", str(pair.root / "empty"), "--server-address", pair.address)
    wrong = {
        "wrong authority": pair.client("store-2", "--ca", str(pair.root / "foreign" / "ca.pem")),
        "plain": pair.client("store-2", "--insecure", "--state-dir", str(pair.root / "plain")),
        "no photos": pair.fedshelf(*empty),
        "no folder": pair.client("store-9"),
        "same state": pair.client("store-1"),
    }
    assert_waits(wrong["wrong authority"], "is not to be trusted", "(--ca)")
    assert_waits(wrong["plain"], "encrypts: run this client without --insecure")
    assert_fails(wrong["no photos"], str(pair.root / "empty"), "photo")
    assert_fails(wrong["no folder"], "store-9", code=2)
    assert_fails(wrong["same state"], "process", str(first.pid), "it uses the same photos")
    # The same name from elsewhere is somebody else.
    twin = pair.client("store-2", "--name", "store-1", "--state-dir", str(pair.root / "twin"))
    assert_fails(twin, "a store named 'store-1' is enrolled with another key", "--name")
    assert server.running()
    assert first.running()
    second = pair.client("store-2")
    assert server.end() == 0, server.text()
    assert [first.end(), second.end()] == [0, 0]


def test_a_client_that_encrypts_is_told_of_a_server_that_does_not(pair: Site) -> None:
    server = pair.server("--rounds", "1", "--insecure", "--run-dir", str(pair.root / "run"))
    server.wait_for_text("listening on")
    assert "WARNING: --insecure" in server.text()
    assert_waits(pair.client("store-1"), "does not encrypt")
    assert server.running()


def test_a_later_joiner_with_foreign_classes_and_broken_photos_takes_part_with_the_rest(site: Site) -> None:
    site.stores = draw_stores(site.root / "stores", num_stores=3)
    late = site.stores / "store-3"
    draw_photos(late / "elderberry", 3, count=5, seed=77)
    good = len(list(late.rglob("*.png"))) - 5
    whole = next((late / "apple").glob("*.png")).read_bytes()
    (late / "apple" / "cut-off.png").write_bytes(whole[: len(whole) // 2])
    (late / "apple" / "text.jpg").write_text("I am no photo")
    (late / "apple" / "empty.jpg").touch()
    (late / "apple" / "drawing.svg").write_text("<svg/>")
    draw_photos(late / "apple" / "@eaDir" / "cut-off.png", 3, count=1, seed=78)

    run = site.root / "run"
    server = site.server("--rounds", "2", "--val-fraction", "0", "--run-dir", str(run), min_clients=2)
    held = site.held_client("store-1", "hold@1")
    second = site.client("store-2")
    held.wait_for("held", round=1)
    joiner = site.client("store-3")
    joined = server.wait_for("client_joined", client="store-3")
    assert (joined["num_train"], joined["num_left_out"]) == (good, 5)
    site.release(1)
    assert server.end() == 0, server.text()
    assert [client.end() for client in (held, second, joiner)] == [0] * 3
    assert "elderberry (5)" in joiner.text()
    for name in ("cut-off.png", "text.jpg", "empty.jpg", "apple/@eaDir", "1 .svg"):
        assert name in joiner.text()
    summary = site.show(run)
    assert statuses(summary, 1) == {"store-1": "counted", "store-2": "counted"}
    assert statuses(summary, 2) == {"store-1": "counted", "store-2": "counted", "store-3": "counted"}


def test_a_store_of_damaged_photos_does_not_join_and_a_name_of_any_bytes_takes_part(pair: Site) -> None:
    stores = draw_stores(pair.root / "odd", num_stores=2)
    latin = (stores / "store-1").rename(stores / os.fsdecode(b"magasin-caf\xe9"))
    damaged = stores / "store-2"
    draw_photos(damaged / "only-here", 3, count=1, seed=77)
    for photo in damaged.rglob("*.png"):
        photo.write_bytes(photo.read_bytes()[:40])
    server = pair.server("--rounds", "1", "--run-dir", str(pair.root / "run"))
    clients = [
        pair.fedshelf("client", "--data-dir", str(folder), "--server-address", pair.address)
        for folder in (damaged, latin)
    ]
    assert clients[0].end() == 1
    assert "there is no photo to train on: a client with this folder cannot take part" in clients[0].text()
    assert "connecting" not in clients[0].text()
    whole = pair.client("store-2")
    assert server.end() == 0, server.text()
    assert [clients[1].end(), whole.end()] == [0, 0]
    assert statuses(pair.show(pair.root / "run"), 1) == {r"magasin-caf\xe9": "counted", "store-2-2": "counted"}
    assert "only-here" not in (pair.root / "run" / "catalogue.json").read_text()


def test_numbers_without_bound_do_not_end_the_server(pair: Site) -> None:
    server = pair.server("--rounds", "1", "--run-dir", str(pair.root / "run"), "--val-fraction", "0.2")
    second = pair.client("store-2")
    absurd = pair.odd_client("store-1", "--do", "absurd-ready")
    assert "its answer to the setup" in server.wait_for("client_refused", client="store-1")["reason"]
    absurd.interrupt()
    absurd.end()
    honest = pair.client("store-1")
    assert server.end() == 0, server.text()
    assert [honest.end(), second.end()] == [0, 0]


def test_the_two_scripts_of_the_repository_do_what_the_commands_do(pair: Site) -> None:
    def script(name: str, *arguments: str) -> Process:
        return pair.start(sys.executable, str(ROOT / name), *arguments, cwd=ROOT)

    run = pair.root / "run"
    recipe = ("--rounds", "1", "--image-size", "16", "--width", "8", "--local-epochs", "1", "--val-fraction", "0")
    server = script(
        "server.py", *recipe, "--min-clients", "2", "--address", pair.address, "--run-dir", str(run), "--json"
    )
    clients = [
        script("client.py", "--data-dir", str(pair.stores / name), "--server-address", pair.address)
        for name in pair.names
    ]
    assert server.end() == 0, server.text()
    assert f"python client.py --data-dir ./local_data --server-address {pair.address}" in server.text()
    assert [client.end() for client in clients] == [0, 0]
    assert (run / "model" / "model.safetensors").is_file()
    assert pair.show(run)["status"] == "finished"


def test_a_store_that_comes_too_late_or_with_other_products_is_told_so_once(pair: Site) -> None:
    stores = draw_stores(pair.root / "late", num_stores=1)
    draw_photos(pair.root / "other" / "elderberry", 3, count=5, seed=77)
    run = pair.root / "run"
    server = pair.server("--rounds", "1", "--val-fraction", "0", "--run-dir", str(run))
    held = pair.held_client("store-1", "hold@1")
    second = pair.client("store-2")
    held.wait_for("held", round=1)
    join = ("--server-address", pair.address, "--name")
    late = pair.fedshelf("client", "--data-dir", str(stores / "store-1"), *join, "late")
    other = pair.fedshelf("client", "--data-dir", str(pair.root / "other"), *join, "other")
    other.wait_for_text("its products are called 'elderberry'")
    assert "its products are called" in server.wait_for("client_refused", client="other")["reason"]
    server.wait_for("client_joined", client="late")
    pair.release(1)
    assert server.end() == 0, server.text()
    assert [client.end() for client in (held, second, late)] == [0, 0, 0]
    other.interrupt()
    assert other.end() == 0, "it waits for a run with its products"
    assert other.text().count("its products are called") == 1
    assert "late: it took part in no round since it was started" in late.text()
    assert "there is no model here, the run's folder on the server has one" in late.text()
    assert "took part in no round" not in second.text()
