"""The levers as values, and how they act."""
