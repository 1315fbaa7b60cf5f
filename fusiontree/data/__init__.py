"""Tokenized WebDataset shards: writing, indexing, ordering and streaming them."""
