"""Starts a process that outlives this one; given a file, writes its own id there and stays as well."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 60

if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({SECONDS})"])
    time.sleep(0.5)  # long enough to be seen
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(str(os.getpid()))
        time.sleep(SECONDS)
    print(json.dumps({"child": child.pid}), flush=True)
    os._exit(0)  # without waiting for it
