"""How many examples Hypothesis tries where a test does not leave that to the profile."""

from hypothesis import settings

USUAL = 100  # of the usual profile


def examples(count: int) -> int:
    """`count`, or with --long as many more as its profile tries."""
    return count * settings().max_examples // USUAL
