"""Vectors in a slot of the prompt, trained."""
