"""Numerical operations: a reference in plain PyTorch for each, and faster backends."""
