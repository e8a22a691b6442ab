"""Models: the toy transformer, and adapters for those of others."""
