"""Dimensions of a vector, scored and taken away, and what is left of the behavior."""
