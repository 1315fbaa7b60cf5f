"""Builds datasets: documents from files, shuffled and split, tokenized into data shards by worker processes."""
