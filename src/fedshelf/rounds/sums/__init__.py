"""Uploads that the server sees only as a sum: masked and encrypted rounds, on the server and on the client."""
