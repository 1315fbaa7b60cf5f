"""Numerical operations, each with a reference in plain PyTorch and faster backends."""
