"""Where a steering goes on its way through the layers, and the space of those that work."""
