"""Assertions of the error bound that :func:`vlmo.testing.allowed_error` defines."""

from collections.abc import Callable

import torch
from torch import Tensor

from vlmo.testing import FACTOR, allowed_error


def assert_as_accurate_as(
    name: str, actual: Tensor, exact: Tensor, baseline: Tensor, factor: float = FACTOR
) -> None:
    """Compare ``actual`` with a float64 result, allowing ``factor`` times the baseline's error.

    Args:
        name: name of the tensor, for the message.
        actual: result of the kernel.
        exact: the same result in float64.
        baseline: result of eager PyTorch in the dtype of ``actual``.

    One rounding unit of the largest value is added. The relative L2 error is bounded by the same
    factor, because a missing part with small values would not exceed the maximum error.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, expected {baseline.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: non-finite"
    if actual.numel() == 0:
        return
    exact = exact.double()
    ours, theirs = (t.double() - exact for t in (actual, baseline))
    for norm, kind in ((float("inf"), "error"), (2, "L2 error")):
        error, eager, size = (float(t.flatten().norm(norm)) for t in (ours, theirs, exact))
        allowed = allowed_error(eager, size, actual.dtype, factor)
        assert error <= allowed, f"{name}: {kind} {error:.2e} > {allowed:.2e}, eager {eager:.2e}"


def relative_errors(*results: dict[str, Tensor]) -> dict[str, tuple[float, ...]]:
    """Largest error of each result against the last one, which is exact, by tensor name.

    Errors are relative to the largest exact value, or absolute if that is 0.
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


def labelled(name: str) -> Callable[[str], str]:
    """An argument ``msg`` of ``torch.testing.assert_close`` that puts a name before the message."""
    return lambda message: f"{name}: {message}"
