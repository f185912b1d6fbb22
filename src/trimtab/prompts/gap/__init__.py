"""The parts of a gap search: readings, the two searches, their trace."""
