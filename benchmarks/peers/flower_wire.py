"""*wire* on unmodified Flower: `flower-superlink`, four `flower-supernode`s and `flwr run`, all without TLS.

python -m benchmarks.peers.flower_wire 10     # megabytes
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.processes import free_ports, program, run, running, wait_for_port
from benchmarks.wire_limit import NUM_CLIENTS
from fedshelf.core.process_exit import describe_exit

APP = Path(__file__).with_name("flower_app")


def main() -> None:
    """Run it, and print the figures."""
    megabytes = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        environment = {**os.environ, "FLWR_HOME": folder, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        port, *nodes = free_ports(1 + NUM_CLIENTS)
        address, figures = f"127.0.0.1:{port}", Path(folder) / "figures.json"
        (Path(folder) / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{address}"\ninsecure = true\n'
        )
        command = [program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--disable-runtime-dependency-installation"]
        superlink = stack.enter_context(running(command, environment=environment))
        wait_for_port(port, superlink)
        for number, node in enumerate(nodes):
            command = [program("flower-supernode"), "--insecure", "--superlink", address, "--port", str(node)]
            command += ["--node-config", f"partition-id={number}"]
            stack.enter_context(running(command, environment=environment))
        config = f"megabytes={megabytes} figures='{figures}' superlink={superlink.pid}"
        command = [program("flwr"), "run", str(APP), "local", "--run-config", config]
        run(command, environment=environment)
        while not figures.exists():
            if superlink.poll() is not None:
                raise SystemExit(f"{describe_exit('flower-superlink', superlink.returncode)}; see above")
            time.sleep(0.1)
        print(figures.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
