"""Studies over models: what changes with scale."""
