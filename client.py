"""`python client.py --data-dir ./local_data --server-address HOST:PORT`: the same as `fedshelf client …`."""

import sys

from fedshelf.__main__ import main

if __name__ == "__main__":
    main(["client", *sys.argv[1:]])
