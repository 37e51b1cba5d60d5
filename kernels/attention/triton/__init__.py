"""shared_attention in Triton."""
