"""The hybrid language model as single-device PyTorch."""
