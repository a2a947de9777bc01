"""One paper, one file, both halves."""
