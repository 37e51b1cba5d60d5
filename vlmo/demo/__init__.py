"""``vlmo demo``: check the kernels, train a small VLMo on digit scenes, search pictures with it."""

from vlmo.demo.program import Settings, run

__all__ = ["Settings", "run"]
