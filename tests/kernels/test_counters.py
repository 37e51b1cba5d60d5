"""Buffers of counters with an allocator other than PyTorch's own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmo.kernels.moe_ffn import counters


def buffer_on_gpu(address: int) -> Any:
    return SimpleNamespace(device=torch.device("cuda"), data_ptr=lambda: address)


@pytest.mark.parametrize(("address", "private"), [(100, False), (300, True), (900, False)])
def test_private_pools_of_the_native_allocator(address, private, monkeypatch):
    segments = [
        {"address": 0, "total_size": 200, "segment_pool_id": (0, 0)},
        {"address": 200, "total_size": 200, "segment_pool_id": (0, 1)},
    ]
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert counters._in_private_pool(buffer_on_gpu(address)) == private


def test_cuda_malloc_async_has_no_snapshot(monkeypatch):
    def raises():
        raise RuntimeError("cudaMallocAsync does not yet support memory_snapshot")

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", raises)
    assert not counters._in_private_pool(buffer_on_gpu(0))
