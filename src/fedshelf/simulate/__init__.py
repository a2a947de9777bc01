"""Simulation: the rounds' code with simulated clients, in one process or over worker processes."""
