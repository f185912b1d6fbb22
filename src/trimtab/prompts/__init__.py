"""Prompt levers: soft and discrete prefixes and suffixes that do what a reference prompt does."""
