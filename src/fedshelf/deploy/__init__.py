"""Real servers and clients over the network, on the Flower engine."""
