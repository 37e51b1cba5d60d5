"""Checkpoint files: the published layouts, recognised, read, resized and written."""
