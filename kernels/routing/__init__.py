"""Which expert each token goes to, and the index that a routed kernel reads."""
