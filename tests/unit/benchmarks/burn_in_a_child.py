"""Run by the tests of `benchmarks.measure`: a process that waits for a child which uses the processor for a while."""

import subprocess
import sys

BURN = "import time\nwhile time.process_time() < 0.5: pass"

if __name__ == "__main__":
    subprocess.run([sys.executable, "-c", BURN], check=True)
    print('{"burned": true}')
