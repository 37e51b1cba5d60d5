"""What the commands of :mod:`vlmo.cli` do."""
