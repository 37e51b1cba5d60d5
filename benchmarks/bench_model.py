"""The whole model beside the official way of computing it."""

SUITE = "model"


def bench_model(held, problem, contender):
    held(problem, contender)
