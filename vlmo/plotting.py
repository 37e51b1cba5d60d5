"""What all pictures share: matplotlib without a window, and files that appear whole."""

from __future__ import annotations

import os
from typing import Any

from vlmo.files import replacing


def pyplot() -> Any:
    """pyplot without a window.

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
    """Write a figure in the format of the suffix, and close it; ``options`` as of savefig."""
    with replacing(path) as temporary:
        figure.savefig(temporary, **({"dpi": 150} | options))
    pyplot().close(figure)
