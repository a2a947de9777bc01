"""Pages that show a federation and its runs."""
