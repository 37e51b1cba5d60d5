"""The routed feed-forward sublayer beside slices, masks, dense layers and other libraries."""

SUITE = "moe_ffn"


def bench_moe_ffn(held, problem, contender):
    held(problem, contender)
