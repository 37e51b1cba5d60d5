"""Shared code of the benchmark suites: contenders, the accuracy gate, timing, rooflines, peers."""
