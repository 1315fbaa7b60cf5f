"""Helpers without knowledge of models or training: errors, files, hashing, settings, devices."""
