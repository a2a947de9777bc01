"""Finding settings, estimating what a run takes, and a pilot in a few stores."""
