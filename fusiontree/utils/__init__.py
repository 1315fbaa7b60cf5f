"""Helpers that know nothing of models or training: errors, files, hashing, console."""
