"""Compiles a small kernel in threads for an absent GPU; run without TRITON_INTERPRET."""

import threading
from dataclasses import dataclass
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from compiled import NoDriver
from vlmo.kernels._backends.triton_launch import compile_only, launch


@dataclass
class Options:
    num_warps: int = 4
    num_stages: int = 1


@triton.jit
def fill(out, value: tl.constexpr):
    tl.store(out, value // (value - 7))  # 7 does not compile


compiled_in: list[threading.Thread] = []
make_cubin = CUDABackend.make_cubin


def make_and_note(*args, **options):
    compiled_in.append(threading.current_thread())
    return make_cubin(*args, **options)


def fill_with(*values: int) -> None:
    for value in values:
        launch(fill, torch.device("cpu"), 1, Options(), torch.empty(1), value)


if __name__ == "__main__":
    driver.set_active(NoDriver("sm_90"))
    with (
        mock.patch.object(CUDABackend, "make_cubin", make_and_note),
        mock.patch.dict("os.environ", TRITON_ALWAYS_COMPILE="1"),
    ):
        with compile_only(threads=2):
            fill_with(1, 2, 2, 7, 3, 1)
        assert len(compiled_in) == 3, compiled_in
        assert threading.main_thread() not in compiled_in
        with compile_only():
            fill_with(1, 2, 3)
        assert len(compiled_in) == 3  # compiled kernels are cached
        assert triton.knobs.runtime.jit_cache_hook is None
        # The call that launches it reports the error.
        try:
            fill_with(7)
        except triton.CompilationError:
            print("as expected")
