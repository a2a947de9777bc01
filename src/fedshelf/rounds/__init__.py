"""One round of federated training, the server's side and the client's, on ports only."""
