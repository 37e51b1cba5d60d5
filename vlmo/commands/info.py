"""``vlmo info`` and ``vlmo recipes``: tables of devices, backends and recipes."""

from __future__ import annotations

from rich.console import Console


def info() -> None:
    """Show versions, devices, built kernels, and which backends can run here."""
    from vlmo.machine import show_machine

    show_machine(Console())


def recipes() -> None:
    """List the recipes of `vlmo train`."""
    from vlmo.recipes import show_recipes

    show_recipes(Console())
