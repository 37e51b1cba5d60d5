"""Compiling Triton kernels ahead of the calls that need them, for an absent GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy


def test_kernels_are_compiled_once_in_threads_and_kept():
    """tests/kernels/compile_only.py, in a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_only.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "as expected\n"), run.stderr[-4000:]
