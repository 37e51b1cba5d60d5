"""Training: runs a recipe on some data and saves checkpoints, logs and the training state."""

from vlmo.training.setup import Settings
from vlmo.training.stopping import Interrupted
from vlmo.training.trainer import train

__all__ = ["Interrupted", "Settings", "train"]
