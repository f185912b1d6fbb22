"""Checkpoints as files, read and written within the memory of one tensor."""
