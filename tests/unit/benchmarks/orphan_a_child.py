"""Starts a process that uses the processor for a while, through a shell that ends at once, and waits for it."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BURN = "import pathlib, time\nwhile time.process_time() < 0.4: pass\npathlib.Path('{}').touch()\ntime.sleep(60)"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        burned = Path(folder) / "burned"
        command = f'{sys.executable} -c "{BURN.format(burned)}" > /dev/null 2>&1 & echo $!'
        shell = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        while not burned.exists():
            time.sleep(0.05)
        time.sleep(0.5)  # long enough to be seen again
    print(json.dumps({"child": int(shell.stdout)}))
