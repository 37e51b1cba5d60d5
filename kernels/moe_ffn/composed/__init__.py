"""moe_ffn as PyTorch's matrix products with Triton passes over the rows between them."""
