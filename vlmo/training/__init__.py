"""Training: what a recipe, data and a machine become."""

from vlmo.training.setup import Settings
from vlmo.training.stopping import Interrupted
from vlmo.training.trainer import train

__all__ = ["Interrupted", "Settings", "train"]
