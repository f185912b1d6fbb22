"""Theory held against a model."""
