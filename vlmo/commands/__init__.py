"""The commands of the command line; :mod:`vlmo.commands.app` assembles them."""
