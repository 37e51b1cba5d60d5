"""Self-attention over all modalities, with a relative position bias looked up in a table."""
