"""Estimates of memory and speed, and the check of the network."""
