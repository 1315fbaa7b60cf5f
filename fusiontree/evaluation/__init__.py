"""Evaluates checkpoints: perplexity on held-out text, retrieval and copying over long rows."""
