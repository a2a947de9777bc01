"""`python -m fedshelf_edge`."""

from fedshelf_edge import main

main()
