"""``python -m vlmo``."""

from vlmo.commands.app import main

main()
