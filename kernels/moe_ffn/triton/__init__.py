"""moe_ffn in Triton."""
