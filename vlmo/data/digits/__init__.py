"""Digit scenes: a small data set generated from the handwritten digits of scikit-learn."""
