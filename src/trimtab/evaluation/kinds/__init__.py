"""Judges by kind, one a file; evaluation/judges.py says where each is."""
