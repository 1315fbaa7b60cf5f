"""FusionTree: pretraining of hybrid Mamba-2 and local+global attention language models at long context."""

__version__ = "0.1.0"
