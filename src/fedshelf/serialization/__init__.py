"""Messages and tensor files to bytes and back; nothing else parses them."""
