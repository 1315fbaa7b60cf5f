"""What a checkpoint can do: perplexity on held-out text, retrieval and copying over long rows."""
