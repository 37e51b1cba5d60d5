"""Emulator for the PTX that Triton compiles the library's kernels to; needs no GPU."""
