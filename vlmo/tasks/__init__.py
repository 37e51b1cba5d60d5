"""Training objectives, retrieval and evaluation."""
