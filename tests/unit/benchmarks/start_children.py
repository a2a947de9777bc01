"""Starts a child in a session of its own, which starts a grandchild; prints both ids and waits to be ended."""

import subprocess
import sys
import time

from benchmarks.processes import ending_all_children

SLEEP = "import time; time.sleep(120)"
CHILD = f"""
import subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
print(grandchild.pid, flush=True)
time.sleep(120)
"""

if __name__ == "__main__":
    with ending_all_children():
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        print(child.pid, (child.stdout or sys.stdin).readline().strip(), flush=True)
        if "end" not in sys.argv:
            time.sleep(120)
