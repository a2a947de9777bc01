"""The composition root: builds a server, a client or a predictor from a configuration."""
