"""Fixtures: test kernels, compiled once, and a random generator."""

import pathlib

import numpy as np
import pytest

from sm70 import Kernel, compile_cuda

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def build():
    """build(file, kernel): a strict Kernel from a .cu file of this folder."""
    compiled = {}

    def get(file, name):
        if file not in compiled:
            compiled[file] = compile_cuda(HERE / file)
        return Kernel(compiled[file], name, strict=True)

    return get


@pytest.fixture
def rng():
    return np.random.default_rng(0)
