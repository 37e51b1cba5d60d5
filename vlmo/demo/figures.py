"""The figures of the demo."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from vlmo.plotting import pyplot, save_figure
from vlmo.tasks.retrieval import Shortlist

_RIGHT, _WRONG, _MUTED = "#1a9850", "#d9d9d9", "#555555"
_LOSSES = {
    "itc_loss": ("contrast (ITC)", "#1f77b4"),
    "itm_loss": ("matching (ITM)", "#d62728"),
    "mlm_loss": ("masked words (MLM)", "#2ca02c"),
}


def draw_retrieval(
    path: str | os.PathLike[str],
    captions: Sequence[str],  # J texts
    images: Tensor,  # [I, S, S] uint8, text j belongs to image j
    before: Shortlist,  # images for each text, from the dual encoder
    after: Shortlist,  # re-ranked
    *,
    queries: Sequence[int],
    top: int = 5,
) -> None:
    """Draw each query's best images before and after re-ranking; the true image is framed."""
    plt = pyplot()
    # Columns: caption, first list, gap, second list.
    widths = [2.5, *[1] * top, 0.35, *[1] * top]
    figure, axes = plt.subplots(
        len(queries),
        len(widths),
        figsize=(0.85 * sum(widths), 0.98 * len(queries) + 0.9),
        width_ratios=widths,
        squeeze=False,
    )
    lists = ((1, "dual encoder", before), (top + 2, "re-ranked by the fusion encoder", after))
    for row, query in enumerate(queries):
        for axis in axes[row]:
            axis.axis("off")
        axes[row, 0].text(1, 0.5, _wrap(captions[query]), ha="right", va="center", fontsize=10)
        for first, _, found in lists:
            for column, image in enumerate(found.best(top)[query].tolist(), first):
                _tile(axes[row, column], images[image].numpy(), right=image == query)
    figure.subplots_adjust(0.01, 0.07, 0.99, 0.9, wspace=0.12, hspace=0.12)
    height = axes[0, 1].get_position().y1 + 0.02
    for first, title, _ in lists:
        left, right = axes[0, first].get_position(), axes[0, first + top - 1].get_position()
        middle = (left.x0 + right.x1) / 2
        figure.text(middle, height, title, ha="center", fontsize=11, weight="bold")
    edge = axes[0, 0].get_position().x1
    figure.text(edge, height, "query", ha="right", fontsize=11, weight="bold")
    note = (
        f"Best match left, true match framed, {len(images)} held-out images to choose from. The "
        "last queries are the first that the dual encoder gets wrong."
    )
    figure.text(0.5, 0.02, note, ha="center", fontsize=9, color=_MUTED)
    save_figure(figure, path)


def draw_losses(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, float]],
) -> None:
    """Plot each task's loss over the steps, raw and smoothed."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, (label, colour) in _LOSSES.items():
        points = np.array([(row["step"], row[name]) for row in rows if name in row])
        if len(points):
            axis.plot(*points.T, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(points[:, 0], _smooth(points[:, 1]), color=colour, label=label)
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axis.margins(x=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def _tile(axis, picture: np.ndarray, *, right: bool) -> None:
    axis.axis("on")
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=_RIGHT if right else _WRONG, linewidth=4 if right else 0.5)


def _wrap(caption: str) -> str:
    """Break the caption into two lines near its middle."""
    words = caption.split()
    fits = min(
        range(1, len(words)),
        key=lambda n: max(len(" ".join(words[:n])), len(" ".join(words[n:]))),
        default=len(words),
    )
    return "\n".join(filter(None, (" ".join(words[:fits]), " ".join(words[fits:]))))


def _smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Moving average whose window is narrower at both ends."""
    reach = max(1, round(share * len(values)))
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)
