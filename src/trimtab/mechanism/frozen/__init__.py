"""Runs in which parts are held at what they do unsteered."""
