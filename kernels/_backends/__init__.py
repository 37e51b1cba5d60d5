"""Hardware requirements and launch code of each technology: CPU, Triton and CUDA."""
