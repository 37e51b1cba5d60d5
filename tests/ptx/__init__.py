"""Runs the PTX that Triton compiles the library's kernels to, on a machine without a GPU."""
