"""Smaller models: what each part of a trained model is worth, a plan of what to keep, and the pruned checkpoint."""
