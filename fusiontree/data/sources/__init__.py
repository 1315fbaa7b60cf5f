"""Token sources: where training reads its tokens. Importing the package registers the types that FusionTree has."""

from fusiontree.data.sources import cached_shards, megatron, synthetic, tasks

__all__ = ["cached_shards", "megatron", "synthetic", "tasks"]
