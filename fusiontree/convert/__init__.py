"""Conversions between our training checkpoint and other formats, run by ``fusiontree checkpoint convert``."""
