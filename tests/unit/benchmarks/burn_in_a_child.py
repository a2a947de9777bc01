"""Waits for a child that uses the processor for a while."""

import subprocess
import sys

BURN = "import time\nwhile time.process_time() < 0.5: pass"

if __name__ == "__main__":
    subprocess.run([sys.executable, "-c", BURN], check=True)
    print('{"burned": true}')
