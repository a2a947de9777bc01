"""The demo, stopped: no process outlives it, and the next one works at once."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.processes import Site

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_demo_whose_terminal_is_closed_ends_its_processes_and_the_next_one_works(
    pair: Site, drawn_test_photos: Path
) -> None:
    photos = pair.root / "demo" / "photos"
    (photos / "stores").mkdir(parents=True)
    (photos / "stores" / "lyon").symlink_to(pair.stores / "store-1")
    (photos / "test").symlink_to(drawn_test_photos)
    command = ("demo", "--dir", str(pair.root / "demo"), "--rounds", "1")

    demo = pair.fedshelf(*command)
    demo.wait_for_text("listening on")  # the server has the run's lock
    processes = psutil.Process(demo.pid).children(recursive=True)
    assert len(processes) >= 2
    psutil.Process(demo.pid).send_signal(signal.SIGHUP)
    assert demo.end() == 0
    assert "Traceback" not in demo.text()
    assert [process for process in processes if process.is_running() and process.status() != "zombie"] == []

    demo = pair.fedshelf(*command)
    assert demo.end() == 0, demo.text()
    assert any("Try next" in event.get("text", "") for event in demo.events)
