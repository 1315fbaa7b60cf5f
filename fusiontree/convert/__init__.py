"""Conversions between our training checkpoint and other libraries' formats, run by ``tools/convert_checkpoint.py``."""
