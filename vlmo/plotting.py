"""Figures with matplotlib, without a display, and written atomically."""

from __future__ import annotations

import os
from typing import Any

from vlmo.files import replacing


def pyplot() -> Any:
    """Import pyplot with a backend that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a figure in the format of the suffix and close it; ``options`` are those of savefig."""
    with replacing(path) as temporary:
        figure.savefig(temporary, **({"dpi": 150} | options))
    pyplot().close(figure)
