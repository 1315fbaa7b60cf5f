"""Writes, indexes, orders and streams tokenized WebDataset shards."""
