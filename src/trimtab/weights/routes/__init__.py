"""The ways in which a steering becomes weights."""
