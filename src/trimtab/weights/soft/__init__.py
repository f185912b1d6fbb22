"""Soft prompts in a checkpoint."""
