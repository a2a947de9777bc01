"""The same messages as ordinary Flower apps: stock `flower-superlink`, `flower-supernode` and `flwr run`."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.ports import free_port

PATIENCE = 150.0  # seconds; stock Flower starts a process for each message
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]

APP = """
import json
from pathlib import Path

import torch

from fedshelf.core.messages import PROTOCOL_VERSION, Broadcast, Join, Purpose, TaskKey, Upload
from fedshelf.core.ports import Joined, Reply
from fedshelf.deploy.stock import make_client_app
from fedshelf.deploy.stock import make_server_app


def make_handler(config):
    def handle(message):
        delta = message.params + float(config["number"])
        return Upload(key=message.key, delta=delta, num_examples=1, num_steps=1, train_loss=0.5, seconds=0.1)

    join = Join(protocol=PROTOCOL_VERSION, version="0", client=config["name"], classes=())
    return join, handle, None


def run(transport, config):
    params = torch.load(config["params"], weights_only=True)
    names, told = {}, {"lost": [], "upload": {}}
    while len(told["upload"]) < 2:
        arrival = transport.receive(60.0)
        if isinstance(arrival, Joined):
            names[arrival.address] = arrival.join.client
            key = TaskKey(run_id="r", round=1, attempt=1)
            task = Broadcast(key=key, purpose=Purpose.TRAIN, params=params, client_lr=0.1)
            transport.send(arrival.address, task)
        elif isinstance(arrival, Reply):
            path = Path(config["out"]).with_suffix("." + names[arrival.address])
            torch.save(arrival.message.delta, path)
            told["upload"][names[arrival.address]] = str(path)
        else:
            told["lost"].append(repr(arrival))
    unfinished = Path(config["out"]).with_suffix(".unfinished")
    unfinished.write_text(json.dumps(told))
    unfinished.replace(config["out"])


client = make_client_app(make_handler)
server = make_server_app(run)
"""
PYPROJECT = """
[project]
name = "fedshelf-echo"
version = "0.1.0"
description = "Echoes."
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "fedshelf"

[tool.flwr.app.components]
serverapp = "echo_app.apps:server"
clientapp = "echo_app.apps:client"

[tool.flwr.app.config]
params = ""
out = ""
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Flower's own files in a place of the test's; its commands and FedShelf on the paths."""
    (tmp_path / "home").mkdir()
    return {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }


@contextlib.contextmanager
def running(environment: dict[str, str], log: Path, *command: str) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # what it started itself
            process.wait()


def wait_for_superlink(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")
            return
        time.sleep(0.2)
    raise AssertionError("flower-superlink did not start")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.long  # `test_stock_flower` is its short form: a real training, but a smaller model
def test_stock_flower_runs_the_same_client_and_server(tmp_path: Path, environment: dict[str, str]) -> None:
    app, out, params = tmp_path / "app", tmp_path / "out.json", torch.randn(2_000_000)
    (app / "echo_app").mkdir(parents=True)
    (app / "echo_app" / "__init__.py").touch()
    (app / "echo_app" / "apps.py").write_text(APP)
    (app / "pyproject.toml").write_text(PYPROJECT)
    torch.save(params, tmp_path / "params.pt")
    superlink, *nodes = (free_port() for _ in range(3))
    address = f"127.0.0.1:{superlink}"
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{address}"\ninsecure = true\n'
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            running(
                environment, tmp_path / "superlink.log", "flower-superlink", "--insecure", "--host", "127.0.0.1",
                "--port", str(superlink), "--disable-runtime-dependency-installation",
            )
        )  # fmt: skip
        wait_for_superlink(superlink)
        for number, port in enumerate(nodes, start=1):
            config = f'name="store-{number}" number={number}'
            log = tmp_path / f"supernode-{number}.log"
            stack.enter_context(
                running(
                    environment, log, "flower-supernode", "--insecure", "--superlink", address, "--port", str(port),
                    "--node-config", config,
                )
            )  # fmt: skip
        overrides = f'params="{tmp_path / "params.pt"}" out="{out}"'
        command = [str(BIN / "flwr"), "run", str(app), "local", "--run-config", overrides]
        started = subprocess.run(
            command, check=False, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert started.returncode == 0, started.stderr
        deadline = time.monotonic() + PATIENCE
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert out.exists(), (tmp_path / "superlink.log").read_text()[-4000:]
    told = json.loads(out.read_text())
    assert told["lost"] == []
    for number in (1, 2):
        delta = torch.load(told["upload"][f"store-{number}"], weights_only=True)
        assert torch.equal(delta, params + number)
