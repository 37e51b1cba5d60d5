"""The feed-forward layer with one expert per modality."""
