"""What the suites share: contenders, the accuracy gate, timing, rooflines, peers."""
