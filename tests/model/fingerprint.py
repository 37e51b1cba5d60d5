"""Nine numbers that represent a tensor: enough to detect a relative difference of 1e-5."""

import hashlib

import torch
from torch import Tensor

PROJECTIONS = 8


def fingerprint(name: str, tensor: Tensor) -> Tensor:
    """``[1 + PROJECTIONS]`` float64: the norm, and projections on Gaussian vectors seeded by name.

    The projections of a difference d are normal with standard deviation ``d.norm()``.
    """
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    flat = tensor.detach().double().reshape(-1)
    vectors = torch.randn(PROJECTIONS, flat.numel(), generator=generator, dtype=torch.float64)
    return torch.cat([flat.norm()[None], vectors @ flat])
