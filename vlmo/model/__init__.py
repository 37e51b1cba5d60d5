"""The VLMo model: a thin layer over :mod:`vlmo.kernels`."""
