"""Optimizers by name: settings, states and construction. A plugin adds one to ``OPTIMIZERS``."""
