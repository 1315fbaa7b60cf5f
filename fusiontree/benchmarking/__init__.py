"""Timing of training steps, single operations, decoding and a peer model."""
