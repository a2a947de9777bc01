"""`python server.py --rounds 10 --min-clients 5`: the same as `fedshelf server …`."""

import sys

from fedshelf.__main__ import main

if __name__ == "__main__":
    main(["server", *sys.argv[1:]])
