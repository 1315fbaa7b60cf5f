"""Text from a model: sampling and batched decoding."""
