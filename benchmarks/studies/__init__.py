"""Tables over simulations of the acceptance benchmark with other flags: one module per table."""
