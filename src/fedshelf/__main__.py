"""`python -m fedshelf`: the command line."""

from fedshelf.cli import main

if __name__ == "__main__":
    main()
