"""The error rule: at most twice as wrong as eager PyTorch of the same dtype."""

import torch
from torch import Tensor


def assert_as_accurate_as(
    name: str, actual: Tensor, exact: Tensor, baseline: Tensor, factor: float = 2.0
) -> None:
    """Compare ``actual`` with a float64 result, allowing ``factor`` times the baseline's error.

    Args:
        name: for the message.
        actual: what the kernel gave.
        exact: the same in float64.
        baseline: eager PyTorch in the dtype of ``actual``.

    One rounding unit of the largest value comes on top. The relative L2 error is bounded by the
    same factor, so that a part that is small everywhere cannot be missing.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, expected {baseline.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: non-finite"
    if actual.numel() == 0:
        return
    exact, eps = exact.double(), torch.finfo(actual.dtype).eps
    ours, theirs = (t.double() - exact for t in (actual, baseline))

    error, allowed, band = ours.abs().max(), theirs.abs().max(), eps * exact.abs().max()
    assert error <= factor * allowed + band, (
        f"{name}: error {error:.2e}, eager {allowed:.2e}, rounding {band:.2e}"
    )
    error, allowed, band = ours.norm(), theirs.norm(), eps * exact.norm()
    assert error <= factor * allowed + band, (
        f"{name}: L2 error {error:.2e}, eager {allowed:.2e}, rounding {band:.2e}"
    )


def relative_errors(*results: dict[str, Tensor]) -> dict[str, tuple[float, ...]]:
    """Largest error of all but the last results beside the last, which are exact, by name.

    Relative to the largest exact value; where that is 0, as it is.
    """
    *others, exact = results
    errors = {}
    for name, value in exact.items():
        scale = float(value.abs().amax()) if value.numel() else 0.0
        errors[name] = tuple(
            float((other[name].double() - value).abs().amax()) / (scale or 1.0)
            if value.numel()
            else 0.0
            for other in others
        )
    return errors
