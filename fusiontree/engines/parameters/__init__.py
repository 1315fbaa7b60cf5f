"""How an engine keeps parameters: local to one rank, replicated, or in slices of flat buffers."""
