"""A model and what can be read of it."""
