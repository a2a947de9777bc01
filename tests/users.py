"""Another user's view: root may read everything, and tests of what may not be read must not run as root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

NOBODY = 65534


@contextmanager
def ordinary_user() -> Iterator[int]:
    """Make this process an ordinary user's for as long as the block runs; yields that user's id.

    Paths in the block must be relative: the folders above a test's own are closed to others.
    """
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield os.geteuid()
    finally:
        os.seteuid(before)
