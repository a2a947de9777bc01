"""Rounds of federated training, on the server and on the client. Depends on ports only."""
