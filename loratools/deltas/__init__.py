"""The mathematics of updates: what a module does to a weight. Knows nothing of keys, files or checkpoints."""
