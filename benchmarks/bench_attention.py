"""Attention with a relative position bias beside eager PyTorch, SDPA and FlexAttention."""

SUITE = "attention"


def bench_attention(held, problem, contender):
    held(problem, contender)
