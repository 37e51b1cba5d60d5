"""moe_ffn in CUDA C++ for the tensor cores of sm_70 and sm_75: csrc/moe_ffn/."""
