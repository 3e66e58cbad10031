"""Reading models: registry, sources, checkpoints, loading, generation."""
