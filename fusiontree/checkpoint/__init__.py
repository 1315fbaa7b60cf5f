"""Training checkpoints: one format for every engine and layout."""
