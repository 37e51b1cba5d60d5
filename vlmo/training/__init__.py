"""Training: what a recipe, data and a machine become."""
