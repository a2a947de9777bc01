"""Starts, through a shell that ends at once, a process that uses the processor for a while; and waits a little."""

import json
import subprocess
import sys
import time

BURN = "import time\nwhile time.process_time() < 0.4: pass\ntime.sleep(60)"

if __name__ == "__main__":
    command = f"{sys.executable} -c '{BURN}' > /dev/null 2>&1 & echo $!"
    shell = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    time.sleep(2)
    print(json.dumps({"child": int(shell.stdout)}))
