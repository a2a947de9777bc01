"""The composition root: from configuration to a server, a client or a predictor. The engine comes later."""
