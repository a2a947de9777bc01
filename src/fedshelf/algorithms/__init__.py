"""Federated algorithms: one file per paper, with the client's and the server's half."""
