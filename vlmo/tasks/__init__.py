"""What a model is trained for and judged by: losses, retrieval and evaluation."""
