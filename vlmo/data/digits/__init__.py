"""Digit scenes: a small data set made from the handwritten digits of scikit-learn."""
