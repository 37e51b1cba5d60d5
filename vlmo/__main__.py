"""``python -m vlmo``."""

from vlmo.cli import main

main()
