"""A program for tests: appends NAME to a file, or fails while there is a file NAME.broken beside it."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    path, name = Path(sys.argv[1]), sys.argv[2]
    if path.with_name(f"{name}.broken").exists():
        raise SystemExit(f"{name} is broken")
    with path.open("a") as file:
        file.write(f"{name}\n")
    print(json.dumps({"name": name}))
