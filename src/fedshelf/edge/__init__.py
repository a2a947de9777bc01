"""The model in the store: files for it (`making`, with torch) and its use at the shelf (`serving`, without)."""
