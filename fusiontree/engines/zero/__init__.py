"""Training steps by DeepSpeed ZeRO."""
