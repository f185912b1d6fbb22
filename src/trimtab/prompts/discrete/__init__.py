"""Moves of tokens."""
