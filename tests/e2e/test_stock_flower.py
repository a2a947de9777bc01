"""A real training with stock Flower's own programs ends with the same bits as with ours."""

import contextlib
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.deploy.stock import run_config
from fedshelf.privacy.ledger_content import read
from tests.e2e.test_transport_stock import BIN, PATIENCE, environment, running, wait_for_superlink
from tests.ports import free_port
from tests.processes import ROOT, TINY, Site, figures, same_model

__all__ = ["environment"]

APP = ROOT / "flower"
RECIPE = {"rounds": 2, "val-fraction": 0.2}


def toml_of(flags: tuple[str, ...]) -> str:
    """Flags as the TOML file that says the same."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return "".join(
        f"{name[2:]} = {value if value.replace('.', '').isdigit() else repr(value)}\n" for name, value in pairs
    )


def test_the_app_declares_every_key_of_a_run_with_its_default() -> None:
    declared = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flags = RunConfig.flags()
    not_flowers = {  # its SuperLink has its own
        "address", "admission", "advertise", "heartbeat_timeout", "home", "insecure", "invite", "tls_cert", "tls_key",
    }  # fmt: skip
    known = {name.replace("_", "-") for name in flags if "server" in flags[name].commands and name not in not_flowers}
    assert set(declared) == known
    assert run_config(declared) == RunConfig()


def test_the_app_has_no_simulated_attackers_either() -> None:
    with pytest.raises(UsageError, match="the stores of a server are real"):
        run_config({"attack": "sign-flip", "attackers": 1})


@pytest.mark.e2e
@pytest.mark.slow
def test_stock_flower_ends_with_the_same_model(pair: Site, environment: dict[str, str], tmp_path: Path) -> None:
    environment |= {key: pair.environment[key] for key in ("FEDSHELF_HOME", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")}
    run = pair.root / "run"
    recipe = TINY + tuple(part for key, value in RECIPE.items() for part in (f"--{key}", str(value)))
    config = tmp_path / "run.toml"
    config.write_text(toml_of((*recipe, "--min-clients", "2", "--run-dir", str(run))))
    superlink, *nodes = (free_port() for _ in range(3))
    address = f"127.0.0.1:{superlink}"
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{address}"\ninsecure = true\n'
    )
    with contextlib.ExitStack() as stack:
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(superlink)]
        log = tmp_path / "superlink.log"
        stack.enter_context(running(environment, log, *command, "--disable-runtime-dependency-installation"))
        wait_for_superlink(superlink)
        for name, port in zip(pair.names, nodes, strict=True):
            command = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(port)]
            node = f'data-dir="{pair.stores / name}"'
            stack.enter_context(running(environment, tmp_path / f"{name}.log", *command, "--node-config", node))
        started = subprocess.run(
            [str(BIN / "flwr"), "run", str(APP), "local", "--run-config", str(config)],
            check=False, env=environment, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        # The last round's model is written just before the run is marked finished, and that last of all.
        deadline = time.monotonic() + PATIENCE
        while not (run / "run.json").exists() or pair.show(run)["status"] == "running":
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
    expected = pair.root / "expected"
    pair.simulate(*recipe[len(TINY) :], run_dir=expected)
    assert same_model(run, expected)
    assert pair.show(run)["status"] == "finished"
    clients = pair.root / "home" / "clients"
    said = {name: [release.kind for release in read(clients / name).releases if release.is_sent] for name in pair.names}
    assert all({"join", "ready", "upload", "evaluation"} <= set(kinds) for kinds in said.values())
    exact = ("round", "accuracy", "train_loss")
    assert figures(pair.show(run), *exact) == figures(pair.show(expected), *exact)
