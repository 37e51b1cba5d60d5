"""Checkpoint files: identifies, reads, resizes and writes the published layouts."""
