"""FedShelf at a till: the part of FedShelf that serves a model file, without PyTorch.

The part lies in this package, not beside it, so that `fedshelf` and `fedshelf-edge` own different files and can be
installed together, in any versions.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run the command `fedshelf-edge`."""
    sys.path.insert(0, str(Path(__file__).with_name("parts")))
    from fedshelf.edge.till import main as run

    run()
