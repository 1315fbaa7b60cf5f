"""Programs for data, checkpoints and pictures, run as scripts."""
